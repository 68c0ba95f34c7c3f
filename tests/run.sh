#!/usr/bin/env bash
# Sets up .venv if needed, then runs the linter, the formatter, the type checker and the tests, in tiers:
#
#   bash tests/run.sh --quick              the short tests of tests/quick.txt, some of each room: under 90 seconds
#   bash tests/run.sh                      all that are not marked slow; those of Transformer Engine too, if it was built
#   bash tests/run.sh --all                everything, with a coverage figure: slow tests, Transformer Engine (built if
#                                          necessary: minutes, once), 30 kills of each verb, a sample of mutants, and
#                                          Megatron-LM's main branch if MEGATRON_LM names a checkout
#   bash tests/run.sh --gpu                on a machine with a GPU: tests/gpu and its benchmark, with Transformer Engine;
#                                          writes examples/llama3.1_8b/RESULTS.md
#   bash tests/run.sh tests/study -k plan  arguments go to pytest
#   bash tests/run.sh --te [ARGUMENTS]     tests/te, and the tests that run a model again, on TE's layers
#   bash tests/run.sh --mutation [MODULE]  every mutant of the modules in tests/mutation/modules.toml: hours; continues
#                                          where it was stopped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tier=default
case "${1:-}" in
    --quick | --all | --te | --gpu | --mutation) tier=${1#--}; shift ;;
    "") ;;
    *) tier=some ;;
esac
source tools/setup_env.sh
# NVIDIA's container has Transformer Engine, built for its own PyTorch: once megatron_prune is installed there, use it.
of_container=
if [ "$tier" = gpu ] && python -c 'import megatron_prune, pytest, transformer_engine' 2>/dev/null; then
    of_container=yes
else
    setup_env dev
fi
[ "$tier" = quick ] || { setup_smollm2; setup_browser; }

# One thread per process: most tests run several processes, and results must not depend on the number of cores.
# nproc comes first, because it returns OMP_NUM_THREADS once that is set.
export PYTEST_XDIST_AUTO_NUM_WORKERS="${PYTEST_XDIST_AUTO_NUM_WORKERS:-$(env -u OMP_NUM_THREADS nproc)}"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1
# One worker per core. The tests of a file stay together, since they share fixtures; the longest files start first
# (tests/tiers.py).
WORKERS=(-n auto --dist loadfile --no-loadscope-reorder)

tests() { python -m pytest "$@" </dev/null; }

checks() {
    ruff check .
    ruff format --check .
    mypy
}

# Runs in a subshell, because .venv-te is another environment (on top of .venv).
on_te() ( # arguments of pytest
    source tools/setup_te.sh
    setup_te
    export MEGATRON_PRUNE_TE_TESTS=1
    tests "$@"
)

on_gpu() ( # folder for the measurements
    if [ -z "$of_container" ]; then
        source tools/setup_te.sh
        setup_te
    fi
    # The page lists failures too, so it is written in any case.
    MEGATRON_PRUNE_GPU_RESULTS="$1/tests.json" tests tests/gpu || true
    python tests/benchmarks/gpu_training.py --json "$1/benchmark.json" || true
    python -m tests.gpu.results "$1/tests.json" --benchmark "$1/benchmark.json"
)

te_is_built() ( source tools/setup_te.sh; te_wheel_is_there )

TE_TOO=(tests/te tests/calibration tests/sparse tests/masks tests/training tests/evaluation)

case $tier in
    quick)
        checks
        [ $# -gt 0 ] || set -- @tests/quick.txt
        tests --quick "${WORKERS[@]}" "$@"
        ;;
    some)
        checks
        tests "$@"
        ;;
    default)
        checks
        tests "${WORKERS[@]}" -m "not slow and not gpu"
        if te_is_built; then
            on_te "${WORKERS[@]}" -m "not slow and not gpu" tests/te
        else
            echo "tests/te: not run, Transformer Engine is not built here: bash tests/run.sh --te" >&2
        fi
        ;;
    te)
        [ $# -gt 0 ] || set -- "${TE_TOO[@]}"
        on_te "$@"
        ;;
    gpu)
        measured=$(mktemp -d)
        on_gpu "$measured"
        ;;
    all)
        checks
        export KILLS="${KILLS:-30}"
        tests "${WORKERS[@]}" --cov --cov-report= "$@"
        echo "coverage: $(python -m coverage report --format=total)% of the package's lines, those in forked ranks too"
        on_te "${WORKERS[@]}" "${TE_TOO[@]}"
        python -m tests.mutation --sample 20
        ;;
    mutation) python -m tests.mutation "$@" ;;
esac
