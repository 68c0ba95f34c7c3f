"""Sparse pruning: run the calibration through the blocks (``driver.py``), collect statistics of the linears' inputs
(``inputs.py``), prune block by block (``solve.py``; ``weights_only.py`` without a model) and write the result.

The choices among scores are in ``methods/selection.py``, SparseGPT's Hessian is in ``methods/hessian.py``.
Counts are always exact. Among equal scores the lower index stays.
"""
