#!/bin/sh
# Merges LoRA adapters into their base and proves it: a Hugging Face folder that needs neither peft nor the adapters.
#
#   ADAPTERS=runs/assistant/adapter sh merge.sh               the base that the adapter names, to runs/assistant/hf_ckpt
#   BASE=models/llama ADAPTERS="runs/a/adapter runs/b/adapter" WEIGHTS="1 0.5" SAVE=models/merged sh merge.sh
#   BASE=demo/checkpoint ADAPTERS=runs/demo-lora-sft/adapter sh merge.sh         the base is a checkpoint of the pretraining
#   DRY_RUN=1 ADAPTERS=... sh merge.sh                        prints the command and runs nothing
#
# Every setting below is a variable: NAME=value sh merge.sh. Arguments are passed on to tools/merge_lora.py, whose flags win.
# Run again with the same files it says that the folder is up to date. The folders of base and adapters are only read.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tools/script_common.sh
. "$HERE/tools/script_common.sh"

BASE=${BASE:-}                       # Hugging Face folder or checkpoint; empty: the folder that the first adapter names
ADAPTERS=${ADAPTERS:-}               # adapter folders of peft, separated by spaces, merged in this order
WEIGHTS=${WEIGHTS:-}                 # a number for each adapter; empty: 1 each
SAVE=${SAVE:-}                       # folder to make; empty: hf_ckpt beside the last adapter
DTYPE=${DTYPE:-}                     # float32, bfloat16 or float16; empty: as the base's
MAX_SHARD_SIZE=${MAX_SHARD_SIZE:-5GB} # size of one file of weights at most
VERIFY=${VERIFY:-1}                  # 1 compares logits with base and adapters, layer by layer where that can be done; 0 does not
OVERWRITE=${OVERWRITE:-0}            # 1 replaces SAVE even when it holds something else than an earlier merge

# This script
DRY_RUN=${DRY_RUN:-0}                # 1 prints the command
VENV=${VENV:-"$HERE/.venv"}          # environment; made by run_install_environment.sh when it is not there
# ---- end of settings ----

help_of tools/merge_lora.py "$@"
one_of DRY_RUN 0 1
one_of VERIFY 0 1
one_of OVERWRITE 0 1
one_of DTYPE '' float32 bfloat16 float16

# The last adapter: of the variable, or of the arguments, which come after it.
last='' previous=''
for adapter in $ADAPTERS; do
    last=$adapter
done
for argument in "$@"; do
    [ "$previous" != --adapter ] || last=$argument
    case $argument in --adapter=*) last=${argument#--adapter=} ;; esac
    previous=$argument
done
[ -n "$last" ] || fail "no adapter was given: ADAPTERS=runs/assistant/adapter sh merge.sh"
SAVE=${SAVE:-"$(dirname -- "$last")/hf_ckpt"}

# The flags, last to first: each goes before those that are there, and of two the last one counts.
set -- --save "$SAVE" --max-shard-size "$MAX_SHARD_SIZE" "$@"
[ "$OVERWRITE" = 0 ] || set -- --overwrite "$@"
[ "$VERIFY" = 1 ] || set -- --no-verify "$@"
[ -z "$DTYPE" ] || set -- --dtype "$DTYPE" "$@"
reversed=''
for weight in $WEIGHTS; do
    reversed="$weight $reversed"
done
for weight in $reversed; do
    set -- --weight "$weight" "$@"
done
reversed=''
for adapter in $ADAPTERS; do
    reversed="$adapter $reversed"
done
for adapter in $reversed; do
    set -- --adapter "$adapter" "$@"
done
[ -z "$BASE" ] || set -- --base "$BASE" "$@"

make_environment
finish "$VENV/bin/python" "$HERE/tools/merge_lora.py" "$@"
