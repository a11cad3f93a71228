"""Networks: RQ-VAE tokenizer, scale transformer, text encoders, perceptual networks."""
