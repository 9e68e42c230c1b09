#!/bin/sh
# Run the tests of tests/releases.py on other releases of Megatron-Core, and write the result into docs/support.md.
#
#     tools/releases.sh [--megatron CHECKOUT] [--torch VERSION | --python PYTHON] [RELEASE...]
#
# RELEASE is a version on the package index, `main` or `0.16.1`; default: the wheels (0.17.1 0.18.2 0.19.2), and with
# --megatron all. CHECKOUT is a git folder of Megatron-LM, bare or not: main is built from it, and 0.16.1, whose wheel
# lacks megatron.training, gets that from its tag. Then each release loads what its neighbours have saved.
#
# --torch runs 0.19.2 with another torch (5 GB), --python runs 0.16.1, the newest release for Python 3.11, with another
# Python (6 GB). PYTHON is the program. The rows that there are stand in tests/support.py.
#
# pip installs each release, without what it depends on, into a folder of build/releases that stands before .venv, so
# that torch is on the disk once. About three minutes per release on two idle cores.
set -eu

cd "$(dirname "$0")/.."
SITES=$PWD/build/releases
PYTHON=$PWD/.venv/bin/python
MAIN=d98e8a64ddf34856e74b24714e3bedb2f5a39553

megatron=
other=
while [ $# -gt 0 ]; do
    case $1 in
    --megatron)
        megatron=$(cd "$2" && pwd)
        ;;
    --torch)
        other=$SITES/torch-$2
        if [ ! -e "$other/.complete" ]; then
            rm -rf "$other"
            "$PYTHON" -m pip install --quiet --target "$other" "torch==$2"
            touch "$other/.complete"
        fi
        ;;
    --python)
        other=$SITES/$("$2" -c 'import sys; print("python-%d.%d" % sys.version_info[:2])')
        PYTHON=$other/bin/python
        SITES=$other/releases
        if [ ! -e "$other/.complete" ]; then
            rm -rf "$other"
            "$2" -m venv "$other"
            # Of what is pinned, not every version is there for another Python.
            sed -n -e '/^torch==/p' -e '/^\(torch\|megatron-core\|ruff\|mypy\)==/!s/==.*//p' requirements/*.txt |
                xargs "$PYTHON" -m pip install --quiet
            touch "$other/.complete"
        fi
        ;;
    *) break ;;
    esac
    shift 2
done
if [ $# -eq 0 ]; then
    case $other in
    */python-*) set -- 0.16.1 ;;
    */torch-*) set -- 0.19.2 ;;
    *)
        set -- 0.17.1 0.18.2 0.19.2
        [ -z "$megatron" ] || set -- 0.16.1 "$@" main
        ;;
    esac
fi

# Unpack a commit of the checkout into a new folder.
unpack() {
    if [ -z "$megatron" ]; then
        echo "releases: $1 is not on the package index as a whole. Remedy: --megatron CHECKOUT of Megatron-LM." >&2
        exit 1
    fi
    rm -rf "$2"
    mkdir -p "$2"
    git -C "$megatron" archive "$1" | tar -x -C "$2"
}

install() {
    "$PYTHON" -m pip install --quiet --no-deps --target "$1" "$2" pyyaml
}

for release; do
    site=$SITES/$release
    [ -e "$site/.complete" ] && continue
    rm -rf "$site"
    case $release in
    main)
        unpack "$MAIN" "$SITES/tree-main"
        install "$site" "$SITES/tree-main"
        ;;
    0.16.1)
        unpack "core_v$release" "$SITES/tree-$release"
        install "$site" "megatron-core==$release"
        cp -R "$SITES/tree-$release/megatron/." "$site/megatron/"
        "$PYTHON" -m pip install --quiet --target "$site" six regex pydantic
        ;;
    *) install "$site" "megatron-core==$release" ;;
    esac
    touch "$site/.complete"
done

run() {
    PYTHONPATH=$PWD:$SITES/$1:$other "$PYTHON" "$2" "$3" "$4"
}

status=0
for release; do
    [ -n "$other" ] || run "$release" tests/crossing.py save "$SITES/saved" || status=1
done
for release; do
    ADAM_MINI_SAVED=$SITES/saved run "$release" tools/support_table.py --release tests/releases.py || status=1
done
exit $status
