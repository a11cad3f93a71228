"""The commands: one file each, run as python -m experiments.<command>."""
