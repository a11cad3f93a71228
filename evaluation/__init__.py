"""Evaluation of tokenizers and generators."""
