"""Placeholder."""
CapitalsWorld = None
