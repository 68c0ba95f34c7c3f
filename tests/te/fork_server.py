"""The process that forks this folder's ranks: Transformer Engine is imported in it, Megatron after it."""

from __future__ import annotations

import os
import socket
import sys

from megatron_prune.engine import fork_server
from tests.te import torch_math

if __name__ == "__main__":
    torch_math.install()
    fork_server.serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
