#!/usr/bin/env bash
# DCLM-Baseline as corpora of Llama 3's tokens: one a local shard of the data set, some 38B tokens each.
#
#     hf download mlfoundations/dclm-baseline-1.0 --repo-type dataset --local-dir $DCLM_TEXT \
#         --include 'global-shard_0[12]_of_10/*' --include 'global-shard_10_of_10/local-shard_9_of_10/*'
#     bash examples/llama3.1_8b/dclm.sh shards                # lists the shards that are there
#     sbatch --array 0-19 --cpus-per-task 32 --wrap \
#         'bash examples/llama3.1_8b/dclm.sh tokenize $SLURM_ARRAY_TASK_ID'       # or a loop on one machine
#     bash examples/llama3.1_8b/dclm.sh held-out              # calibration, validation, test: of another shard
#     bash examples/llama3.1_8b/dclm.sh blend                 # refuses while a shard is missing, and says which
#     bash examples/llama3.1_8b/dclm.sh index                 # the stream's caches, before a cluster waits for them
#
# Everything may be interrupted and run again: finished files of a shard are kept, finished shards are skipped.
# DCLM_TEXT: the download. DCLM_OUT: the corpora. TOKENIZER: a directory with Llama 3's tokenizer.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
RUNS=runs/llama3.1-8b
TEXT="${DCLM_TEXT:-$RUNS/dclm-baseline-1.0}" OUT="${DCLM_OUT:-$RUNS/dclm}" TOKENIZER="${TOKENIZER:-$RUNS/hf}"
WORKERS="${WORKERS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}"
PYTHON="${PYTHON:-python}"

name_of() { # global-shard_01_of_10/local-shard_0_of_10 -> global-01-local-0
    sed -E 's#global-shard_([0-9]+)_of_[0-9]+/local-shard_([0-9]+)_of_[0-9]+#global-\1-local-\2#' <<<"$1"
}

corpus() { # prefix file...
    local prefix=$1
    shift
    [ -f "$prefix.json" ] && { echo "$prefix is there"; return; } # the last file that is written
    "$PYTHON" -m megatron_prune preprocess --input "$@" --output-prefix "$prefix" --append-eod --workers "$WORKERS" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
}

shards() {
    mkdir -p "$OUT"
    (cd "$TEXT" && ls -d global-shard_0[12]_of_*/local-shard_*) >"$OUT/shards.txt.new"
    mv "$OUT/shards.txt.new" "$OUT/shards.txt"
    echo "$(wc -l <"$OUT/shards.txt") shards: tokenize 0 to $(($(wc -l <"$OUT/shards.txt") - 1))"
}

tokenize() { # number of a line of shards.txt, from 0
    local shard
    shard=$(sed -n "$(($1 + 1))p" "$OUT/shards.txt")
    [ -n "$shard" ] || { echo "dclm.sh: $OUT/shards.txt has no shard $1" >&2; exit 2; }
    corpus "$OUT/$(name_of "$shard")" "$TEXT/$shard"/*.jsonl.zst
}

held_out() {
    local files=("$TEXT"/global-shard_10_of_10/local-shard_9_of_10/*.jsonl.zst)
    [ "${#files[@]}" -ge 3 ] || { echo "dclm.sh: three files are needed in global-shard_10/local-shard_9" >&2; exit 2; }
    corpus "$OUT/calibration" "${files[0]}"
    corpus "$OUT/validation" "${files[1]}"
    corpus "$OUT/test" "${files[2]}"
}

blend() {
    local number=0 missing=() prefixes=() shard prefix
    while read -r shard; do
        prefix="$OUT/$(name_of "$shard")"
        if [ -f "$prefix.json" ]; then prefixes+=("$prefix"); else missing+=("$number"); fi
        number=$((number + 1))
    done <"$OUT/shards.txt"
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "dclm.sh: not tokenized yet: --array $(IFS=,; echo "${missing[*]}")" >&2
        exit 1
    fi
    # Without weights the corpora are used up together, in proportion to their lengths.
    printf '%s\n' "${prefixes[@]}" >"$OUT/blend.txt.new"
    mv "$OUT/blend.txt.new" "$OUT/blend.txt"
    "$PYTHON" -c 'import json, sys; print(f"{sum(json.load(open(p + ".json"))["tokens"] for p in sys.argv[1:]):,} tokens")' \
        "${prefixes[@]}"
}

index() { # flags of `index`, such as the ranges that are to be there
    local blend
    mapfile -t blend <"$OUT/blend.txt"
    "$PYTHON" -m megatron_prune build-index --data-path "${blend[@]}" --seq-length "${SEQ_LENGTH:-8192}" --stream-seed 1 \
        --data-cache-path "${CACHE:-$RUNS/cache}" --held-out "$OUT/calibration" "$OUT/validation" "$OUT/test" "$@"
}

case "${1:-}" in
shards) shards ;;
tokenize) tokenize "${2:?which shard}" ;;
held-out) held_out ;;
blend) blend ;;
index) index "${@:2}" ;;
*) echo "usage: dclm.sh shards | tokenize N | held-out | blend | index [flags]" >&2; exit 2 ;;
esac
