#!/usr/bin/env bash
# What benchmarks/gpu_session.sh would do on a GPU machine, as far as a machine without a GPU can tell.
#
#   benchmarks/gpu_rehearsal.sh [PATH..]     PATH..: ignored paths that travel along, such as the built extension
#
# The checkout is copied, without its history; python and torch are those of a GPU machine, in VENV (made when it is
# missing, some 5 GB), and so are the packages: not all that the tests use are there. nvidia-smi, compute-sanitizer and
# ncu are stubs, git is gone, and after ten minutes all is killed. Then: what is left, has anything that git tracks been
# written to? What fails should need a device. CORES: on which cores (0).
#
# To carry a built extension: "$VENV/bin/python" setup.py build_ext --inplace, and askew_cuda/_C*.so as a PATH.
set -uo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-build/gpu_venv}
packages="torch==2.11.0 triton==3.6.0 ninja pybind11 pytest pytest-xdist pytest-timeout psutil scipy hypothesis
  safetensors setuptools wheel scikit-learn matplotlib tqdm"
if [ ! -x "$venv/bin/python" ]; then
  python3.12 -m venv "$venv" || { echo "a Python 3.12 is needed on the PATH"; exit 1; }
  # shellcheck disable=SC2086
  "$venv/bin/pip" install -q $packages || exit 1
fi
python=$(realpath -s "$venv/bin/python")
work=$(mktemp -d)
mkdir -p "$work/tree" "$work/bin" "$work/out"
git ls-files -co --exclude-standard | tar cf - -T - "$@" | tar xf - -C "$work/tree"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >"$work/bin/python3"
printf '#!/bin/sh\necho "stub of a GPU, 1, 1 MiB, 1 MHz"\n' >"$work/bin/nvidia-smi"
printf '#!/bin/sh\nexit 127\n' >"$work/bin/git"
for tool in compute-sanitizer ncu; do # options with a value, then flags, then the program
  cat >"$work/bin/$tool" <<'STUB'
#!/bin/bash
while [ $# -gt 0 ]; do
  case "$1" in
    --tool | --error-exitcode | --clock-control | --section | -k | -c | -s) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
echo "stub of $(basename "$0")"
exec "$@"
STUB
done
chmod +x "$work"/bin/*

cd "$work/tree"
find . -type f -exec sha256sum {} + | sort >"$work/before"
start=$SECONDS
PATH=$work/bin:$PATH OUT=$work/out TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} ASKEW_COMMIT=rehearsal \
  timeout -s KILL 600 taskset -c "${CORES:-0}" nice bash benchmarks/gpu_session.sh >"$work/session.log" 2>&1
echo "rc $? after $((SECONDS - start)) s (137: killed after ten minutes)"
cut -c1-160 "$work/out/summary.txt"

echo "--- what is left"
find "$work/out" -type f -printf '%9s  %P\n'
[ "$(find "$work/out" -type f | wc -l)" -eq 2 ] || echo "WRONG: two files are wanted"
find "$work/out" -type f -size +16M -printf 'WRONG: %P is larger than 16 MiB\n'
tar tzf "$work/out/logs.tgz" | grep json || echo "WRONG: no JSON"
echo "--- files of the checkout that have changed"
sha256sum --quiet -c "$work/before" 2>/dev/null | sed 's/^/WRONG: /'
echo "--- whole log: $work/session.log; $work/out"
