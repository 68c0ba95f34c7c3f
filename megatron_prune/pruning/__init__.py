"""The verbs that prune, as functions of settings: what the command line, Python and nothing else call."""
