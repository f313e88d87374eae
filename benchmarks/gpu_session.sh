#!/usr/bin/env bash
# All that needs a GPU, in one go of at most ten minutes on a GPU machine, the most valuable evidence first.
#
#   benchmarks/gpu_session.sh [FOLDER]     FOLDER, or $OUT, or build/gpu, receives two files: summary.txt, and logs.tgz
#                                          (every log and JSON); both are written anew after each part, so that a kill
#                                          at any moment loses one part at most.
#
# PYTHON: which python; it needs torch with CUDA, ninja, pybind11, pytest, pytest-xdist, psutil, scipy. PYTHONPATH is
# kept. WHEELS (.whl): a folder of wheels of what is missing there; they go into build/site. An extension with CUDA
# kernels that is in askew_cuda/ already saves the build. GPU_SECONDS: all of it ends by then (570). ASKEW_COMMIT: what
# is measured, where there is no git. Nothing that git tracks is written to. A part that fails stops no other; the exit
# status is how many failed. benchmarks/gpu_rehearsal.sh tries all this without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-${OUT:-build/gpu}}")
logs=$PWD/build/gpu_logs
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
deadline=$((SECONDS + ${GPU_SECONDS:-570}))
rm -rf "$logs" && mkdir -p "$out" "$logs"
: >"$out/summary.txt"
failed=()
export PYTHONPATH=$PWD:$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONDONTWRITEBYTECODE=1 ASKEW_BUILD=cuda

flush() { tar czf "$out/logs.new" -C "$logs" . && mv -f "$out/logs.new" "$out/logs.tgz"; }

# run NAME SECONDS COMMAND..: into NAME.log; SIGINT first, so that pytest still says what failed; never beyond the
# deadline
run() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status
  shift 2
  if [ $left -lt 25 ]; then
    echo "no time left" >"$logs/$name.log"
    status=125
  else
    timeout --foreground -s INT -k 15 $((limit < left - 15 ? limit : left - 15)) "$@" >"$logs/$name.log" 2>&1
    status=$?
  fi
  printf '%s %s\n' "$status" $((SECONDS - start)) >"$logs/$name.status"
}

# said NAME..: a line of the summary for each
said() {
  local name status seconds
  for name in "$@"; do
    read -r status seconds <"$logs/$name.status"
    printf '%-13s %-6s %4d s   %s\n' "$name" "$([ "$status" -eq 0 ] && echo ok || echo "rc $status")" "$seconds" \
      "$(grep -av '^ *$' "$logs/$name.log" | tail -n 1 | cut -c1-150)" | tee -a "$out/summary.txt"
    [ "$status" -eq 0 ] || failed+=("$name")
  done
  flush
}

part() { run "$@" && said "$1"; }

bench() { part "$1" "$2" "$python" -m "benchmarks.speed.$1" --save "$logs"; }

check() { # NAME SECONDS WORKERS PYTEST'S ARGUMENTS..
  local name=$1 limit=$2 workers=$3
  shift 3
  run "$name" "$limit" "$python" -m pytest -q -n "$workers" --dist worksteal --tb=short --maxfail=40 \
    -p no:cacheprovider -o faulthandler_timeout=60 --continue-on-collection-errors "$@"
}

sanitizer() { # NAME SECONDS TOOL: every tensor is an allocation of its own, else nothing is seen out of bounds
  run "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$3" --error-exitcode 9 \
    "$python" tests/gpu/smoke.py --no-graphs
}

profile() { # NAME SECONDS RULE DTYPE BACKEND: the third launch of a step's kernel; clocks are left alone
  part "$1" "$2" ncu --clock-control none -k regex:step_kernel -s 2 -c 1 --section SpeedOfLight \
    --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats --section WarpStateStats \
    "$python" -m benchmarks.speed.one_step "${@:3}"
}

part machine 30 sh -c 'nvidia-smi; nvcc --version | tail -n 2; c++ --version | head -n 1; uname -r; nproc; "$0" -VV' "$python"
if compgen -G "$wheels/*.whl" >/dev/null; then
  part wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target build/site "$wheels"/*.whl
fi
capability='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "$capability" 2>"$logs/capability.log")}
if "$python" -c 'from askew_cuda import _C; raise SystemExit(_C.build_info()["cuda"] is None)' 2>"$logs/carried.log"; then
  echo "the extension was there" | tee -a "$out/summary.txt"
else
  part build 240 "$python" setup.py -q build_ext --inplace
fi
part smoke 60 "$python" tests/gpu/smoke.py --backend cuda
check cuda 100 6 tests/gpu/test_cuda.py
said cuda
bench step 100
profile ncu 40 sgd float32 cuda
bench tensors 60
part smoke_triton 60 "$python" tests/gpu/smoke.py --backend triton
profile ncu_bfloat16 30 sgd bfloat16 cuda
bench scaling 40
# From here on nothing is timed: all at once. Job control, since what bash starts with & ignores SIGINT without it.
set -m
sanitizer memcheck 120 memcheck &
sanitizer racecheck 120 racecheck &
sanitizer initcheck 120 initcheck &
check triton 150 6 tests/gpu/test_triton.py &
check tests 150 6 tests --ignore tests/gpu &
wait
set +m
said memcheck racecheck initcheck triton tests
bench train 40
bench memory 30
bench setup 30

for name in "${failed[@]}"; do
  printf '\n===== %s failed; the end of its log:\n' "$name"
  grep -aE '^(FAILED|ERROR|E  )|Error|ERROR SUMMARY' "$logs/$name.log" | tail -n 12 | cut -c1-200
  tail -n 8 "$logs/$name.log" | cut -c1-200
done
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}" | tee -a "$out/summary.txt"
flush
exit ${#failed[@]}
