#!/bin/sh
# Remake the locks from pyproject.toml: sh env/lock.sh PYTHON [uv options, such as --upgrade]. PYTHON has uv installed.
# No version stands in two locks with two values. torch and what only it needs (triton, CUDA) are in none: see torch.txt.
set -eu
cd "$(dirname "$0")/.."
python=$1
shift

compile() { # compile OUTPUT [OPTION...]: hashes for every platform; versions that OUTPUT already holds are kept
    output=$1
    shift
    "$python" -m uv pip compile --quiet --universal --fork-strategy fewest --no-emit-index-url \
        --custom-compile-command "make lock" "$@" --output-file "$output"
}
names() { sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' "$@"; }
leave_out() { for name; do printf ' --no-emit-package %s' "$name"; done; } # package names hold no spaces

compile env/login.lock --python-version 3.10 --generate-hashes "$@" pyproject.toml

all=$(mktemp)
trap 'rm -f "$all"' EXIT
! [ -e env/train.lock ] || cat env/train.lock env/deepspeed.lock > "$all"
compile "$all" --python-version 3.11 --extra train -c env/login.lock "$@" pyproject.toml
torch=$(names "$all" | grep -E '^(torch|triton|nvidia-.*|cuda-.*)$' | grep -vx nvidia-ml-py)
# shellcheck disable=SC2046,SC2086
compile env/train.lock --python-version 3.11 --generate-hashes --extra train -c env/login.lock \
    $(leave_out $torch deepspeed $(names env/login.lock)) "$@" pyproject.toml
# deepspeed comes as source alone. A lock of its own lets it be built with the locked setuptools.
grep '^deepspeed==' "$all" | compile env/deepspeed.lock --python-version 3.11 --generate-hashes --no-deps --no-annotate "$@" -

# packaging stands in login.lock for the Pythons that have matplotlib; pytest needs it for all.
# shellcheck disable=SC2046
compile env/dev.lock --python-version 3.10 --generate-hashes --extra dev -c env/login.lock -c env/train.lock \
    $(leave_out $(names env/login.lock | grep -vx packaging)) "$@" pyproject.toml
