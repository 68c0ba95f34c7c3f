#!/usr/bin/env bash
# DCLM-Baseline as corpora of Llama 3's tokens: one per local shard of the data set, about 38B tokens each.
#
#     hf download mlfoundations/dclm-baseline-1.0 --repo-type dataset --local-dir $DCLM_TEXT \
#         --include 'global-shard_0[12]_of_10/*' --include 'global-shard_10_of_10/local-shard_9_of_10/*'
#     bash examples/llama3.1_8b/dclm.sh check                 # what this machine lacks for all of it
#     bash examples/llama3.1_8b/dclm.sh shards                # lists the downloaded shards
#     sbatch --array 0-19 --cpus-per-task 32 --wrap \
#         'bash examples/llama3.1_8b/dclm.sh tokenize $SLURM_ARRAY_TASK_ID'       # or a loop on one machine
#     bash examples/llama3.1_8b/dclm.sh held-out              # calibration, validation and test, from another shard
#     bash examples/llama3.1_8b/dclm.sh blend                 # refuses while a shard is missing, and names it
#     bash examples/llama3.1_8b/dclm.sh index                 # builds the stream's caches before a cluster needs them
#
# Every step can be interrupted and run again: finished files of a shard are kept, finished shards are skipped. Each step
# first lists everything that it lacks (programs, text, tokenizer, disk), and then exits with code 2.
# DCLM_TEXT: the download. DCLM_OUT: the corpora. TOKENIZER: a directory with Llama 3's tokenizer.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
RUNS=runs/llama3.1-8b
TEXT="${DCLM_TEXT:-$RUNS/dclm-baseline-1.0}" OUT="${DCLM_OUT:-$RUNS/dclm}" TOKENIZER="${TOKENIZER:-$RUNS/hf}"
WORKERS="${WORKERS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}"
PYTHON="${PYTHON:-python}"

LACKS=()
HELD_OUT=global-shard_10_of_10/local-shard_9_of_10

needs_python() {
    if ! command -v "$PYTHON" >/dev/null; then
        LACKS+=("the program $PYTHON: set PYTHON to the Python that megatron-prune is installed in")
    elif ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("megatron_prune") and u.find_spec("zstandard")))'; then
        LACKS+=("the packages megatron_prune and zstandard in $PYTHON: pip install -e .")
    fi
}

needs_tokenizer() {
    [ -f "$TOKENIZER/tokenizer.json" ] && return
    LACKS+=("$TOKENIZER/tokenizer.json: hf download meta-llama/Llama-3.1-8B --local-dir $TOKENIZER, or set TOKENIZER")
}

needs_text() { # folders of the download
    local folder
    for folder in "$@"; do
        compgen -G "$TEXT/$folder/*.jsonl.zst" >/dev/null ||
            LACKS+=("$TEXT/$folder/*.jsonl.zst: download them (the first lines of dclm.sh say how), or set DCLM_TEXT")
    done
}

needs_file() { # file, the step that makes it
    [ -f "$1" ] || LACKS+=("$1: dclm.sh $2 makes it")
}

needs_room() { # folders; their tokens take about three times the space of the compressed text
    local size room there=$OUT
    size=$( (cd "$TEXT" 2>/dev/null && du -scb "$@" 2>/dev/null | tail -n 1 | cut -f 1) || true)
    while [ ! -d "$there" ]; do there=$(dirname "$there"); done
    room=$(df --output=avail -B1 "$there" | tail -n 1)
    [ "$room" -ge $((3 * ${size:-0})) ] ||
        LACKS+=("room on the disk of $OUT: about $((3 * size / 1000000000 + 1)) GB, there are $((room / 1000000000)) GB")
}

say_lacks() { # the step that cannot start
    [ "${#LACKS[@]}" -gt 0 ] || return 0
    printf "dclm.sh $1 lacks %s\n" "${LACKS[@]}" >&2
    exit 2
}

check() { # everything that the steps from download to index need on this machine
    needs_python
    needs_tokenizer
    if ! compgen -G "$TEXT/global-shard_0[12]_of_*/local-shard_*" >/dev/null; then
        command -v hf >/dev/null || LACKS+=("the program hf, for the download: pip install huggingface_hub")
        "${PYTHON}" -c 'import socket; socket.create_connection(("huggingface.co", 443), 5)' 2>/dev/null ||
            LACKS+=("a connection to huggingface.co, for the download")
    fi
    needs_text 'global-shard_0[12]_of_*/local-shard_*' "$HELD_OUT"
    needs_room .
    say_lacks check
    echo "nothing is lacking"
}

name_of() { # global-shard_01_of_10/local-shard_0_of_10 -> global-01-local-0
    sed -E 's#global-shard_([0-9]+)_of_[0-9]+/local-shard_([0-9]+)_of_[0-9]+#global-\1-local-\2#' <<<"$1"
}

corpus() { # prefix file...
    local prefix=$1
    shift
    [ -f "$prefix.json" ] && { echo "$prefix is there"; return; } # preprocess writes this file last
    "$PYTHON" -m megatron_prune preprocess --input "$@" --output-prefix "$prefix" --append-eod --workers "$WORKERS" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
}

shards() {
    needs_text 'global-shard_0[12]_of_*/local-shard_*'
    say_lacks shards
    mkdir -p "$OUT"
    (cd "$TEXT" && ls -d global-shard_0[12]_of_*/local-shard_*) >"$OUT/shards.txt.new"
    mv "$OUT/shards.txt.new" "$OUT/shards.txt"
    echo "$(wc -l <"$OUT/shards.txt") shards: tokenize 0 to $(($(wc -l <"$OUT/shards.txt") - 1))"
}

tokenize() { # line number in shards.txt, from 0
    local shard
    needs_python
    needs_tokenizer
    needs_file "$OUT/shards.txt" shards
    say_lacks tokenize
    shard=$(sed -n "$(($1 + 1))p" "$OUT/shards.txt")
    [ -n "$shard" ] || { echo "dclm.sh: $OUT/shards.txt has no shard $1" >&2; exit 2; }
    needs_text "$shard"
    needs_room "$shard"
    say_lacks "tokenize $1"
    corpus "$OUT/$(name_of "$shard")" "$TEXT/$shard"/*.jsonl.zst
}

held_out() {
    needs_python
    needs_tokenizer
    needs_text "$HELD_OUT"
    say_lacks held-out
    local files=("$TEXT/$HELD_OUT"/*.jsonl.zst)
    [ "${#files[@]}" -ge 3 ] || { echo "dclm.sh: three files are needed in global-shard_10/local-shard_9" >&2; exit 2; }
    corpus "$OUT/calibration" "${files[0]}"
    corpus "$OUT/validation" "${files[1]}"
    corpus "$OUT/test" "${files[2]}"
}

blend() {
    local number=0 missing=() prefixes=() shard prefix
    needs_python
    needs_file "$OUT/shards.txt" shards
    say_lacks blend
    while read -r shard; do
        prefix="$OUT/$(name_of "$shard")"
        if [ -f "$prefix.json" ]; then prefixes+=("$prefix"); else missing+=("$number"); fi
        number=$((number + 1))
    done <"$OUT/shards.txt"
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "dclm.sh: not tokenized yet: --array $(IFS=,; echo "${missing[*]}")" >&2
        exit 1
    fi
    # Without weights, the blend takes from the corpora in proportion to their lengths.
    printf '%s\n' "${prefixes[@]}" >"$OUT/blend.txt.new"
    mv "$OUT/blend.txt.new" "$OUT/blend.txt"
    "$PYTHON" -c 'import json, sys; print(f"{sum(json.load(open(p + ".json"))["tokens"] for p in sys.argv[1:]):,} tokens")' \
        "${prefixes[@]}"
}

index() { # flags of `build-index`, such as ranges
    local blend name
    needs_python
    needs_file "$OUT/blend.txt" blend
    for name in calibration validation test; do needs_file "$OUT/$name.json" held-out; done
    say_lacks index
    mapfile -t blend <"$OUT/blend.txt"
    "$PYTHON" -m megatron_prune build-index --data-path "${blend[@]}" --seq-length "${SEQ_LENGTH:-8192}" --stream-seed 1 \
        --data-cache-path "${CACHE:-$RUNS/cache}" --held-out "$OUT/calibration" "$OUT/validation" "$OUT/test" "$@"
}

case "${1:-}" in
check) check ;;
shards) shards ;;
tokenize) tokenize "${2:?which shard}" ;;
held-out) held_out ;;
blend) blend ;;
index) index "${@:2}" ;;
*) echo "usage: dclm.sh check | shards | tokenize N | held-out | blend | index [flags]" >&2; exit 2 ;;
esac
