#!/bin/sh
# Fine-tunes a model: LoRA adapters, or with METHOD the whole of it, its last layers, or its embeddings.
#
#   DATA=pairs.jsonl sh run_lora_finetune.sh                          the model of the demo of run_pretrain_gpt.sh learns to answer
#   MODEL=models/llama DATA=pairs.jsonl sh run_lora_finetune.sh       a Hugging Face folder, or a folder of checkpoints
#   MODEL=models/llama DATA=texts STAGE=pt sh run_lora_finetune.sh    continued pretraining on a folder of .txt files
#   METHOD=full MODEL=... DATA=... sh run_lora_finetune.sh --lr 1e-5  everything is trained
#   QUANTIZE=nf4 MODEL=... DATA=... sh run_lora_finetune.sh           the base in 4 bits
#   NPROC=8 PARALLEL=fsdp MODEL=... DATA=... sh run_lora_finetune.sh  8 GPUs share the weights (also ddp, zero0 to zero3, zero3_offload)
#   DRY_RUN=1 DATA=pairs.jsonl sh run_lora_finetune.sh                prints the commands and runs nothing
#
# Every setting below is a variable: NAME=value sh run_lora_finetune.sh. Arguments are passed on to tools/finetune.py,
# whose flags (its --help lists them) win over the variables. Run again, a training continues from its newest checkpoint.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tools/script_common.sh
. "$HERE/tools/script_common.sh"

# What is trained on what
CONFIG=${CONFIG:-}                   # YAML file of any flags of tools/finetune.py
MODEL=${MODEL:-}                     # base: a Hugging Face folder, a checkpoint or a folder of them; empty: the demo's
DATA=${DATA:-}                       # files, folders or patterns, separated by spaces
VALID_DATA=${VALID_DATA:-}           # the same, to evaluate on; empty: a twentieth of DATA
setting STAGE sft                    # sft: conversations; pt: texts
setting METHOD lora                  # lora, full, freeze or embeddings
setting TEMPLATE auto                # chat template: auto, chatml, alpaca, llama, llama3, qwen, or tokenizer for its own
TOKENIZER=${TOKENIZER:-}             # folder of a larger tokenizer; empty: the base's

# Adapters
setting LORA_RANK 8
setting LORA_ALPHA 16
setting LORA_DROPOUT 0.05
setting LORA_TARGETS auto            # names, auto (attention of the family) or all-linear
MODULES_TO_SAVE=${MODULES_TO_SAVE:-} # trained whole beside the adapters: "embed_tokens lm_head"
setting QUANTIZE none                # the frozen base in int8, nf4 or fp4

# Training
setting MAX_LENGTH 512               # tokens of a conversation at most, or of a block of text
setting MICRO_BATCH 4                # sequences in one forward pass of one process
setting GLOBAL_BATCH ''              # sequences in a step; empty: 16, or what the processes can share
setting EPOCHS 3                     # passes over the data
setting TRAIN_ITERS ''               # steps, instead of EPOCHS
setting LR ''                        # peak learning rate; empty: 2e-4 for lora, 2e-5 otherwise
setting PRECISION auto               # auto, fp32, bf16 or fp16
setting EVAL_INTERVAL ''             # steps between evaluations; empty: a tenth of the steps
setting SAVE_INTERVAL 200            # steps between checkpoints
setting LOG_INTERVAL 10              # steps between lines
setting KEEP_LAST 2                  # checkpoints that are kept
setting SEED 42

# Files
OUTPUT=${OUTPUT:-}                   # folder of the run: adapter/ or model/, report.json, curves/, checkpoints/; empty: runs/ and a name
IMG_LOG_DIR=${IMG_LOG_DIR:-}         # the picture of the curves; empty: OUTPUT/curves
TENSORBOARD_DIR=${TENSORBOARD_DIR:-} # for TensorBoard; empty: none

# Machines and processes
NPROC=${NPROC:-}                     # processes on this machine; empty: one for each GPU, one without GPUs
NNODES=${NNODES:-1}                  # machines
NODE_RANK=${NODE_RANK:-0}            # number of this machine, from 0
MASTER_ADDR=${MASTER_ADDR:-}         # address of machine 0; needed when there are several
MASTER_PORT=${MASTER_PORT:-29500}    # a free port there
PARALLEL=${PARALLEL:-ddp}            # ddp, fsdp, zero0, zero1, zero2, zero3, zero3_offload, or a file of accelerate
DEVICE=${DEVICE:-auto}               # auto, cuda or cpu

# This script
DRY_RUN=${DRY_RUN:-0}                # 1 prints the commands
VENV=${VENV:-"$HERE/.venv"}          # environment; made by run_install_environment.sh when it is not there
# ---- end of settings ----

check_settings() {
    one_of DRY_RUN 0 1
    check_machines
    one_of METHOD '' lora full freeze embeddings
    one_of STAGE '' sft pt
    one_of QUANTIZE '' none int8 nf4 fp4
    one_of PRECISION '' auto fp32 bf16 fp16
    whole NPROC 1
    whole MICRO_BATCH 1
    whole GLOBAL_BATCH 1
    whole TRAIN_ITERS 1
    whole LORA_RANK 1
    whole MAX_LENGTH 2
    file_of CONFIG
    case $PARALLEL in
    ddp | fsdp | zero0 | zero1 | zero2 | zero3 | zero3_offload) ;;
    *) [ -f "$PARALLEL" ] || fail "PARALLEL is '$PARALLEL', but it must be one of: ddp fsdp zero0 zero1 zero2 zero3 zero3_offload, or a file of accelerate" ;;
    esac
}

# given FLAG KEY ARGUMENTS...: is the flag among the arguments, or the key in the CONFIG file?
given() {
    flag=$1
    [ -z "$CONFIG" ] || ! grep -q "^ *$2:" "$CONFIG" || return 0
    shift 2
    for argument in "$@"; do
        case $argument in "$flag" | "$flag="*) return 0 ;; esac
    done
    return 1
}

# The base and the data, when the caller did not say; and where the run goes: different runs get different folders,
# because a run continues from the checkpoint that it finds.
choose_files() {
    if [ -z "$MODEL" ] && ! given --model model "$@"; then
        MODEL="$HERE/demo/checkpoint"
        [ "$DRY_RUN" = 1 ] || [ -d "$MODEL" ] || fail "MODEL is not set and there is no demo model: run sh run_pretrain_gpt.sh first, or name a Hugging Face folder with MODEL"
    fi
    [ -n "$DATA" ] || given --train-data train_data "$@" || given --data train-data "$@" || fail "DATA is not set: name files, folders or patterns to train on, as in DATA=pairs.jsonl"
    if [ -z "$OUTPUT" ] && ! given --save save "$@"; then
        name=${MODEL%/}
        name=${name##*/}
        [ "$MODEL" != "$HERE/demo/checkpoint" ] || name=demo
        kind=${CONFIG##*/}
        kind=${kind%.*}
        OUTPUT="$HERE/runs/${name:-model}-${kind:-$METHOD-$STAGE}"
    fi
}

help_of tools/finetune.py "$@"
check_settings
choose_files "$@"
find_gpus
if [ -z "$NPROC" ]; then
    [ "$gpus" -gt 0 ] && NPROC=$gpus || NPROC=1
fi
[ "$PARALLEL" = ddp ] || [ "$gpus" -gt 0 ] || [ "$DRY_RUN" = 1 ] || fail "PARALLEL is '$PARALLEL', which needs GPUs, and nvidia-smi lists none here: leave it out"
make_environment

# The flags, last to first: each goes before those that are there, and of two the last one counts.
[ -z "$TENSORBOARD_DIR" ] || set -- --tensorboard-dir "$TENSORBOARD_DIR" "$@"
[ -z "$IMG_LOG_DIR" ] || set -- --img-log-dir "$IMG_LOG_DIR" "$@"
[ -z "$OUTPUT" ] || set -- --save "$OUTPUT" "$@"
[ -z "$SEED" ] || set -- --seed "$SEED" "$@"
[ -z "$KEEP_LAST" ] || set -- --keep-last "$KEEP_LAST" "$@"
[ -z "$LOG_INTERVAL" ] || set -- --log-interval "$LOG_INTERVAL" "$@"
[ -z "$SAVE_INTERVAL" ] || set -- --save-interval "$SAVE_INTERVAL" "$@"
[ -z "$EVAL_INTERVAL" ] || set -- --eval-interval "$EVAL_INTERVAL" "$@"
[ -z "$PRECISION" ] || set -- --precision "$PRECISION" "$@"
[ -z "$LR" ] || set -- --lr "$LR" "$@"
[ -z "$TRAIN_ITERS" ] || set -- --train-iters "$TRAIN_ITERS" "$@"
[ -z "$EPOCHS" ] || set -- --epochs "$EPOCHS" "$@"
[ -z "$GLOBAL_BATCH" ] || set -- --global-batch-size "$GLOBAL_BATCH" "$@"
[ -z "$MICRO_BATCH" ] || set -- --micro-batch-size "$MICRO_BATCH" "$@"
[ -z "$MAX_LENGTH" ] || set -- --max-length "$MAX_LENGTH" "$@"
[ -z "$QUANTIZE" ] || set -- --quantize "$QUANTIZE" "$@"
# shellcheck disable=SC2086 # names are separate words
[ -z "$MODULES_TO_SAVE" ] || set -- --modules-to-save $MODULES_TO_SAVE "$@"
# shellcheck disable=SC2086
[ -z "$LORA_TARGETS" ] || set -- --lora-targets $LORA_TARGETS "$@"
[ -z "$LORA_DROPOUT" ] || set -- --lora-dropout "$LORA_DROPOUT" "$@"
[ -z "$LORA_ALPHA" ] || set -- --lora-alpha "$LORA_ALPHA" "$@"
[ -z "$LORA_RANK" ] || set -- --lora-rank "$LORA_RANK" "$@"
[ -z "$TOKENIZER" ] || set -- --tokenizer "$TOKENIZER" "$@"
[ -z "$TEMPLATE" ] || set -- --template "$TEMPLATE" "$@"
[ "$DEVICE" = auto ] || set -- --device "$DEVICE" "$@"
[ -z "$METHOD" ] || set -- --method "$METHOD" "$@"
[ -z "$STAGE" ] || set -- --stage "$STAGE" "$@"
# shellcheck disable=SC2086 # files are separate words
[ -z "$VALID_DATA" ] || set -- --valid-data $VALID_DATA "$@"
# shellcheck disable=SC2086
[ -z "$DATA" ] || set -- --train-data $DATA "$@"
[ -z "$MODEL" ] || set -- --model "$MODEL" "$@"
[ -z "$CONFIG" ] || set -- --config "$CONFIG" "$@"
set -- "$HERE/tools/finetune.py" "$@"

python="$VENV/bin/python"
# megatron_llm.training.launch is torchrun, with its arguments; it only tells a failure once.
if [ "$PARALLEL" != ddp ]; then
    case $PARALLEL in *[./]*) file=$PARALLEL ;; *) file="$HERE/examples/finetune/$PARALLEL.yaml" ;; esac
    [ "$NNODES" -eq 1 ] || set -- --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@"
    set -- "$python" -m accelerate.commands.launch --config_file "$file" --num_machines "$NNODES" --machine_rank "$NODE_RANK" \
        --num_processes $((NNODES * NPROC)) "$@"
elif [ "$NNODES" -gt 1 ]; then
    set -- "$python" -m megatron_llm.training.launch --nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" \
        --master-port "$MASTER_PORT" --nproc-per-node "$NPROC" "$@"
elif [ "$NPROC" -gt 1 ]; then
    set -- "$python" -m megatron_llm.training.launch --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" "$@"
    use_loopback
else
    set -- "$python" "$@"
fi
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
finish "$@"
