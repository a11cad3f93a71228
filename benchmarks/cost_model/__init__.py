"""Cost model: memory, operations, communication and time of a training step, without running it."""
