"""Configuration: YAML by kind, composed into typed dataclasses."""
