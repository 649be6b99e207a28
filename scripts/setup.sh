#!/bin/sh
# Makes .venv and installs Baton with the versions of constraints.txt; `make setup` calls it.
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of 3.11 or newer is taken.
set -eu
cd "$(dirname "$0")/.."

torch="torch==$(sed -n 's/^torch==//p' constraints.txt)"
triton=triton==3.6.0 # whose machine code tests/kernels/triton/sm90.json holds
cpu_index=https://download.pytorch.org/whl/cpu
log=$(mktemp "${TMPDIR:-/tmp}/baton-setup-XXXXXX.log")
child=

stop() { # end what is running, and leave no log behind
    trap - EXIT INT TERM
    [ -z "$child" ] || kill "$child" 2>/dev/null || true
    rm -f "$log"
    exit "$1"
}
trap 'stop $?' EXIT
trap 'echo; echo "stopped; run it again to go on" >&2; stop 130' INT
trap 'stop 143' TERM

fail() {
    printf '\n%s\n' "$1" >&2
    exit 1
}

find_python() { # print the first Python that is new enough
    for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$name" ] || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$name" -c 'import sys; print(sys.executable)'
        return
    done
}

phase() { # phase "what it does" command...: run it quietly, show how long it takes
    what=$1
    shift
    began=$(date +%s)
    [ -t 1 ] || printf '  %s …\n' "$what"
    "$@" >"$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        [ ! -t 1 ] || printf '\r  %s … %s s ' "$what" "$(($(date +%s) - began))"
        sleep 0.5
    done
    status=0
    wait "$child" || status=$?
    child=
    if [ "$status" -ne 0 ]; then
        printf '\n%s failed; the end of its log:\n' "$what" >&2
        tail -n 25 "$log" >&2
        exit 1
    fi
    [ ! -t 1 ] || printf '\r'
    printf '  %s: done in %s s \n' "$what" "$(($(date +%s) - began))"
}

answers() { # whether a URL answers within 3 seconds
    .venv/bin/python - "$1" <<'PYTHON' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=3)
PYTHON
}

python=$(find_python)
[ -n "$python" ] || fail "Baton needs Python 3.11 or newer: sudo apt-get install python3 python3-venv"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing: sudo apt-get install python$version-venv"

echo "Installing Baton into .venv (Python $version)"
made=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
if [ "$made" != "$version" ] || [ ! -x .venv/bin/pip ]; then
    phase "making .venv" "$python" -m venv --clear .venv
fi

set -- "$torch"
if command -v nvidia-smi >/dev/null 2>&1; then
    build="CUDA build: nvidia-smi is here"
elif answers "$cpu_index/torch/"; then
    build="CPU build: no NVIDIA GPU"
    set -- "$@" --extra-index-url "$cpu_index"
else
    build="as pip finds it: download.pytorch.org does not answer"
fi
pip=".venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt"
phase "installing $torch ($build)" $pip "$@"
# A CUDA build of torch has brought the Triton it needs; there is none for systems but Linux.
set --
if [ "$(uname)" = Linux ] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
    set -- "$triton"
fi
phase "installing Baton and everything else" $pip "$@" --editable '.[dev]'
touch .venv/.installed
