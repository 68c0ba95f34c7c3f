"""What the sparse methods share: exact choices among scores, statistics of inputs, ranks' rows.

* ``choose.py``       the lowest scores of each row, or of each group of M inputs
* ``rows.py``         the lowest scores of a matrix whose rows lie on several ranks
* ``square_sums.py``  Wanda's statistic of a matrix's inputs
* ``hessian.py``      SparseGPT's, and the factor of its inverse

Counts are always exact, and between equal scores the lower index stays.
"""
