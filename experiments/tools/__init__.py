"""Tools by which the shipped assets are made."""
