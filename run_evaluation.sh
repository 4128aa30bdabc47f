#!/bin/sh
# Evaluates several models on the same tasks and writes one table: console, CSV, JSON, and an HTML page with a plot.
#
#   sh run_evaluation.sh                                             the demo's model, half and fully trained (sh run_pretrain_gpt.sh first)
#   MODELS="base=my/hf tuned=my/hf+my/lora" sh run_evaluation.sh     your models on the tasks of CONFIG: a folder, or folder+adapter
#   CONFIG=my.yaml OUTPUT=runs/mine sh run_evaluation.sh             your models and tasks; docs/guide/evaluation.md has every setting
#   LIMIT=5 sh run_evaluation.sh                                     the first five records of each task, to try it out
#   DRY_RUN=1 sh run_evaluation.sh                                   prints the command and runs nothing
#
# Every setting below is a variable: NAME=value sh run_evaluation.sh. Arguments are passed on to tools/evaluate.py. Run again, only
# what is new is computed.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tools/script_common.sh
. "$HERE/tools/script_common.sh"

CONFIG=${CONFIG:-"$HERE/examples/evaluation.yaml"} # models and tasks
MODELS=${MODELS:-}                # "name=folder name=folder+adapter", in place of the models of CONFIG
TASKS=${TASKS:-}                  # only these of its tasks
OUTPUT=${OUTPUT:-}                # folder of the results; empty: what CONFIG says
DEVICE=${DEVICE:-}                # auto, cuda or cpu; empty: what CONFIG says, or else auto
DTYPE=${DTYPE:-}                  # auto, float32, bfloat16 or float16; empty: what CONFIG says
BATCH_SIZE=${BATCH_SIZE:-}        # sequences in one pass; empty: what CONFIG says, or else 8
LIMIT=${LIMIT:-}                  # only the first records of each task
DRY_RUN=${DRY_RUN:-0}             # 1 prints the command
VENV=${VENV:-"$HERE/.venv"}       # environment; made by run_install_environment.sh when it is not there
# ---- end of settings ----

help_of tools/evaluate.py "$@"
one_of DRY_RUN 0 1
file_of CONFIG
make_environment

# Last to first: each goes before those that are there, and of two the last one counts.
[ -z "$LIMIT" ] || set -- --limit "$LIMIT" "$@"
[ -z "$BATCH_SIZE" ] || set -- --batch-size "$BATCH_SIZE" "$@"
[ -z "$DTYPE" ] || set -- --dtype "$DTYPE" "$@"
[ -z "$DEVICE" ] || set -- --device "$DEVICE" "$@"
[ -z "$OUTPUT" ] || set -- --output "$OUTPUT" "$@"
# shellcheck disable=SC2086 # names are separate words
[ -z "$TASKS" ] || set -- --tasks $TASKS "$@"
for model in $MODELS; do
    set -- "$@" --model "$model"
done
finish "$VENV/bin/python" "$HERE/tools/evaluate.py" --config "$CONFIG" "$@"
