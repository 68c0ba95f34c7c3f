#!/usr/bin/env python3
"""`megatron-prune convert`, under a name that users of Megatron look for."""

from __future__ import annotations

import sys

from megatron_prune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
