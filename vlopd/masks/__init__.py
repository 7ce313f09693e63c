"""Masks: the coordinates that may train, as a dict of bool tensors by parameter name."""
