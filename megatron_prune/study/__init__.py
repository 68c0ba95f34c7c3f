"""Studies: a grid of prunings and trainings, compared only where their accounts match.

The way through: ``study_file`` reads study.yaml, ``schema`` (``sections``, ``values``) is what it may say, ``needs``
what each method asks for; ``prunings`` names every pruning, ``grid`` lays runs on one stream (``sample_ranges``),
``outlook`` says what is known before they run, ``validate`` refuses what cannot work, ``estimate`` says what it will
take; ``commands`` writes each run as command lines, ``jobs`` makes cells of them (``execution``: is a stage done?);
``run`` runs them, here or through Slurm, and ``evidence`` keeps what finished (``records``); ``match`` decides which
runs may be compared (``pair``: two accounts side by side; ``custody``: which files belong together); ``analysis`` draws
conclusions from them, and ``report`` shows these.
"""
