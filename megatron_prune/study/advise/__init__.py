"""Prune or train from scratch: advice from a ledger of measured comparisons.

``ledgers`` reads a study's results; ``question`` is the target; ``answer`` decides, or says why the ledger has no
answer; ``best`` is its statistical test, and names measurements that would settle the question.
"""
