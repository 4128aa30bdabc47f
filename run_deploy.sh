#!/bin/sh
# Serves a model: OpenAI-style completions and chat, a chat page in the browser, health and metrics.
#
#   MODEL=demo/hf sh run_deploy.sh                              the page at http://127.0.0.1:8000/, clients at .../v1
#   MODEL=merged API_KEY=my-key HOST=0.0.0.0 sh run_deploy.sh   for other machines, with a key
#   MODEL=base ADAPTER=lora sh run_deploy.sh                    a base model with a LoRA adapter (several: "one two")
#   MODEL=demo/checkpoint sh run_deploy.sh                      the newest checkpoint of a training
#   MODEL=merged sh run_deploy.sh --check                       starts, asks, stops; fails when an answer never ends
#   DRY_RUN=1 MODEL=demo/hf sh run_deploy.sh                    prints the command and runs nothing
#
# Every setting below is a variable: NAME=value sh run_deploy.sh. Arguments are passed on to tools/serve.py, whose flags win
# over the variables. The server runs until Ctrl-C or a SIGTERM, which lets running answers end.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tools/script_common.sh
. "$HERE/tools/script_common.sh"

# Model
MODEL=${MODEL:-}                     # Hugging Face folder, checkpoint or folder of them, or LoRA adapter whose base is here
ADAPTER=${ADAPTER:-}                 # LoRA adapters to apply to MODEL, in this order
NAME=${NAME:-}                       # name that requests give; empty: the folder's
CHAT_TEMPLATE=${CHAT_TEMPLATE:-}     # Jinja file to use in place of the tokenizer's template

# Engine
ENGINE=${ENGINE:-auto}               # vllm, transformers, or auto: vLLM where it and a GPU are present
DEVICE=${DEVICE:-auto}               # auto, cpu, cuda, cuda:1, ...
DTYPE=${DTYPE:-auto}                 # auto (as saved), float32, bfloat16 or float16
QUANTIZE=${QUANTIZE:-none}           # int8 or int4 by bitsandbytes, or none

# Address. The key comes from the environment alone: API_KEY=... (unset: everybody who reaches the port may ask)
HOST=${HOST:-127.0.0.1}              # 0.0.0.0 is every address of this machine
PORT=${PORT:-8000}                   # with vLLM the chat page is on the next port
ENDPOINTS=${ENDPOINTS:-}             # other OpenAI-style servers for the chat page, NAME=URL, separated by spaces

# Limits; a request beyond them gets status 400, 413, 429 or 504 and a sentence
MAX_PROMPT_TOKENS=${MAX_PROMPT_TOKENS:-} # longest prompt; empty: what the model's context leaves
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-1024}   # longest answer
MAX_BODY_BYTES=${MAX_BODY_BYTES:-1048576} # largest request
MAX_RUNNING=${MAX_RUNNING:-32}       # answers computed at once
MAX_WAITING=${MAX_WAITING:-64}       # answers that may wait for that
MAX_SECONDS=${MAX_SECONDS:-600}      # time for a request, waiting included

# This script
DRY_RUN=${DRY_RUN:-0}                # 1 prints the command
VENV=${VENV:-"$HERE/.venv"}          # environment; made by run_install_environment.sh when it is not there
# ---- end of settings ----

help_of tools/serve.py "$@"
model_given=$MODEL
for argument in "$@"; do
    case $argument in --model | --model=*) model_given=$argument ;; esac
done
[ -n "$model_given" ] || fail "MODEL is empty, so there is nothing to serve: MODEL=folder sh run_deploy.sh (--help shows all settings)"
[ -z "$MODEL" ] || [ -d "$MODEL" ] || [ "$DRY_RUN" = 1 ] || fail "MODEL is '$MODEL', but there is no such folder"
one_of DRY_RUN 0 1
one_of ENGINE auto transformers vllm
one_of DTYPE auto float32 bfloat16 float16
one_of QUANTIZE none int8 int4
whole PORT 0
whole MAX_PROMPT_TOKENS 1
whole MAX_NEW_TOKENS 1
whole MAX_BODY_BYTES 1
whole MAX_RUNNING 1
whole MAX_WAITING 0
whole MAX_SECONDS 1
if [ ! -x "$VENV/bin/python" ]; then
    export EXTRAS="${EXTRAS:-dev,serve,finetune}"
    make_environment
fi

# The flags, last to first: each goes before those that are there, and of two the last one counts.
[ "$QUANTIZE" = none ] || set -- --quantize "$QUANTIZE" "$@"
[ "$DTYPE" = auto ] || set -- --dtype "$DTYPE" "$@"
[ "$DEVICE" = auto ] || set -- --device "$DEVICE" "$@"
for endpoint in $ENDPOINTS; do
    set -- --endpoint "$endpoint" "$@"
done
[ -z "$MAX_PROMPT_TOKENS" ] || set -- --max-prompt-tokens "$MAX_PROMPT_TOKENS" "$@"
set -- --max-new-tokens "$MAX_NEW_TOKENS" --max-body-bytes "$MAX_BODY_BYTES" --max-running "$MAX_RUNNING" \
    --max-waiting "$MAX_WAITING" --max-seconds "$MAX_SECONDS" "$@"
set -- --engine "$ENGINE" --host "$HOST" --port "$PORT" "$@"
[ -z "$CHAT_TEMPLATE" ] || set -- --chat-template "$CHAT_TEMPLATE" "$@"
[ -z "$NAME" ] || set -- --served-model-name "$NAME" "$@"
# shellcheck disable=SC2086 # adapters are separate words
[ -z "$ADAPTER" ] || set -- --adapter $ADAPTER "$@"
[ -z "$MODEL" ] || set -- --model "$MODEL" "$@"
finish "$VENV/bin/python" "$HERE/tools/serve.py" "$@"
