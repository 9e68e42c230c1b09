#!/usr/bin/env bash
# Compiles the C++ kernels for this processor and for aarch64, runs the latter in QEMU, and compares
# the bits. Debian's packages: g++ g++-aarch64-linux-gnu qemu-user-static.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
# Those of setup.py, and warnings.
flags=(-O3 -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -Wno-psabi
    -Wall -Wextra)
g++ "${flags[@]}" kernel_digest.cpp -o "$build/here"
aarch64-linux-gnu-g++ "${flags[@]}" -static kernel_digest.cpp -o "$build/aarch64"
"$build/here" > "$build/here.txt"
qemu-aarch64-static "$build/aarch64" > "$build/aarch64.txt"
diff "$build/here.txt" "$build/aarch64.txt"
echo "$(wc -l < "$build/here.txt") combinations of storage: the same bits on $(uname -m) and aarch64."
