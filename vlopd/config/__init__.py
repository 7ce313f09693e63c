"""The experiment's configuration: one frozen class per concept, TOML in, JSON out.

Variants are unions discriminated by `type`. An unknown key is an error that names the nearest known one. Overrides
are TOML lines with dotted keys: `optim.learning_rate=2e-4`, `arms.full.seed=3`. The resolved config is
written as JSON (run.json), which keeps nulls.
"""
