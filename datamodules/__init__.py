"""WebDataset shards to batches."""
