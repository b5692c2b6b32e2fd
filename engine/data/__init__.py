"""Datasets and loaders: what is on disk becomes images, then views."""
