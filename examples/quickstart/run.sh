#!/usr/bin/env bash
# Makes a tokenizer and corpora from text on this machine, trains a small parent, prunes it by half, retrains it,
# and compares with training from scratch. Needs no GPU and downloads nothing but packages; about seven
# minutes on two cores in bf16, ten to twelve in fp32, after installation. Run it again to continue where it stopped.
#
#   bash examples/quickstart/run.sh            in bf16 if the processor has units for it, otherwise in fp32
#   bash examples/quickstart/run.sh fp32       in that precision, fp32 or bf16
#
# Writes runs/quickstart/report/index.html (and results.json and results.csv next to it).
set -euo pipefail
precision="${1:-}"
if [ -z "$precision" ]; then
    precision=fp32
    grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && precision=bf16
fi
case "$precision" in
    fp32) STUDY=examples/quickstart/study.yaml ;;
    bf16) STUDY=examples/quickstart/bf16.yaml ;;
    *) echo "run.sh: expected fp32 or bf16, got $precision" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/setup_env.sh
# Large arrays in huge pages, where the C library and the kernel have them: 4% less time per training step.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

DATA=runs/quickstart-data
VOCABULARY=2048

tokenize() { # all four corpora at once: most of the time is start-up
    local split jobs=()
    for split in train calibration validation test; do
        [ -f "$DATA/$split.json" ] && continue
        python -m megatron_prune preprocess --input "$DATA/text/$split.jsonl" --output-prefix "$DATA/$split" \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DATA/tokenizer.model" --append-eod &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
}

stage "set-up" setup_env
begin=$SECONDS
mkdir -p "$DATA"
[ -d "$DATA/text" ] || stage "corpus" python -m megatron_prune build-corpus --output "$DATA/text" --max-bytes 10000000 \
    --longest-held-out 1200 # so that the evaluated windows cover many documents
[ -f "$DATA/tokenizer.model" ] || stage "tokenizer" python -m megatron_prune train-tokenizer \
    --input "$DATA/text/train.jsonl" --output "$DATA/tokenizer.model" --vocab-size $VOCABULARY --max-bytes 4000000
stage "tokenize" tokenize
stage "study, $precision" python -m megatron_prune study run "$STUDY"
printf '== %-28s %5d s\n' "all, after set-up" $((SECONDS - begin))
echo "open runs/quickstart/report/index.html"
