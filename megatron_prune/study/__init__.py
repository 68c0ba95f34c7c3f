"""Studies: a grid of prunings and trainings, compared only where their accounts match.

The way through: ``config`` reads study.yaml (``sections``, ``launch``, ``family``, ``values``), ``choices`` its
methods; ``prunings`` names every pruning, ``grid`` lays runs on one stream (``budgets``), ``preflight`` refuses what
cannot work, ``outlay`` says what it will take; ``commands`` and ``pruning_commands`` write each run as command lines,
``stages`` makes cells of them (``checks``: is it done?); ``runner`` runs them, ``local`` or through ``slurm``, and
``ledger`` keeps what finished (``records``); ``match`` decides which runs may be compared, ``sweep`` which rate
stands for an arm; ``results`` turns them into ``rows`` and, by ``conclusions``, into verdicts for the report.
"""
