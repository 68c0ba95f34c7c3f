"""Will this command line run on that cluster? The answer takes seconds, on any machine, without the cluster.

``dry_run`` lets Megatron parse, validate and build what the command asks for, as a rank of a job of that size;
``memory`` and ``cost`` calculate from what was built; ``checks`` turns the results into findings, each with a verdict
and a reason; ``verdict`` is the whole answer.
"""
