#!/bin/sh
# Fill the virtual environment from the locks. `make` calls it; by hand:
#   sh env/setup.sh login|train|dev VENV STAMP    STAMP is written last, so an interrupted set-up is never taken for whole
#   sh env/setup.sh python                        prints the Python that would be used
# Exit 69: something it needs is not there; the message says what to do.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
die() { say "Set-up: $*"; exit 69; }

# True where $1 really runs (a pyenv shim may not) and is Python 3.$2 or newer.
usable() { "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" > /dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" 10 || die "PYTHON=$PYTHON does not run, or is older than 3.10. Name another, or leave PYTHON out."
        printf '%s\n' "$PYTHON"
        return
    fi
    for minor in 11 10; do # training needs 3.11; the login node's commands make do with 3.10
        for name in python3.12 python3.11 python3.13 python3 python3.10; do
            if usable "$name" "$minor"; then printf '%s\n' "$name"; return; fi
        done
    done
    die "no Python 3.10 or newer on PATH (training needs 3.11). Load or install one, or name it: PYTHON=/path/to/python3.12"
}

if [ "$1" = python ]; then find_python; exit; fi

stage=$1 venv=$2 stamp=$3
python=$venv/bin/python log=$venv/setup.log owner=$venv/setup.pid

# What would lead pip out of the virtual environment, or foreign packages into it.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export DS_BUILD_OPS=0 # deepspeed compiles what it needs at run time

# Where home is another file system (group storage beside a small home folder), its cache would fill that.
storage_of() { df -P "$1" 2> /dev/null | awk 'NR == 2 { print $1 }'; }
[ "$(storage_of "${HOME:-/}")" = "$(storage_of .)" ] || export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$PWD/.cache/pip}"

wipe() { find "$venv" -mindepth 1 -maxdepth 1 ! -name setup.pid -exec rm -rf {} +; }

# True where process $1 lives and is a set-up: its number may be another's by now, or a zombie's.
alive() { kill -0 "$1" 2> /dev/null && { ! command -v ps > /dev/null || ps -o args= -p "$1" | grep -q 'setup\.sh'; }; }

# True where job $1 is neither queued nor running. A controller that does not answer says nothing.
job_gone() {
    answer=$(squeue -h -j "$1" -o %A 2>&1) || case $answer in *"Invalid job id"*) return 0 ;; *) return 1 ;; esac
    [ -z "$answer" ]
}

# One set-up at a time. A dead owner on this machine is taken over, and a job that is gone; another machine's process
# cannot be looked at.
claim() {
    mkdir -p "$venv"
    if ! [ -e "$venv/pyvenv.cfg" ] && ! [ -e "$log" ] && [ -n "$(ls -A "$venv" | grep -v '^setup\.pid$')" ]; then
        die "VENV=$venv is a folder with other content. Name a new one."
    fi
    me="$(uname -n) $$ ${SLURM_JOB_ID:-}"
    if ! (set -C; echo "$me" > "$owner") 2> /dev/null; then
        read -r host pid job < "$owner" || host='' pid='' job=''
        if { [ "$host" = "$(uname -n)" ] && ! alive "$pid"; } || { [ -n "$job" ] && job_gone "$job"; }; then
            echo "$me" > "$owner"
        elif [ -n "$job" ] && [ -e "$stamp" ]; then
            # It adds packages to those that are asked for here; who needs them all waits for the job next.
            say "Set-up: job $job on $host is installing further packages into $venv"
            exit
        else
            die "another set-up of $venv is running (process ${pid:-?} on ${host:-?}). Wait for it; if it is gone, remove $owner"
        fi
    fi
    trap 'rm -f "$owner"' EXIT
    trap 'exit 130' HUP INT TERM
}

make_venv() {
    # The log is kept until a step is done: one that got as far as changing files leaves nothing to build on.
    if [ -e "$log" ] && grep -qE '^(Creating|Installing collected packages)' "$log"; then
        say "Set-up: an earlier one was interrupted, so $venv is made anew"
        wipe
    elif ! "$python" -c '' 2> /dev/null; then
        wipe
    fi
    if ! [ -e "$python" ]; then
        base=$(find_python)
        "$base" -c 'import ensurepip, venv' 2> /dev/null ||
            die "$base has no venv module. Install it (Debian: python3-venv), or name another: PYTHON=/path/to/python3.12"
        echo "Creating $venv" > "$log"
        "$base" -m venv "$venv" >> "$log" 2>&1 || failed "$venv"
        : > "$log"
        say "Set-up: $("$python" -V) in $venv"
    fi
    if [ "$stage" = train ] && ! usable "$python" 11; then
        die "$venv has $("$python" -V), training needs 3.11 or newer. Remove it (rm -rf $venv) and name one: PYTHON=/path/to/python3.12"
    fi
}

failed() {
    say "Set-up failed at $1. Its last words:"
    { grep -E 'ERROR|[Ee]rror:' "$log" || cat "$log"; } | tail -n 6 | sed 's/^/    /' >&2
    say "Check the network, pip's proxy and index settings ($python -m pip config list) and the free space (df -h . /tmp)," \
        "then give the same command again. Nothing half-installed is used. The whole log: $log"
    exit 69
}

install() { # install WHAT PIP-OPTION...
    what=$1
    shift
    "$python" -m pip install --progress-bar off "$@" >> "$log" 2>&1 || failed "$what"
    : > "$log"
}
locked() { install "$1" --require-hashes --no-deps -r "$1"; }

begun=$(date +%s)
claim
make_venv
rm -f "$venv/.$stage"-* # a stamp of another version of the lock
: > "$log"
case $stage in
login) say "Set-up: the login node's packages (env/login.lock), some seconds"
    locked env/login.lock ;;
dev) say "Set-up: the tools for tests and checks (env/dev.lock), some seconds"
    locked env/dev.lock ;;
train) say "Set-up: the training packages (env/train.lock), about a minute"
    locked env/train.lock
    # Before torch: with torch in sight its build adds requirements that depend on the machine.
    install env/deepspeed.lock --require-hashes --no-deps --no-build-isolation -r env/deepspeed.lock
    say "Set-up: torch (env/torch.txt), the largest; with CUDA several GB"
    install env/torch.txt -r env/torch.txt
    "$python" -m pip check > "$log" 2>&1 || failed "pip check" ;;
*) die "unknown stage $stage, known: login, train, dev" ;;
esac
rm -f "$log"
: > "$stamp"
say "Set-up: $stage packages ready after $(($(date +%s) - begun)) s"
