#!/bin/sh
# What the scripts of the project's top folder share: checks of settings, help, the environment, printing a command. It
# only defines functions. A script reads it from its own folder, so that it runs from any other:
#
#   HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
#   # shellcheck source=tools/script_common.sh
#   . "$HERE/tools/script_common.sh"
#
# Every script has the settings HERE, VENV and DRY_RUN, and its settings end at the line "# ---- end of settings ----".
set -eu

# fail SENTENCE: says what is wrong and leaves.
fail() {
    echo "error: $1" >&2
    exit 1
}

# setting NAME DEFAULT: keeps what the caller gave. The default gives way to a CONFIG file, where there is one.
setting() {
    eval "$1=\${$1:-}"
    [ -n "${CONFIG:-}" ] || eval "[ -n \"\$$1\" ] || $1=\$2"
}

# whole NAME LEAST: the setting is empty or a whole number from LEAST on.
whole() {
    value=''
    eval "value=\$$1"
    case $value in
    '') return ;;
    *[!0-9]*) ;;
    *) [ "$value" -lt "$2" ] || return 0 ;;
    esac
    fail "$1 is '$value', but it must be a whole number, at least $2"
}

# one_of NAME ALLOWED...: the setting is one of these words.
one_of() {
    name=$1 value=''
    eval "value=\$$1"
    shift
    for allowed in "$@"; do
        [ "$value" != "$allowed" ] || return 0
    done
    fail "$name is '$value', but it must be one of: $*"
}

# file_of NAME: the setting is empty or names a file.
file_of() {
    value=''
    eval "value=\$$1"
    [ -z "$value" ] || [ -f "$value" ] || fail "$1 names the file '$value', which does not exist"
}

# Where NNODES, NODE_RANK, MASTER_ADDR, DEVICE say that processes run.
check_machines() {
    one_of DEVICE auto cuda cpu
    whole NNODES 1
    whole NODE_RANK 0
    [ "$NODE_RANK" -lt "$NNODES" ] || fail "NODE_RANK is $NODE_RANK, but with NNODES=$NNODES it must be from 0 to $((NNODES - 1))"
    [ "$NNODES" -eq 1 ] || [ -n "$MASTER_ADDR" ] || fail "NNODES is $NNODES, so MASTER_ADDR must be the address of the machine with NODE_RANK=0"
}

# GPUs of this machine that DEVICE and CUDA_VISIBLE_DEVICES let a run use.
count_gpus() {
    if [ "$DEVICE" = cpu ] || ! command -v nvidia-smi >/dev/null 2>&1; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    fi
}

# Puts that number into gpus; none is an error where DEVICE asks for them.
find_gpus() {
    gpus=$(count_gpus)
    [ "$DEVICE" != cuda ] || [ "$gpus" -gt 0 ] || fail "DEVICE is cuda, but nvidia-smi lists no GPU on this machine: set DEVICE=cpu, or start it where the GPUs are"
}

# Processes on one machine without GPUs need not know its name, which does not always resolve.
use_loopback() {
    [ "$gpus" -gt 0 ] || [ ! -e /sys/class/net/lo ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
}

# Prints a command so that it can be pasted into a shell.
show() {
    line=''
    for word in "$@"; do
        case $word in
        *[!A-Za-z0-9_./:=,@%+-]* | '') word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        line="$line $word"
    done
    echo "${line# }"
}

# help_of TOOL ARGUMENTS...: where help is asked for, prints the settings at the top of the script, and leaves.
help_of() {
    tool=$1
    shift
    case " $* " in
    *' --help '* | *' -h '*) ;;
    *) return 0 ;;
    esac
    sed -n '2,/^# ---- end of settings/p' "$0" | grep -v -e '^set -eu' -e '^HERE=' -e '^# shellcheck' -e '^\. ' -e '---- end'
    echo "# Flags of $tool: $VENV/bin/python $HERE/$tool --help"
    exit 0
}

# Makes the environment, or brings it up to date; a dry run does not.
make_environment() {
    [ "$DRY_RUN" = 1 ] || VENV=$VENV sh "$HERE/run_install_environment.sh"
}

# finish COMMAND...: what the script is for, its last word; a dry run prints it.
finish() {
    if [ "$DRY_RUN" = 1 ]; then
        show "$@"
        exit 0
    fi
    exec "$@"
}
