#!/bin/sh
# Runs the tests; makes the environment first where it is missing or out of date.
#
#   sh run_tests.sh                              what CI runs
#   sh run_tests.sh tests/unit -k tokenizer      any arguments of pytest
#   sh run_tests.sh -m 'not slow'                the quick ones
#   sh run_tests.sh -m full tests/ranks          whole matrices, of which CI runs a fixed part
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=tools/script_common.sh
. "$HERE/tools/script_common.sh"

VENV=${VENV:-"$HERE/.venv"}           # environment; made by run_install_environment.sh
TEST_WORKERS=${TEST_WORKERS:-}        # test processes at a time; empty: one for each core, at most 4
DRY_RUN=${DRY_RUN:-0}                 # 1 prints the command
# ---- end of settings ----

one_of DRY_RUN 0 1
if [ -z "$TEST_WORKERS" ]; then
    TEST_WORKERS=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    [ "$TEST_WORKERS" -le 4 ] || TEST_WORKERS=4
fi
make_environment
cd "$HERE"
# The ranks of a test share the cores with those of other tests, so each takes one thread. Tests of one file stay in one
# process, which keeps its warm ranks.
export OMP_NUM_THREADS=1
finish "$VENV/bin/python" -m pytest -n "$TEST_WORKERS" --dist loadfile "$@"
