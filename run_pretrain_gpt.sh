#!/bin/sh
# Pretrains a language model on this machine, or as one node of many: a new one, or on from weights.
#
#   sh run_pretrain_gpt.sh                                      the demo: corpus, tokenizer, training, curves, export, a sample
#   DATA_PATH=my/corpus_text_document sh run_pretrain_gpt.sh    trains on your data (tools/preprocess_data.py makes it)
#   CONFIG=examples/pretrain_gpt/gpt2-124m.yaml DATA_PATH=... sh run_pretrain_gpt.sh --lr 1e-4
#   DATA_PATH=my/corpus_text_document sh run_pretrain_gpt.sh --load FOLDER    goes on from a Hugging Face folder or a checkpoint
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 ... sh run_pretrain_gpt.sh      on each of four machines, with its own NODE_RANK
#   DRY_RUN=1 sh run_pretrain_gpt.sh                            prints the commands and runs nothing
#
# Every setting below is a variable: NAME=value sh run_pretrain_gpt.sh. Arguments are passed on to tools/pretrain.py,
# whose flags (docs/config.md) win over the variables. Run again, a training continues from its newest checkpoint.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tools/script_common.sh
. "$HERE/tools/script_common.sh"

# model_setting NAME DEFAULT [DEFAULT WITH WEIGHTS]: as setting, but a run that starts from weights takes the model from their
# folder, and does not unlearn it with a new model's learning rate.
loading=${LOAD:-}
for argument in "$@"; do
    case $argument in --load | --load=*) loading=given ;; esac
done
model_setting() {
    if [ -n "$loading" ]; then setting "$1" "${3:-}"; else setting "$1" "$2"; fi
}

# Machines and processes
NNODES=${NNODES:-1}                  # machines
NODE_RANK=${NODE_RANK:-0}            # number of this machine, from 0
MASTER_ADDR=${MASTER_ADDR:-}         # address of machine 0; needed when there are several
MASTER_PORT=${MASTER_PORT:-29500}    # a free port there (one machine alone takes any free port)
GPUS_PER_NODE=${GPUS_PER_NODE:-}     # processes on each machine; default: its GPUs, without any TP x PP
DEVICE=${DEVICE:-auto}               # auto, cuda or cpu
TP=${TP:-}                           # ranks a layer is split over; default 1 (demo: 2, or what the GPUs allow)
PP=${PP:-}                           # pipeline stages; default 1 (demo: 2, or what the GPUs allow)
VPP=${VPP:-}                         # model chunks on each pipeline rank; default 1

# Model and training; CONFIG is a YAML file of any flags, examples/pretrain_gpt has some
CONFIG=${CONFIG:-}
model_setting MODEL llama            # family: llama, gpt, mistral, qwen2, qwen3, ... (docs/config.md)
model_setting NUM_LAYERS 4           # transformer blocks
model_setting HIDDEN_SIZE 256        # width
model_setting NUM_HEADS 8            # attention heads
model_setting NUM_QUERY_GROUPS ''    # key/value heads; empty: as many as attention heads
setting SEQ_LENGTH 128               # tokens in a sequence
setting MICRO_BATCH 4                # sequences in one forward pass of one rank
setting GLOBAL_BATCH ''              # sequences in a step; empty: MICRO_BATCH x data-parallel ranks x 2, demo 16
setting TRAIN_ITERS 240              # steps
model_setting LR 2e-3 2e-5           # peak learning rate; from weights the second
model_setting MIN_LR 2e-4 2e-6       # its end
setting WARMUP_ITERS ''              # steps of warm-up; empty: a tenth of TRAIN_ITERS
setting PRECISION ''                 # fp32, bf16 or fp16; empty: bf16 on GPUs, fp32 on a CPU
setting EVAL_INTERVAL 60             # steps between evaluations
setting EVAL_ITERS 4                 # batches in one evaluation
setting SAVE_INTERVAL 120            # steps between checkpoints
setting LOG_INTERVAL 10              # steps between lines
setting SEED 1234

# Files
DATA_PATH=${DATA_PATH:-}             # prefix of .bin/.idx, or "weight prefix weight prefix"; empty: the demo's corpus
LOAD=${LOAD:-}                       # Hugging Face folder or checkpoint to start from; the model's sizes are then the folder's
TOKENIZER_MODEL=${TOKENIZER_MODEL:-} # tokenizer folder or file, copied into exports; empty: the one stamped beside the data
OUTPUT=${OUTPUT:-}                   # folder of all that is written; empty: demo, or runs/ and the name of CONFIG or the data
CHECKPOINT_PATH=${CHECKPOINT_PATH:-} # empty: OUTPUT/checkpoint
IMG_LOG_DIR=${IMG_LOG_DIR:-}         # the picture of the curves; empty: OUTPUT/curves
EXPORT_PATH=${EXPORT_PATH:-}         # the Hugging Face export after training; empty: demo OUTPUT/hf, otherwise no export
VOCAB_SIZE=${VOCAB_SIZE:-2048}       # of the tokenizer that the demo trains
PROMPT=${PROMPT:-The list type}      # what the trained model continues, when it is exported

# This script
DRY_RUN=${DRY_RUN:-0}                # 1 prints the commands
VENV=${VENV:-"$HERE/.venv"}          # environment; made by run_install_environment.sh when it is not there
SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-120} # seconds that the ranks get to save after a SIGTERM
# ---- end of settings ----

# step NAME RESULT COMMAND...: runs the command, unless RESULT is there and the same commands made it.
made_by=''
step() {
    name=$1 result=$2
    shift 2
    made_by="$made_by$(show "$@")
"
    if [ "$DRY_RUN" = 1 ]; then
        show "$@"
    elif [ -e "$result" ] && [ "$(cat "$OUTPUT/.steps/$name" 2>/dev/null)" = "${made_by%?}" ]; then
        echo "== $name: $result is there"
    else
        echo "== $name"
        forwarding_signals "$@"
        mkdir -p "$OUTPUT/.steps"
        printf '%s' "${made_by%?}" >"$OUTPUT/.steps/$name"
    fi
}

# Runs a command to its end; a SIGTERM or Ctrl-C goes on to it, so that training can save before it leaves.
forwarding_signals() {
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true; signalled=1' TERM INT HUP
    signalled=1
    while [ -n "$signalled" ]; do # a signal ends the wait, not the command
        signalled='' status=0
        wait "$child" || status=$?
    done
    trap - TERM INT HUP
    [ "$status" -eq 0 ] || exit "$status"
}

check_settings() {
    one_of DRY_RUN 0 1
    check_machines
    one_of PRECISION '' fp32 bf16 fp16
    whole GPUS_PER_NODE 1
    whole TP 1
    whole PP 1
    whole VPP 1
    whole MICRO_BATCH 1
    whole GLOBAL_BATCH 1
    whole TRAIN_ITERS 1
    whole WARMUP_ITERS 0
    file_of CONFIG
}

# Is this the demo? Yes when nothing says where other data or settings come from.
is_demo() {
    [ -z "$DATA_PATH$CONFIG$loading" ] || return 1
    for argument in "$@"; do
        case $argument in
        --data-path | --data-path=* | --mock-data | --config | --config=*) return 1 ;;
        esac
    done
}

# Where everything goes, when the caller did not say. Runs of different data or settings get different folders, because a
# run continues from the checkpoint that it finds.
choose_folders() {
    if [ "$demo" = 1 ]; then
        OUTPUT=${OUTPUT:-"$HERE/demo"}
        DATA_PATH="$OUTPUT/data/corpus_text_document"
        TOKENIZER_MODEL="$OUTPUT/tokenizer"
        EXPORT_PATH=${EXPORT_PATH:-"$OUTPUT/hf"}
    elif [ -z "$OUTPUT" ]; then
        run=${CONFIG:-${DATA_PATH:-run}}
        run=${run##*/}
        OUTPUT="$HERE/runs/${run%.y*ml}"
    fi
    CHECKPOINT_PATH=${CHECKPOINT_PATH:-"$OUTPUT/checkpoint"}
    IMG_LOG_DIR=${IMG_LOG_DIR:-"$OUTPUT/curves"}
}

# Number of processes, layout, batch, precision: what was not given.
choose_layout() {
    find_gpus
    if [ "$demo" = 1 ]; then
        [ "$gpus" -gt 0 ] && ranks=${GPUS_PER_NODE:-$gpus} || ranks=${GPUS_PER_NODE:-4}
        [ -n "$TP" ] || { [ $((ranks % 2)) -eq 0 ] && TP=2 || TP=1; }
        [ -n "$PP" ] || { [ $((ranks % (2 * TP))) -eq 0 ] && PP=2 || PP=1; }
    elif [ -z "$CONFIG" ]; then
        TP=${TP:-1} PP=${PP:-1}
    fi
    if [ -z "$GPUS_PER_NODE" ] && [ "$gpus" -gt 0 ]; then
        GPUS_PER_NODE=$gpus
    elif [ -z "$GPUS_PER_NODE" ]; then
        [ -n "$TP$PP" ] || [ -z "$CONFIG" ] || fail "there is no GPU here and CONFIG may set the layout: say how many processes to start with GPUS_PER_NODE"
        GPUS_PER_NODE=$((${TP:-1} * ${PP:-1}))
    fi
    if [ -z "$CONFIG" ]; then
        world=$((NNODES * GPUS_PER_NODE))
        [ $((world % (TP * PP))) -eq 0 ] || fail "$NNODES x $GPUS_PER_NODE processes cannot be laid out as TP=$TP x PP=$PP: the number of processes must be a multiple of $((TP * PP))"
        dp=$((world / (TP * PP)))
        if [ -z "$GLOBAL_BATCH" ] && [ "$demo" = 1 ] && [ $((16 % (MICRO_BATCH * dp))) -eq 0 ]; then
            GLOBAL_BATCH=16
        fi
        GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * dp * 2))}
        WARMUP_ITERS=${WARMUP_ITERS:-$((TRAIN_ITERS / 10))}
        [ -n "$PRECISION" ] || { [ "$gpus" -gt 0 ] && PRECISION=bf16 || PRECISION=fp32; }
    fi
}

help_of tools/pretrain.py "$@"
check_settings
is_demo "$@" && demo=1 || demo=0
[ "$demo" = 0 ] || [ "$NNODES" -eq 1 ] || fail "the demo runs on one machine: for a run on $NNODES give DATA_PATH, and perhaps CONFIG"
choose_folders
choose_layout
started=$(date +%s)
python="$VENV/bin/python"
make_environment

# The flags of the training, last to first: each goes before those that are there, and of two the last one counts.
set -- --save "$CHECKPOINT_PATH" --auto-resume --img-log-dir "$IMG_LOG_DIR" "$@"
[ -z "$LOAD" ] || set -- --load "$LOAD" "$@"
[ -z "$TOKENIZER_MODEL" ] || set -- --tokenizer-model "$TOKENIZER_MODEL" "$@"
# shellcheck disable=SC2086 # weights and prefixes are separate words
[ -z "$DATA_PATH" ] || set -- --data-path $DATA_PATH "$@"
[ -z "$SEED" ] || set -- --seed "$SEED" "$@"
[ -z "$LOG_INTERVAL" ] || set -- --log-interval "$LOG_INTERVAL" "$@"
[ -z "$SAVE_INTERVAL" ] || set -- --save-interval "$SAVE_INTERVAL" "$@"
[ -z "$EVAL_INTERVAL" ] || set -- --eval-interval "$EVAL_INTERVAL" "$@"
[ -z "$EVAL_ITERS" ] || set -- --eval-iters "$EVAL_ITERS" "$@"
case $PRECISION in bf16 | fp16) set -- "--$PRECISION" "$@" ;; esac
[ -z "$WARMUP_ITERS" ] || set -- --lr-warmup-iters "$WARMUP_ITERS" "$@"
[ -z "$MIN_LR" ] || set -- --min-lr "$MIN_LR" "$@"
[ -z "$LR" ] || set -- --lr "$LR" "$@"
[ -z "$TRAIN_ITERS" ] || set -- --train-iters "$TRAIN_ITERS" "$@"
[ -z "$GLOBAL_BATCH" ] || set -- --global-batch-size "$GLOBAL_BATCH" "$@"
[ -z "$MICRO_BATCH" ] || set -- --micro-batch-size "$MICRO_BATCH" "$@"
[ -z "$SEQ_LENGTH" ] || set -- --seq-length "$SEQ_LENGTH" "$@"
[ -z "$NUM_QUERY_GROUPS" ] || set -- --num-query-groups "$NUM_QUERY_GROUPS" "$@"
[ -z "$NUM_HEADS" ] || set -- --num-attention-heads "$NUM_HEADS" "$@"
[ -z "$HIDDEN_SIZE" ] || set -- --hidden-size "$HIDDEN_SIZE" "$@"
[ -z "$NUM_LAYERS" ] || set -- --num-layers "$NUM_LAYERS" "$@"
[ -z "$MODEL" ] || set -- --model "$MODEL" "$@"
[ "$DEVICE" = auto ] || set -- --device "$DEVICE" "$@"
[ -z "$VPP" ] || set -- --virtual-pipeline-model-parallel-size "$VPP" "$@"
[ -z "$PP" ] || set -- --pipeline-model-parallel-size "$PP" "$@"
[ -z "$TP" ] || set -- --tensor-model-parallel-size "$TP" "$@"
[ -z "$CONFIG" ] || set -- --config "$CONFIG" "$@"

# A bad value is told now, in one sentence, not by every rank.
if [ "$DRY_RUN" = 0 ] || [ -e "$VENV/.installed" ]; then
    "$python" "$HERE/tools/check_config.py" --world-size $((NNODES * GPUS_PER_NODE)) "$@" >/dev/null
fi

# megatron_llm.training.launch is torchrun, with its arguments; it only tells a failure once.
if [ "$NNODES" -eq 1 ]; then
    set -- --standalone --local-addr 127.0.0.1 --nnodes 1 --nproc-per-node "$GPUS_PER_NODE" "$HERE/tools/pretrain.py" "$@"
    use_loopback
else
    set -- --nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --nproc-per-node "$GPUS_PER_NODE" "$HERE/tools/pretrain.py" "$@"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$SHUTDOWN_TIMEOUT"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

if [ "$demo" = 1 ]; then
    step corpus "$OUTPUT/corpus.jsonl" "$python" "$HERE/tools/make_demo_corpus.py" --output "$OUTPUT/corpus.jsonl"
    step tokenizer "$OUTPUT/tokenizer/tokenizer.json" "$python" "$HERE/tools/train_tokenizer.py" --input "$OUTPUT/corpus.jsonl" \
        --output "$OUTPUT/tokenizer" --vocab-size "$VOCAB_SIZE"
    step preprocessing "$DATA_PATH.idx" "$python" "$HERE/tools/preprocess_data.py" --input "$OUTPUT/corpus.jsonl" \
        --output-prefix "$OUTPUT/data/corpus" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUTPUT/tokenizer" --append-eod
    step training "$CHECKPOINT_PATH/step_$(printf %07d "$TRAIN_ITERS")" "$python" -m megatron_llm.training.launch "$@"
elif [ "$DRY_RUN" = 1 ]; then
    show "$python" -m megatron_llm.training.launch "$@"
elif [ -n "$EXPORT_PATH" ]; then
    forwarding_signals "$python" -m megatron_llm.training.launch "$@"
else
    exec "$python" -m megatron_llm.training.launch "$@"
fi

if [ "$NODE_RANK" -eq 0 ] && [ -n "$EXPORT_PATH" ]; then
    step export "$EXPORT_PATH/conversion_report.json" "$python" "$HERE/tools/convert_checkpoint.py" \
        --load "$CHECKPOINT_PATH" --save "$EXPORT_PATH" --to hf
    set -- "$python" "$HERE/tools/generate.py" --load "$CHECKPOINT_PATH" --prompt "$PROMPT" --max-new-tokens 60 --temperature 0.7 --top-k 40
    if [ "$DRY_RUN" = 1 ]; then
        show "$@"
        exit 0
    fi
    echo "== sample"
    "$@"
    shorten=
    [ "$PWD" != "$HERE" ] || shorten="s#$HERE/##g" # paths are shown from here
    sed "$shorten" <<END

Done in $(($(date +%s) - started)) s. What lies where:
  $CHECKPOINT_PATH    checkpoints, and log.jsonl with one line a step
  $IMG_LOG_DIR    a picture: loss, validation, learning rate, gradient norm, speed
  $EXPORT_PATH    the model for transformers: AutoModelForCausalLM.from_pretrained("$EXPORT_PATH")
What to type next:
  $(show "$python" "$HERE/tools/generate.py" --load "$CHECKPOINT_PATH" --prompt "A tuple is")
  TRAIN_ITERS=$((${TRAIN_ITERS:-100} * 2)) sh $0    trains on from here
  sh $0 --help    all settings; README.md: your own data, other sizes, several machines
END
fi
