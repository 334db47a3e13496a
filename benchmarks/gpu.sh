#!/usr/bin/env bash
# Every figure that we promise of a GPU, in at most nine minutes: anti-gradient control, anchored as well, exact
# neighbours, fast settings of training, and, with two GPUs, an averaging over NCCL. In a clone, after installation:
#
#     benchmarks/gpu.sh            all of it
#     benchmarks/gpu.sh --list     what it would run
#
# A part that fails or takes too long is named at the end; the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=(
  "90 python -m benchmarks.agc_step --pairs 30"
  "90 python -m benchmarks.agc_step --pairs 10 --reference held_out"
  "120 python -m benchmarks.neighbors --full --noise --device cuda"
  "150 python -m benchmarks.throughput --steps 30 --warm-up 10"
)
two="60 python -m benchmarks.averaging --processes 2 --device cuda"

if [[ "${1:-}" == --list ]]; then
  printf '%s\n' "${parts[@]}" "$two"
  exit
fi
if [[ $# -gt 0 ]]; then
  echo "Expected no argument, or --list, but got $*. See the first lines of this file." >&2
  exit 2
fi
if ! gpus=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null); then
  echo "Expected an NVIDIA GPU, but nvidia-smi finds none. The other benchmarks run on a CPU: see docs/performance.md." >&2
  exit 2
fi
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "Expected a PyTorch that sees the GPU, but torch.cuda.is_available() is False. Install a CUDA build." >&2
  exit 2
fi
echo "$gpus"
if [[ $(wc -l <<< "$gpus") -ge 2 ]]; then parts+=("$two"); else echo "One GPU: no averaging over NCCL."; fi

failed=()
for part in "${parts[@]}"; do
  read -r limit command <<< "$part"
  printf '\n$ %s\n' "$command"
  # shellcheck disable=SC2086
  timeout -k 5 "$limit" $command || failed+=("$command (exit status $?; 124 = longer than $limit s)")
done
if [[ ${#failed[@]} -gt 0 ]]; then
  printf '\nNot measured:\n'
  printf '%s\n' "${failed[@]}"
  exit 1
fi
