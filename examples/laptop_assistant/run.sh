#!/bin/sh
# From the demo's pretrained model to an assistant that answers, on a laptop without a GPU, in a few minutes.
#
#   sh examples/laptop_assistant/run.sh                 pretrain (if need be), pairs, LoRA, merge, evaluate, serve, ask
#   DRY_RUN=1 sh examples/laptop_assistant/run.sh       prints the commands and runs nothing
#
# The pairs are made of the documentation that ships with Python: what does a function do, answered by its docstring. A
# model of this size learns some of them by heart and no more. Each step is the script that larger models use.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
ROOT=$(CDPATH='' cd -- "$HERE/../.." && pwd)

MODEL=${MODEL:-demo/checkpoint}      # base: the demo's newest checkpoint, or any other folder of weights
OUTPUT=${OUTPUT:-demo/assistant}     # folder of all that is written
PAIRS=${PAIRS:-60}                   # instruction pairs to make
TRAIN_ITERS=${TRAIN_ITERS:-100}      # steps of fine-tuning
PORT=${PORT:-8411}                   # of the server that answers at the end
QUESTION=${QUESTION:-What does abc.abstractmethod do?}
DRY_RUN=${DRY_RUN:-0}                # 1 prints the commands
VENV=${VENV:-"$ROOT/.venv"}          # environment; made by run_install_environment.sh when it is not there
# ---- end of settings ----

case " $* " in
*' --help '* | *' -h '*)
    sed -n '2,/^# ---- end of settings/p' "$0" | grep -v -e '^set -eu' -e '^HERE=' -e '^ROOT=' -e '---- end'
    exit 0
    ;;
esac
fail() {
    echo "error: $1" >&2
    exit 1
}
[ "$#" -eq 0 ] || fail "'$1' was given, but this script takes no arguments: its settings are the variables at its top"
case $DRY_RUN in 0 | 1) ;; *) fail "DRY_RUN is '$DRY_RUN', but it must be 0 or 1" ;; esac

# run WORD...: prints a command and, unless DRY_RUN is 1, runs it.
run() {
    echo "$*"
    [ "$DRY_RUN" = 1 ] || "$@"
}

export VENV
if [ "$DRY_RUN" = 0 ] && [ ! -d "$MODEL" ] && [ "$MODEL" = demo/checkpoint ]; then
    # These names mean something else there, and a caller may have exported them.
    (unset MODEL OUTPUT TRAIN_ITERS && sh "$ROOT/run_pretrain_gpt.sh")
fi
[ "$DRY_RUN" = 1 ] || sh "$ROOT/run_install_environment.sh"

run "$VENV/bin/python" "$ROOT/examples/laptop_assistant/make_pairs.py" --output "$OUTPUT/pairs.jsonl" --count "$PAIRS"
run env MODEL="$MODEL" DATA="$OUTPUT/pairs.jsonl" VALID_DATA="$OUTPUT/pairs.jsonl" OUTPUT="$OUTPUT" TEMPLATE=chatml LORA_RANK=32 LORA_ALPHA=64 \
    LORA_DROPOUT=0 LORA_TARGETS=all-linear MODULES_TO_SAVE="embed_tokens lm_head" LR=3e-3 MICRO_BATCH=8 GLOBAL_BATCH=16 MAX_LENGTH=128 \
    TRAIN_ITERS="$TRAIN_ITERS" EVAL_INTERVAL="$TRAIN_ITERS" DEVICE=cpu NPROC=1 sh "$ROOT/run_lora_finetune.sh"
run env BASE="$MODEL" ADAPTERS="$OUTPUT/adapter" SAVE="$OUTPUT/hf_ckpt" sh "$ROOT/merge.sh"

# Both models are asked in the same words; the base has no template of its own.
if [ "$DRY_RUN" = 0 ]; then
    cat > "$OUTPUT/evaluation.yaml" <<EOF
models:
  base: {path: "$MODEL", chat_template: "$OUTPUT/hf_ckpt/chat_template.jinja"}
  assistant: "$OUTPUT/hf_ckpt"
tasks:
  answers: {type: generation, data: "$OUTPUT/pairs.jsonl", chat: true, max_new_tokens: 48, limit: 50}
EOF
fi
run env CONFIG="$OUTPUT/evaluation.yaml" OUTPUT="$OUTPUT/evaluation" DEVICE=cpu sh "$ROOT/run_evaluation.sh"
run env MODEL="$OUTPUT/hf_ckpt" NAME=assistant PORT="$PORT" DEVICE=cpu sh "$ROOT/run_deploy.sh" --check
run "$VENV/bin/python" "$ROOT/examples/laptop_assistant/ask.py" --model "$OUTPUT/hf_ckpt" --port "$PORT" "$QUESTION"
