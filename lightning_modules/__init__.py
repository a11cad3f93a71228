"""Lightning modules: generator (causal or non-causal) and RQ-VAE."""
