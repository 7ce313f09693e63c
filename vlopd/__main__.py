"""`python -m vlopd`: the command line without an installed script."""

from vlopd.cli.main import main

main()
