"""Examples: the built-in data sets, and any file, folder or hub data set."""
