"""Prune or train from scratch: what a ledger of measured comparisons says about a target.

``ledgers`` reads what a study left; ``target`` is what is asked for; ``answer`` decides, or says why the ledger does
not carry an answer; ``best`` is its test; ``settle`` says which measurement would; ``command`` is the verb.
"""
