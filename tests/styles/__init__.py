"""Outputs in the styles that models answer in, with the answer that a careful reader finds, by construction."""
