"""Lightning modules: generator (causal or non-causal), RQ-VAE, and tuning of its decoder."""
