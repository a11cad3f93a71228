"""Several processes: collectives, sharded checkpoints, optimizer state by parameter name."""
