"""Studies: a grid of prunings and trainings, compared only where their accounts match.

The modules in order: ``study_file`` reads study.yaml, ``schema`` (``sections``, ``values``) defines its content,
``needs`` lists what each method requires; ``prunings`` names every pruning, ``grid`` assigns runs to one stream
(``sample_ranges``), ``outlook`` collects what is known before they run, ``validate`` refuses what cannot work,
``estimate`` computes the cost; ``commands`` writes runs as command lines, ``jobs`` makes cells from them
(``execution``: is a stage done?); ``run`` runs them locally or through Slurm, and ``evidence`` keeps the results
(``records``); ``match`` decides which runs may be compared (``pair``: two accounts; ``custody``: which files belong
together); ``analysis`` draws conclusions, and ``report`` shows them.
"""
