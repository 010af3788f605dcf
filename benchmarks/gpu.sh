#!/usr/bin/env bash
# Checks the kernels against float64 on the GPU, then measures them: under ten minutes on an H100.
#
#     benchmarks/gpu.sh [OUT.json] [SECONDS]
#
# OUT.json is benchmarks/results/<device>.json by default. SECONDS, 520 by default, is for everything, a fifth of it for
# the check. What was not reached is said. Needs torch and Triton; other libraries are compared where they are found:
#
#     pip install --no-deps --target rivals memeff cut-cross-entropy inf-cl
#     PYTHONPATH=rivals benchmarks/gpu.sh
#
# The exit status is that of the check. Without a GPU the cases for a CPU run.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
seconds=${2:-520}
out=(${1:+--out "$1"})

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no CUDA device: checking and measuring on the CPU instead"
fi
"$python" -m benchmarks.check --seconds "$((seconds / 5))"
checked=$?
"$python" -m benchmarks.run "${out[@]}" --budget "$((seconds - seconds / 5))"
measured=$?
if [ "$checked" -ne 0 ]; then
  echo "The check above FAILED: these figures are of kernels that are wrong somewhere."
fi
exit $((checked ? checked : measured))
