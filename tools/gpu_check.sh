#!/usr/bin/env bash
# Everything that a machine with one NVIDIA GPU can tell: `bash tools/gpu_check.sh STAGE...`, in the project's root.
#
#   probe       versions, device, tools                                             10 s
#   parity      kernels against the reference on random data, 64-bit positions     2 min
#   bench       time, bandwidth and launches of a step, against torch's pipeline   3 min
#   ranks       Megatron-Core: one NCCL rank, and two gloo ranks on the GPU        2 min
#   train       1.3e9 parameters: Adam, Adam-mini, Adam-mini with small state      4 min
#   checkpoint  memory of save and load, and whether training resumes alike        3 min
#   sanitize    memcheck and racecheck of a small parity run                       4 min
#   profile     Nsight Compute on the kernels that move most of the data           3 min
#
# Each stage has a time limit, and fails alone. Records and check.log are in $OUT (default gpu-results), at most eight
# files; `python -m benchmarks.gpu.report $OUT` makes a dated result of them. PYTHON chooses the interpreter, which
# needs torch, triton, megatron-core 0.19.2 and tqdm; LIMIT is the number of seconds after which all of it must have
# ended. Nothing is downloaded, no setting of the card is changed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export OUT=${OUT:-$PWD/gpu-results} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache}
mkdir -p "$OUT"
summary=()
seen='^((case|worker|job|optimizer|cases|copy)|FAILED|[a-z_0-9]+: [0-9]+ rows|probe|=====)|(Duration|Throughput|Occupancy|Registers Per Thread) '

stage() { # name, limit in seconds, command...
    local name=$1 limit=$2 began=$SECONDS status left=$((${LIMIT:-36000} - SECONDS))
    shift 2
    if [ "$left" -lt 25 ]; then
        summary+=("$name: no time left")
        return
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    printf '\n== %s (at most %s s)\n' "$name" "$limit" | tee -a "$OUT/check.log"
    # Lines of records are the ones to see; the log has everything.
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/check.log" |
        grep -aE --line-buffered "$seen" | sed -u 's/^\(.\{400\}\).*/\1 .../'
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || tail -n 8 "$OUT/check.log" | cut -c1-300
    summary+=("$(printf '%-22s status %-4s %4d s' "$name" "$status" $((SECONDS - began)))")
}

run_stage() {
    case $1 in
    probe)
        stage probe 60 "$python" - <<'PROGRAM'
import shutil
import subprocess

import torch

from benchmarks.gpu import measure
from megatron_adam_mini.kernels import select_backend

device = measure.device("cuda")
torch.zeros(1, device=device)
print("probe", measure.environment(device))
tools = ("gcc", "g++", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
print("probe", {tool: bool(shutil.which(tool)) for tool in tools})
print("probe kernels:", select_backend("auto", device).NAME)
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
PROGRAM
        ;;
    parity) stage parity 150 "$python" -m benchmarks.gpu.parity --seconds 60 --segments-beyond-2e31 ;;
    bench) stage bench 240 "$python" -m benchmarks.gpu.bench ;;
    ranks)
        for backend in nccl gloo; do
            count=$([ $backend = nccl ] && echo 1 || echo 2)
            TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=2 stage "ranks $backend $count" 120 "$python" -m torch.distributed.run \
                --nproc-per-node "$count" -m benchmarks.gpu.ranks --backend "$backend"
        done
        ;;
    train) stage train 330 "$python" -m benchmarks.gpu.train ;;
    checkpoint) stage checkpoint 240 "$python" -m benchmarks.gpu.checkpoint ;;
    sanitize)
        for tool in memcheck racecheck; do
            # Without the caching allocator, memcheck sees the ends of tensors.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "sanitize $tool" 120 compute-sanitizer --tool "$tool" \
                --error-exitcode 9 "$python" -m benchmarks.gpu.parity --small --workers 1 --rounds 2 --seconds 60 \
                --seed 11 --name "sanitize_$tool"
        done
        ;;
    profile)
        for kernel in sum_kernel update_kernel update_rows_kernel; do
            only=$([ $kernel = update_rows_kernel ] && echo 'single phase' || echo 'one bucket')
            stage "profile $kernel" 90 env OUT=/tmp/profiled ncu --clock-control none --kernel-name "$kernel" --launch-skip 2 --launch-count 1 \
                --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
                --section WarpStateStats "$python" -m benchmarks.gpu.bench --only "$only" --samples 2
        done
        ;;
    *)
        echo "$0: unknown stage '$1'; allowed: probe parity bench ranks train checkpoint sanitize profile" >&2
        return 2
        ;;
    esac
}

for wanted in "$@"; do
    run_stage "$wanted" || exit 2
done
printf '\n-- summary\n'
printf '%s\n' "${summary[@]}" | tee -a "$OUT/check.log"
