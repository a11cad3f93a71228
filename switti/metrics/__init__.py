"""Metrics whose names say which network and which convention they use."""
