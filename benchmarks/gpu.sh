#!/usr/bin/env bash
# Checks the kernels on the GPU, then measures losses, soft prompts, ranking and training steps: under ten minutes on an
# H100.
#
#     benchmarks/gpu.sh [OUT.json] [SECONDS]
#
# OUT.json, of the losses, is benchmarks/results/<device>.json by default; the others lie beside it, their names with
# soft-prompt-, ranking- and step- before it. SECONDS, 520 by default, is for everything. Each has until this share of
# the time is over, and what one leaves goes to the next: check 20%, losses 42%, soft prompts 54%, ranking 70%, steps
# 100%. Each ends with a table and says what was not reached. Needs torch and Triton; steps need the packages of
# karma-fast[train]; other libraries are compared where they are found:
#
#     pip install --no-deps --target rivals memeff cut-cross-entropy inf-cl
#     PYTHONPATH=rivals benchmarks/gpu.sh
#
# The exit status is that of the check, or of the first that did not run to its end. Without a GPU the cases for a CPU
# run.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
seconds=${2:-520}
out=${1:-}
status=0
# the steps that say most: 205 windows and all their texts, then 4096 windows, with the memory of an 8 GB card
steps=(--cases qwen2.5-1.5b-205-all-1-8gib qwen2.5-1.5b-4096-last-0.05-8gib)

left() {  # until so many percent of the time are over; bash counts SECONDS since it started
  local rest=$((seconds * $1 / 100 - SECONDS))
  echo "$((rest > 0 ? rest : 0))"
}

measure() {  # MODULE, what goes before the name of its file, percent, more arguments
  local module=$1 prefix=$2 percent=$3 to=()
  [ -z "$out" ] || to=(--out "$(dirname "$out")/$prefix$(basename "$out")")
  "$python" -m "benchmarks.$module" ${to[@]+"${to[@]}"} "${@:4}" --budget "$(left "$percent")"
  local code=$?
  status=$((status ? status : code))
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no CUDA device: checking and measuring on the CPU instead"
  steps=()
fi
"$python" -m benchmarks.check --seconds "$(left 20)"
checked=$?
measure run "" 42
measure soft_prompt soft-prompt- 54
measure ranking ranking- 70
if "$python" -c 'import transformers, peft, accelerate, bitsandbytes'; then
  measure step step- 100 ${steps[@]+"${steps[@]}"}
else
  echo "No training steps: they need pip install karma-fast[train]"
fi
if [ "$checked" -ne 0 ]; then
  echo "The check above FAILED: these figures are of kernels that are wrong somewhere."
fi
exit $((checked ? checked : status))
