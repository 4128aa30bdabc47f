#!/bin/sh
# Makes the environments of the peers that the benchmark compares with: each its own, versions pinned, torch first.
#
#   sh benchmarks/peers/install.sh                      all of them, into ~/.cache/megatron_llm-bench
#   sh benchmarks/peers/install.sh transformers litgpt  only these
#   PEERS_DIR=/data/peers sh benchmarks/peers/install.sh
#
# One that is there already is left alone. One that cannot be installed is said at the end, and the others are made all
# the same; the benchmark then writes a row that says why it did not run.
set -eu

PEERS_DIR=${PEERS_DIR:-"${XDG_CACHE_HOME:-$HOME/.cache}/megatron_llm-bench"} # where the environments go
PYTHON=${PYTHON:-python3}                # the interpreter they are made with
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}  # the same torch for all; ask for a CPU build where the index has several
# ---- end of settings ----

packages_of() {
    case $1 in
    transformers) echo "transformers==5.23.0" ;;
    litgpt) echo "litgpt==0.5.13" ;;
    megatron-core) echo "megatron-core==0.16.1 transformers==5.23.0 datasets==5.2.0 gigatoken==0.10.0" ;; # with what its data flow needs
    deepspeed) echo "deepspeed==0.19.8 transformers==5.23.0 ninja" ;;
    *)
        echo "error: no peer is called '$1': there are transformers, litgpt, megatron-core and deepspeed" >&2
        return 1
        ;;
    esac
}

# install NAME: its environment under PEERS_DIR. The stamp is written last: what is half made is made again.
install() {
    packages=$(packages_of "$1")
    folder="$PEERS_DIR/$1"
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$TORCH_SPEC $packages" ]; then
        echo "== $1: there"
        return 0
    fi
    echo "== $1: $packages"
    [ -x "$folder/bin/python" ] || "$PYTHON" -m venv "$folder" || return 1
    "$folder/bin/python" -m pip install -q "$TORCH_SPEC" numpy setuptools wheel || return 1
    "$folder/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$folder/constraints.txt" || return 1
    # shellcheck disable=SC2086 # several packages
    DS_BUILD_OPS=0 "$folder/bin/python" -m pip install -q -c "$folder/constraints.txt" --no-build-isolation $packages || return 1
    echo "$TORCH_SPEC $packages" >"$folder/.installed"
}

case " $* " in
*' --help '* | *' -h '*)
    sed -n '2,/^# ---- end of settings/p' "$0" | grep -v -e '^set -eu' -e '---- end'
    exit 0
    ;;
esac
[ $# -gt 0 ] || set -- transformers litgpt megatron-core deepspeed
for name in "$@"; do
    packages_of "$name" >/dev/null
done
mkdir -p "$PEERS_DIR"
failed=''
for name in "$@"; do
    install "$name" || failed="$failed $name"
done
[ -z "$failed" ] || {
    echo "error: not installed:$failed (see above); the benchmark runs without them" >&2
    exit 1
}
