#!/usr/bin/env python3
"""`megatron-prune preprocess`, under a name that users of Megatron look for."""

from __future__ import annotations

import sys

from megatron_prune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
