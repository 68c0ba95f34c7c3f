#!/usr/bin/env bash
# Sets up .venv where needed, then the linter, the formatter, the type checker and the tests, in tiers:
#
#   bash tests/run.sh --quick              tests of less than half a second each: the loop while one works
#   bash tests/run.sh                      all that is not marked slow; Transformer Engine's own too, where it was built
#   bash tests/run.sh --all                everything, with a coverage figure: slow tests, Transformer Engine (built where
#                                          it is not: minutes, once), 30 kills of each verb, a sample of mutants, and
#                                          Megatron-LM's main branch where MEGATRON_LM names a checkout
#   bash tests/run.sh --gpu                on a machine with a GPU: tests/gpu and its benchmark, with Transformer Engine;
#                                          writes examples/llama3.1_8b/RESULTS.md
#   bash tests/run.sh tests/study -k plan  arguments go to pytest
#   bash tests/run.sh --te [ARGUMENTS]     tests/te, and the tests of whatever runs a model once more on TE's layers
#   bash tests/run.sh --mutation [MODULE]  every mutant of the modules in tests/mutation/modules.toml: hours; goes on
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
# NVIDIA's container has Transformer Engine, built for its own PyTorch: with megatron_prune in it, it is the environment.
of_container=
if [ "$tier" = gpu ] && python -c 'import megatron_prune, pytest, transformer_engine' 2>/dev/null; then
    of_container=yes
else
    setup_env dev
fi
[ "$tier" = quick ] || { setup_smollm2; setup_browser; }

# One thread a process: most tests run several processes, and results must not hang on the cores.
# nproc is asked first: it answers with OMP_NUM_THREADS once that is set.
export PYTEST_XDIST_AUTO_NUM_WORKERS="${PYTEST_XDIST_AUTO_NUM_WORKERS:-$(env -u OMP_NUM_THREADS nproc)}"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 HF_HUB_OFFLINE=1
# A worker per core. A file stays together, for what its tests share; the longest files begin (tests/tiers.py).
WORKERS=(-n auto --dist loadfile --no-loadscope-reorder)

tests() { python -m pytest "$@" </dev/null; }

checks() {
    ruff check .
    ruff format --check .
    mypy
}

# Runs in a shell of its own, since .venv-te is another environment. It has .venv under it.
on_te() ( # arguments of pytest
    source tools/setup_te.sh
    setup_te
    export MEGATRON_PRUNE_TE_TESTS=1
    tests "$@"
)

on_gpu() ( # folder for what is measured
    if [ -z "$of_container" ]; then
        source tools/setup_te.sh
        setup_te
    fi
    # What fails is on the page too, which is written of what there is.
    MEGATRON_PRUNE_GPU_RESULTS="$1/tests.json" tests tests/gpu || true
    python tests/benchmarks/gpu_training.py --json "$1/benchmark.json" || true
    python -m tests.gpu.results "$1/tests.json" --benchmark "$1/benchmark.json"
)

te_is_built() ( source tools/setup_te.sh; te_wheel_is_there )

TE_TOO=(tests/te tests/calibrate tests/sparsify tests/masks tests/training tests/evaluation)

case $tier in
    quick)
        checks
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
