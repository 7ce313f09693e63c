"""Masks: which coordinates may train. A mask is a dict of bool tensors by parameter name."""
