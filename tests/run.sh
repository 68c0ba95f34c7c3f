#!/usr/bin/env bash
# Sets up .venv where needed, then the linter, the type checker and the tests.
# Arguments go to pytest:   bash tests/run.sh tests/engine -k launch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
setup_env dev
setup_smollm2
setup_browser

# One thread a process: most tests run several processes, and results must not hang on the cores.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1

ruff check .
mypy
exec python -m pytest "$@" </dev/null
