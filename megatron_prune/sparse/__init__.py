"""Sparse pruning: run the calibration through the blocks (``driver.py``), collect statistics of the linears' inputs and
prune block by block (``block.py``; ``weights_only.py`` without a model), and write the result (``result.py``).

The choices among scores are in ``methods/selection.py``, SparseGPT's Hessian is in ``methods/sparsegpt.py``.
Counts are always exact. Among equal scores the lower index stays.
"""
