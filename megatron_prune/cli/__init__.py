"""The verbs, a file per group of the help.

Each has a parser, ``VERB_parser()``, and ``VERB_main(argv)``, which parses, calls one function of the rooms below,
prints, and returns the exit code. Rooms are imported inside the functions, so that every ``--help`` is quick.
"""
