"""The pruning verbs as functions of settings, called by the command line and the Python API."""
