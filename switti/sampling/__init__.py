"""Sampling: guidance, filters, Gumbel smoothing, the scale-by-scale sampler, the pipeline."""
