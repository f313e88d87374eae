#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most ten minutes: build, all tests with their device cases, sanitizers,
# benchmarks.
#
#   benchmarks/gpu_session.sh [FOLDER]      FOLDER, or $OUT, or build/gpu: logs, JSON and summary.txt
#
# A part that fails does not stop the others; what failed is printed last, and is the exit status. Installs nothing:
# python must have torch with CUDA, ninja, pybind11, pytest, psutil, scipy; nvcc; compute-sanitizer. PYTHON says which
# python.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-${OUT:-build/gpu}}")
python=${PYTHON:-python3}
mkdir -p "$out"
: >"$out/summary.txt"
failed=()

# part NAME SECONDS COMMAND..: runs it into NAME.log
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%-12s %-6s %4d s   %s\n' "$name" "$([ $status -eq 0 ] && echo ok || echo "rc $status")" $((SECONDS - start)) \
    "$(tail -n 1 "$out/$name.log" | cut -c1-160)" | tee -a "$out/summary.txt"
  [ $status -eq 0 ] || failed+=("$name")
}

export PYTHONPATH=$PWD
export ASKEW_BUILD=cuda
capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "$capability")}
few="test_the_gpu_does_what_the_reference_does and (127 or 65543 or 33)"
few+=" or found_inf or wrong or captured or gradients_that_move"
sanitizer() {
  part "$1" 120 compute-sanitizer --tool "$1" --error-exitcode 9 "${@:2}" \
    "$python" -m pytest -q -x tests/test_cuda.py -k "$few"
}

query=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit
part machine 30 nvidia-smi --query-gpu=$query --format=csv
part build 240 "$python" setup.py -q build_ext --inplace
part doctor 120 "$python" -m askew_cuda.cli doctor
part cuda 200 "$python" -m pytest -q tests/test_cuda.py tests/test_cuda_binary.py
bench() { part "$1" "$2" "$python" -m "benchmarks.speed.$1" --save; }
bench step 120
bench tensors 90
bench memory 40
bench train 60
bench scaling 60
sanitizer memcheck
sanitizer racecheck
sanitizer initcheck
part tests 240 "$python" -m pytest -q --continue-on-collection-errors \
  --ignore tests/test_cuda.py --ignore tests/test_cuda_on_host.py tests
cp -f benchmarks/results/*-cuda.json "$out/" 2>/dev/null

for name in "${failed[@]}"; do
  printf '\n===== %s failed; the end of its log:\n' "$name"
  tail -n 40 "$out/$name.log"
done
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}" | tee -a "$out/summary.txt"
exit ${#failed[@]}
