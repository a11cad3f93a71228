"""Sweeps: studies, searches, their preflight checks and launchers."""
