#!/bin/sh
# Make .venv with everything that `make demo` and `make test` need, unless it is there already.
#
# Finds a Python that the pinned packages support, also one that only pyenv knows; installs once, and again only when
# the requirements, pyproject.toml, setup.py, the C++ kernels or what is chosen change. Set PYTHON to choose a Python
# yourself, and TORCH=cpu to take torch without CUDA from pytorch.org, if that is reached; the choice stays until
# TORCH=cuda.
set -eu

cd "$(dirname "$0")/.."
ROOT=$(pwd)
VENV=$ROOT/.venv
STAMP=$VENV/.installed

# What megatron-core 0.19.2 is built for. A newer Python would have to compile it.
SUPPORTED="3.12 3.13"

say() {
    printf '%s\n' "bootstrap: $*" >&2
}

# Succeed if "$1" runs and is a supported Python that can make virtual environments. A name on PATH proves nothing:
# pyenv puts shims there that only print an error.
is_suitable() {
    version=$("$1" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    for supported in $SUPPORTED; do
        [ "$version" = "$supported" ] && return 0
    done
    return 1
}

# Print the roots of pyenv installations: the variable, the default, and what PATH gives away.
list_pyenv_roots() {
    [ -z "${PYENV_ROOT:-}" ] || printf '%s\n' "$PYENV_ROOT"
    [ -z "${HOME:-}" ] || printf '%s\n' "$HOME/.pyenv"
    printf '%s\n' "$PATH" | tr ':' '\n' | sed -n -e 's,/shims/*$,,p' -e 's,/bin/*$,,p' | while read -r folder; do
        if [ -d "$folder/versions" ] && [ -d "$folder/shims" ]; then
            printf '%s\n' "$folder"
        fi
    done
}

# Print every Python worth trying, the preferred versions first.
list_candidates() {
    for supported in $SUPPORTED; do
        command -v "python$supported" || true
    done
    command -v python3 || true
    command -v python || true
    list_pyenv_roots | while read -r root; do
        for supported in $SUPPORTED; do
            for candidate in "$root/versions/$supported".*/bin/python3; do
                [ ! -x "$candidate" ] || printf '%s\n' "$candidate"
            done
        done
    done
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" && printf '%s\n' "$PYTHON"
        return
    fi
    list_candidates | while read -r candidate; do
        if is_suitable "$candidate"; then
            printf '%s\n' "$candidate"
            break
        fi
    done
}

# Print which build of torch .venv has.
installed_torch() {
    found=$(sed -n 's/^torch: //p' "$STAMP" 2>/dev/null) || true
    printf '%s\n' "${found:-cuda}"
}

torch=${TORCH:-$(installed_torch)}
case $torch in
cpu | cuda) ;;
*)
    say "TORCH=$torch is not known; allowed: cpu, cuda."
    exit 1
    ;;
esac

# What the installation depends on.
fingerprint() {
    cat requirements/*.txt pyproject.toml setup.py megatron_adam_mini/kernels/*.cpp megatron_adam_mini/kernels/*.inc | cksum
    printf '%s\n' "$ROOT ${PYTHON:-}" "torch: $torch"
}

wanted=$(fingerprint)
if [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] &&
    "$VENV/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

python=$(find_python) || python=
if [ -z "$python" ]; then
    if [ -n "${PYTHON:-}" ]; then
        say "PYTHON=$PYTHON does not run, has no venv module, or is none of the supported versions ($SUPPORTED)."
    else
        say "no suitable Python found. Needed is one of the versions $SUPPORTED, with its venv module."
        say "Looked for python3.12, python3.13, python3 and python on PATH, and in pyenv's versions."
    fi
    say "Remedy: install one, for example with"
    say "    apt-get install python3.12 python3.12-venv   (or)   pyenv install 3.12   (or)   conda create -n p python=3.12"
    say "or name one: make PYTHON=/path/to/python3.12 ..."
    exit 1
fi

# A complete environment of the same Python and torch is brought up to date; anything else is made anew, because what an
# interrupted installation has left cannot be told from a whole one.
make_environment() {
    if [ -f "$STAMP" ] && [ "$(installed_torch)" = "$torch" ] &&
        [ "$(describe "$VENV/bin/python")" = "$(describe "$python")" ]; then
        rm -f "$STAMP"
    else
        rm -f "$STAMP"
        "$python" -m venv --clear "$VENV"
    fi
}

describe() {
    "$1" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null || printf '%s\n' "none"
}

# Whatever else is installed later accepts this build of the pinned version.
install_cpu_torch() {
    version=$(sed -n 's/^torch==//p' requirements/runtime.txt)
    "$VENV/bin/python" -m pip install --disable-pip-version-check --retries 1 --no-deps \
        --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" ||
        say "no torch without CUDA for this machine was found there; the package index's comes instead."
}

install() {
    make_environment && { [ "$torch" = cuda ] || install_cpu_torch; } &&
        "$VENV/bin/python" -m pip install --disable-pip-version-check --requirement requirements/development.txt &&
        "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
}

size="about 6 GB, because torch comes with CUDA"
[ "$torch" = cuda ] || size="with torch for the CPU"
say "installing into .venv with $python (once; $size)"
if ! install; then
    rm -f "$STAMP"
    say "the installation failed; the messages above say why."
    say "Remedy: check that this machine reaches a package index (pip config list) and has 6 GB free, then run again."
    exit 1
fi
printf '%s\n' "$wanted" >"$STAMP"
say "done"
