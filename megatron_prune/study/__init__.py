"""Studies: a grid of prunings and trainings, compared only where their accounts match.

The way through: ``config`` reads study.yaml, ``choices`` its methods; ``grid`` lays its runs on one stream
(``budgets``); ``commands`` writes each run as command lines; ``runner`` runs them and ``ledger`` keeps what finished;
``match`` decides which runs may be compared; ``results`` turns them into rows for the report.
"""
