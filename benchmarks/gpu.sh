#!/usr/bin/env bash
# Checks the kernels on the GPU, then measures the losses and ranking: under ten minutes on an H100.
#
#     benchmarks/gpu.sh [OUT.json] [SECONDS]
#
# OUT.json is benchmarks/results/<device>.json by default; ranking goes to ranking-<device>.json beside it. SECONDS, 520
# by default, is for everything: the check ends after a fifth of it, the losses after seven tenths, ranking has the
# rest; what one leaves of its time goes to the next. Each ends with a table and says what was not reached. Needs torch
# and Triton; other libraries are compared where they are found:
#
#     pip install --no-deps --target rivals memeff cut-cross-entropy inf-cl
#     PYTHONPATH=rivals benchmarks/gpu.sh
#
# The exit status is that of the check, or of what did not run to its end. Without a GPU the cases for a CPU run.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
seconds=${2:-520}
out=(${1:+--out "$1"})
ranking=(${1:+--out "$(dirname "$1")/ranking-$(basename "$1")"})

left() {  # until so many tenths of the time are over; bash counts SECONDS since it started
  local rest=$((seconds * $1 / 10 - SECONDS))
  echo "$((rest > 0 ? rest : 0))"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no CUDA device: checking and measuring on the CPU instead"
fi
"$python" -m benchmarks.check --seconds "$(left 2)"
checked=$?
"$python" -m benchmarks.run ${out[@]+"${out[@]}"} --budget "$(left 7)"
measured=$?
"$python" -m benchmarks.ranking ${ranking[@]+"${ranking[@]}"} --budget "$(left 10)"
ranked=$?
if [ "$checked" -ne 0 ]; then
  echo "The check above FAILED: these figures are of kernels that are wrong somewhere."
fi
exit $((checked ? checked : measured ? measured : ranked))
