#!/usr/bin/env bash
# The paper in miniature: makes a corpus and a tokenizer, chooses the rate, cuts the study to the hours that there are,
# and runs it. Needs no GPU; downloads packages alone. It may be killed at any time: run it again, and it continues.
#
#   bash examples/miniature/run.sh [--small] [--hours H] [--seeds N] [--scale S]
#
# --small   small.yaml: a parent of a third of the size, on three tenths of the tokens
# --hours   what the whole study may take on this machine, over as many days as it is spread; plan.py leaves out
#           comparisons in a fixed order until it fits. Without it a plan that is there is continued; else all is run.
# --seeds   3 by default
# --scale   of all token counts: another study, with fewer tokens per parameter; 0.005 for a trial of the pipeline
#
# Writes runs/miniature/report/index.html (miniature-small-x0.3 with --small), and results.json and results.csv next to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/setup_env.sh
# Large arrays in huge pages, where the C library and the kernel have them, and memory that is used again.
KEEP=glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:$KEEP}"

HOURS="" SEEDS=3 SCALE="" CHANGED="" NAME=study RATE=rate
while [ $# -gt 0 ]; do
    case "$1" in
        --small) NAME=small RATE=small-rate; shift ;;
        --hours) HOURS="$2" CHANGED=1; shift 2 ;;
        --seeds) SEEDS="$2" CHANGED=1; shift 2 ;;
        --scale) SCALE="$2"; shift 2 ;;
        *) echo "run.sh: $1: expected --small, --hours H, --seeds N or --scale S" >&2; exit 2 ;;
    esac
done

[ -n "$SCALE" ] || SCALE="$([ $NAME = small ] && echo 0.3 || echo 1)"
DATA=runs/miniature-data
VOCABULARY=1024
EXAMPLE=examples/miniature

corpus() { # Debian's packages where there is apt-get; anywhere else, the text of this machine
    local options=(--output "$DATA/text" --longest-held-out 2000 --split 98.5,0.5,0.5,0.5 --max-bytes 0)
    if command -v apt-get dpkg-deb >/dev/null; then
        [ "$(id -u)" != 0 ] || apt-get -qq update >/dev/null 2>&1 || true # the lists may be there already
        grep -v '^#' "$EXAMPLE/packages.txt" | xargs python -m megatron_prune build-corpus "${options[@]}" \
            --downloads "$DATA/downloads" --packages-only --debian
    else
        python -m megatron_prune build-corpus "${options[@]}"
    fi
}

tokenize() {
    local split
    for split in train calibration validation test; do
        [ -f "$DATA/$split.json" ] || python -m megatron_prune preprocess --input "$DATA/text/$split.jsonl" \
            --output-prefix "$DATA/$split" --tokenizer-type SentencePieceTokenizer \
            --tokenizer-model "$DATA/tokenizer.model" --append-eod --workers 2
    done
}

is_trial() { awk "BEGIN { exit !($SCALE < 0.05) }"; } # it takes the rate of study.yaml

rate() {
    python -m megatron_prune study run "$EXAMPLE/$RATE.yaml"
    python "$EXAMPLE/plan.py" --study "$EXAMPLE/$RATE.yaml" --choose-rate "runs/miniature-$RATE/ledger.jsonl" --output "$DATA/$RATE"
}

plan() {
    local options=(--study "$EXAMPLE/$NAME.yaml" --seeds "$SEEDS" --scale "$SCALE" --output "$STUDY")
    [ -z "$HOURS" ] || options+=(--hours "$HOURS")
    [ ! -f "$DATA/$RATE" ] || options+=(--rate "$(cat "$DATA/$RATE")")
    python "$EXAMPLE/plan.py" "${options[@]}"
}

STUDY="$DATA/plan-$NAME-x$SCALE.yaml"
stage "set-up" setup_env
mkdir -p "$DATA"
[ -d "$DATA/text" ] || stage "corpus" corpus
[ -f "$DATA/tokenizer.model" ] || stage "tokenizer" python -m megatron_prune train-tokenizer \
    --input "$DATA/text/train.jsonl" --output "$DATA/tokenizer.model" --vocab-size $VOCABULARY --max-bytes 20000000
stage "tokenize" tokenize
is_trial || [ -f "$DATA/$RATE" ] || stage "rate" rate
if [ -n "$CHANGED" ] || [ ! -f "$STUDY" ]; then
    stage "plan" plan
else
    echo "== continuing $STUDY: $(head -1 "$STUDY")"
fi
stage "study" python -m megatron_prune study run "$STUDY"
