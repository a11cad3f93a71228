"""Shards to samples: index, order, text embeddings, streams."""
