"""`python -m vlopd.cli`: the same as `python -m vlopd`, by its earlier name."""

from vlopd.cli.main import main

main()
