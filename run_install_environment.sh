#!/bin/sh
# Makes the Python environment of the project and installs everything into it. Safe to run again: when nothing that it
# installs from has changed, it says so and leaves.
#
#   sh run_install_environment.sh
#   VENV=/path/to/env PYTHON=python3.12 sh run_install_environment.sh
#
# What it does: a virtual environment; torch first (one that is already installed is kept); then the package, editable,
# with the versions of requirements/lock.txt and the C++ extension built in place. Without a C++ compiler the package
# works the same through numpy, only slower when it builds the index of a large corpus.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

VENV=${VENV:-"$HERE/.venv"}             # folder of the environment
PYTHON=${PYTHON:-}                      # interpreter to make it with (default: the first of python3, python3.11 ... 3.13 that fits)
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0} # what pip is asked for when no torch is installed yet
EXTRAS=${EXTRAS:-dev}                   # extras of pyproject.toml, separated by commas; dev is what the tests need
LOCK=${LOCK:-"$HERE/requirements/lock.txt"} # exact versions; LOCK=/dev/null takes the newest that pyproject.toml allows
DRY_RUN=${DRY_RUN:-0}                   # 1 prints what would be done

fail() {
    echo "error: $1" >&2
    exit 1
}

# By whatever name it is given, it is the same environment.
case $VENV in
/*) ;;
*) VENV=${PWD%/}/$VENV ;;
esac

# One number over everything that decides what gets installed.
fingerprint() {
    {
        cat "$HERE/pyproject.toml" "$HERE/setup.py" "$LOCK" "$HERE"/requirements/test-no-deps.txt
        find "$HERE/csrc" -type f ! -name '*.md' -exec cat {} +
        echo "$HERE $VENV $TORCH_SPEC $EXTRAS $(command -v c++ || command -v g++ || command -v clang++ || echo none)"
    } 2>/dev/null | cksum
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 was found (looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11}): install one, or name it, PYTHON=/path/to/python3.11"
}

# Folder of the torch that an interpreter sees, nothing when it has none.
torch_folder() {
    "$1" -c 'import importlib.util as u, pathlib; s = u.find_spec("torch"); print(pathlib.Path(s.origin).parents[1] if s and s.origin else "")'
}

torch_version() {
    "$1" -c 'from importlib.metadata import version; print(version("torch"))' ||
        fail "the torch in $(torch_folder "$1") does not tell its version: repair or remove it, then run this again"
}

make_venv() {
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$("$python" --version) lacks the modules venv and ensurepip: install them (on Debian and Ubuntu the package python3-venv), or set PYTHON to an interpreter that has them"
    echo "== making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
    kept=$(torch_folder "$python")
    if [ -n "$kept" ]; then
        # The interpreter, a container's or an active environment's, already has torch: show its packages to ours.
        echo "== keeping the torch in $kept"
        "$VENV/bin/python" -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/kept_torch.pth", "w").write(sys.argv[1] + "\n")' "$kept"
    fi
}

install_torch() {
    if [ -z "$(torch_folder "$VENV/bin/python")" ]; then
        echo "== installing $TORCH_SPEC"
        # A recent pip resolves the lock in half the time; the one that came with Python does as well.
        "$VENV/bin/python" -m pip install --no-compile -U 'pip>=25' || true
        "$VENV/bin/python" -m pip install --no-compile "$TORCH_SPEC"
    fi
    version=$(torch_version "$VENV/bin/python")
    case $version in
    2.11.* | 2.12.* | 2.13.*) ;;
    *) fail "torch $version is installed in $(torch_folder "$VENV/bin/python") and this project needs 2.11, 2.12 or 2.13: upgrade it, or make an environment apart with another PYTHON" ;;
    esac
}

install_package() {
    constraints="$VENV/constraints.txt"
    {
        grep -v '^torch==' "$LOCK" || true
        echo "torch==$version"
    } >"$constraints"
    echo "== installing megatron_llm[$EXTRAS] beside torch $version"
    "$VENV/bin/python" -m pip install --no-compile -c "$constraints" setuptools wheel pybind11
    "$VENV/bin/python" -m pip install --no-compile -c "$constraints" --no-build-isolation -e "${HERE}[$EXTRAS]"
    case ",$EXTRAS," in
    *,dev,*)
        "$VENV/bin/python" -m pip install --no-compile --no-deps -r "$HERE/requirements/test-no-deps.txt" ||
            echo "warning: megatron-core could not be installed, so the tests that compare with it will be skipped" >&2
        ;;
    esac
}

# Python compiles what it imports when it first does and keeps that. Where it is told not to keep it, every process would
# compile anew, several seconds each: there it is done here, once. (A file that does not compile is told when imported.)
compile_sources() {
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || return 0
    "$VENV/bin/python" -m compileall -qq -j 0 -x '/(tests|testing|pip|setuptools)/|/transformers/models/(?!auto/|llama/|gpt2/|__init__)' \
        "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "$HERE/megatron_llm" || true
}

# Nodes of a cluster share the folder: one installs, the others wait for it.
take_turn() {
    turn="$VENV.lock"
    waited=0
    until mkdir "$turn" 2>/dev/null; do
        [ -d "$(dirname "$turn")" ] || mkdir -p "$(dirname "$turn")"
        owner=$(cat "$turn/owner" 2>/dev/null || echo unknown)
        if [ "${owner% *}" = "$(uname -n)" ] && ! kill -0 "${owner#* }" 2>/dev/null; then
            echo "== removing the lock that process ${owner#* } left behind"
            rm -rf "$turn"
            continue
        fi
        [ "$waited" -gt 0 ] || echo "== waiting for the installation that runs on $owner"
        [ "$waited" -lt 1800 ] || fail "another installation ($owner) has held $turn for 30 minutes: remove that folder if no installation runs any more"
        sleep 2
        waited=$((waited + 2))
    done
    echo "$(uname -n) $$" >"$turn/owner"
    trap 'rm -rf "$turn"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

[ "$#" -eq 0 ] || fail "'$1' was given, but this script takes no arguments: its settings are the variables at its top (VENV, PYTHON, TORCH_SPEC, EXTRAS, LOCK)"
stamp="$VENV/.installed"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
    echo "environment $VENV is up to date"
    exit 0
fi
if [ "$DRY_RUN" = 1 ]; then
    echo "${PYTHON:-python3} -m venv $VENV"
    echo "$VENV/bin/python -m pip install --no-compile $TORCH_SPEC"
    echo "$VENV/bin/python -m pip install --no-compile -c $LOCK --no-build-isolation -e ${HERE}[$EXTRAS]"
    exit 0
fi

take_turn
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
    echo "environment $VENV is up to date"
    exit 0
fi
# --no-compile saves a third of the time: most modules are never imported. See compile_sources.
start=$(date +%s)
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_QUIET=2      # errors only
"$VENV/bin/python" -c "import pip" 2>/dev/null || make_venv
install_torch
install_package
compile_sources
built=""
missing=""
for extension in _C _kernels _shm; do
    if ls "$HERE/megatron_llm/$extension".*.so >/dev/null 2>&1; then
        built="$built $extension"
    else
        missing="$missing $extension"
    fi
done
extensions="C++ extensions built:${built:- none}"
[ -z "$missing" ] || extensions="$extensions; not built, slower forms serve:$missing"
fingerprint >"$stamp"
echo "== done in $(($(date +%s) - start)) s: $("$VENV/bin/python" --version), torch $version, $extensions"
