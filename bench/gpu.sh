#!/usr/bin/env bash
# What only a machine with a GPU can tell, in one command and under nine minutes, offline:
#
#   bench/gpu.sh OUTDIR [--full]
#
# Builds for the GPU at hand, with the packages of this machine's python3 (or of $PYTHON): torch, cupy, numpy, pybind11,
# scikit-build-core, cmake, ninja, pytest, hypothesis; and nvcc. Then tests, compute-sanitizer where it works, benchmarks
# beside cuDNN, and the CPU engine over the cores. --full adds the grid of all sizes to the rows. Each phase has a log in
# OUTDIR; the next one runs even if it fails, and the exit status is then 1. gpu.json and scaling.json there grow from what
# bench/results has, so that runs add up, and are copied back to it.
set -euo pipefail

OUT=$(realpath -m "${1:?usage: bench/gpu.sh OUTDIR [--full]}")
FULL=()
[[ ${2:-} != --full ]] || FULL=(--full)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LIMIT=${RNNFAST_GPU_SECONDS:-520}  # for everything
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"

# The package is installed beside the machine's own ones: a virtual environment within another one would not see those.
export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# With a "+" where the tree is not the commit's, whatever records earlier runs have left in it.
commit() {
  local head
  head=$(git rev-parse HEAD 2>/dev/null) || return 0
  git diff --quiet HEAD -- . ':(exclude)bench/results' || head+=+
  printf %s "$head"
}
RNNFAST_COMMIT=${RNNFAST_COMMIT:-$(commit)}
export RNNFAST_COMMIT RNNFAST_BENCH_TIMEOUT=${RNNFAST_BENCH_TIMEOUT:-45}  # a kernel that hangs costs a row, not the phase

left() { echo $((LIMIT - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }

REPORT=() FAILED=0

# phase NAME SECONDS FUNCTION...: runs it in a shell of its own for so long at most, and less where little is left; status
# 77 of it means that there was nothing to run it on.
phase() {
  local name=$1 seconds begin=$SECONDS status=0 word=ok
  seconds=$(least "$2" "$(left)")
  shift 2
  printf '\n======== %s (%d s at most)\n' "$name" "$seconds"
  if ((seconds < 5)); then
    status=124
    echo "no time left" | tee "$OUT/$name.log"
  else
    timeout --kill-after=5 "$seconds" bash -euo pipefail -c '"$@"' - "$@" >"$OUT/$name.log" 2>&1 </dev/null || status=$?
    tail -n 5 "$OUT/$name.log"
  fi
  case $status in
    0) ;;
    77) word=skipped ;;
    124 | 137) word='FAILED: out of time' ;;
    *) word="FAILED: status $status" ;;
  esac
  [[ $word != FAILED* ]] || FAILED=1
  REPORT+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - begin)) "$word")")
}

# ---- the phases ----

build() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
  "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-compile --target "$WORK/site" .
  cd "$WORK"
  "$PYTHON" -m rnnfast info
  "$PYTHON" -c 'from rnnfast import _device; why = _device.unavailable(); print(why or "the CUDA engine runs"); raise SystemExit(bool(why))'
}

tests() {
  local more=(-vv -o faulthandler_timeout=40)  # of a test that hangs, the name and where it is
  ! "$PYTHON" -c 'import pytest_timeout' 2>/dev/null || more+=(--timeout=60 --timeout-method=thread)
  ! "$PYTHON" -c 'import xdist' 2>/dev/null || more+=(-n "$(least 8 "$(nproc)")")
  OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1 "$PYTHON" -m pytest tests/test_cuda_device.py -p no:cacheprovider -rs \
    --maxfail=40 --tb=short --durations=10 --junitxml="$WORK/tests.xml" "${more[@]}"
  ! grep -q '<skipped' "$WORK/tests.xml" || { echo "tests were skipped: there is no device for them"; return 1; }
}

# Small shapes, each array in memory of its own: the caches of PyTorch would hide what lies beyond an array's end.
sanitizer() {
  local tool check failed=0 quiet=(--report-api-errors no)  # libraries ask for what may fail
  tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  [[ -x $tool ]] || { echo "there is no compute-sanitizer"; return 77; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  timeout 60 "$tool" "${quiet[@]}" --error-exitcode 9 "$PYTHON" -c 'import torch; torch.ones(3, device="cuda").sum().item()' ||
    { echo "compute-sanitizer does not work here"; return 77; }
  for check in memcheck racecheck; do
    echo "-------- $check"
    "$tool" --tool "$check" "${quiet[@]}" --error-exitcode 9 "$PYTHON" -m pytest tests/test_cuda_device.py -p no:cacheprovider -k test_small || failed=1
    quiet=()
  done
  return $failed
}

rows() { "$PYTHON" bench/gpu.py rows --json "$OUT/gpu.json" --seconds "$@"; }
scaling() { "$PYTHON" bench/gpu.py scaling --json "$OUT/scaling.json" --seconds "$1"; }

main() {
  local file seconds
  for file in gpu scaling; do
    [[ -e $OUT/$file.json || ! -e bench/results/$file.json ]] || cp "bench/results/$file.json" "$OUT/$file.json"
  done
  phase build 200 build
  phase tests 130 tests
  phase sanitizer 90 sanitizer
  seconds=$(($(left) - 95))  # what remains, but for the phase after it
  phase rows $((seconds + 10)) rows $((seconds > 20 ? seconds - 10 : 10)) "${FULL[@]}"
  phase scaling 90 scaling 75
  for file in gpu scaling; do
    [[ ! -e $OUT/$file.json || $OUT/$file.json -ef bench/results/$file.json ]] || cp "$OUT/$file.json" bench/results/
  done
  {
    "$PYTHON" bench/gpu.py table "$OUT/gpu.json" "$OUT/scaling.json" || true
    printf '%s\n' "${REPORT[@]}" "commit ${RNNFAST_COMMIT:-unknown}, $SECONDS s in all"
  } 2>&1 | tee "$OUT/summary.txt"
  return $FAILED
}

export -f build tests sanitizer rows scaling least
export OUT WORK PYTHON
main
