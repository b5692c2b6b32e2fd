"""Measurements: `python -m bench SUBJECT`.  One harness, one subject a file; rows under results/, by device."""
