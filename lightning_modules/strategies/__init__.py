"""Devices and ranks: strategies, launch environment, sharding."""
