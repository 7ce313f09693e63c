"""The experiment's configuration: one frozen class a concept, TOML in, JSON out.

A variant is a union on `type`. An unknown key is an error that names the nearest known one. Overrides
are TOML lines with dotted keys: `optim.learning_rate=2e-4`, `arms.full.seed=3`. The resolved config is
written as JSON (run.json), which keeps nulls; hand-written files stay TOML.
"""
