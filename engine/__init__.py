"""The training engine: two peers pre-trained at once, each distilling the other."""
