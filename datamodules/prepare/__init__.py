"""Captioned images to WebDataset shards."""
