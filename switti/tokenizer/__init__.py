"""The RQ-VAE tokenizer: autoencoder, multi-scale residual quantizer, codebook, discriminator."""
