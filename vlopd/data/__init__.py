"""Data sets of examples: the built-in ones, and any file, folder or hub data set."""
