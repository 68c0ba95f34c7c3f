#!/usr/bin/env bash
# Sets up .venv where needed, then the linter, the type checker and the tests.
# Arguments go to pytest:   bash tests/run.sh tests/engine -k launch
# With --te first: builds Transformer Engine (minutes, once) and runs tests/te, and the tests of whatever runs a model
# once more, on Transformer Engine's layers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
setup_env dev
setup_smollm2
setup_browser

# One thread a process: most tests run several processes, and results must not hang on the cores.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1

if [ "${1:-}" = --te ]; then
    shift
    source tools/setup_te.sh
    setup_te
    export MEGATRON_PRUNE_TE_TESTS=1
    [ $# -gt 0 ] || set -- tests/te tests/calibrate tests/sparsify tests/masks tests/training tests/evaluation
    exec python -m pytest "$@" </dev/null
fi

ruff check .
ruff format --check .
mypy
# Two at a time: every other test is one process. A file stays together, for what its tests share.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec python -m pytest "$@" </dev/null
