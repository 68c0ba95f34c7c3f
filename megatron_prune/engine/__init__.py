"""The only room that knows Megatron's globals.

Importing it prepares ``torch`` for the machine (``cpu.prepare``), which must come before the first
import of ``megatron``: its kernels are decorated with ``torch.compile`` as they are imported.
"""

from megatron_prune.engine import cpu

cpu.prepare()
