"""Weights: where they are, what a file holds, and how it fills a model."""
