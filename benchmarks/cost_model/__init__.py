"""What a training step needs, found out without running it."""
