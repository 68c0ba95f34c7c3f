"""Will this command line run on that cluster? Answered in seconds, on any machine, without the cluster.

``command`` is the verb. ``engine.rehearsal`` lets Megatron parse, validate and build what the command asks for as
ranks of a job of that size; ``memory`` and ``cost`` are arithmetic on what was built; ``checks`` turns all of it
into findings, each with a verdict and a reason.
"""
