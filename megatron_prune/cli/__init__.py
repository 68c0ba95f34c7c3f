"""The command line: one file per verb, which parses, calls one function of the package, and prints."""
