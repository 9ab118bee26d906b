#!/usr/bin/env bash
# Checks and times all that only a GPU can prove: kernels, CUDA graphs, decode at the 7B shape. The steps took 5.5
# minutes in all on an H100 and an H200 with 16 cores and pytest-xdist (without it, the tests alone take several more).
#
#   scripts/gpu_check.sh [--tiny] [--device cpu] [--odd-shapes] [--out FOLDER]   tables here, JSON in FOLDER (gpu-check)
#   scripts/gpu_check.sh --vllm [--tiny] [--device cpu] [--out FOLDER]           the same of PLT on vLLM, and no more
#
# Run it in an environment with this project installed (pip install -e ".[test]" pytest-xdist), or name its Python in
# $PYTHON. Without --vllm the 7B shape takes some 60 GB of GPU memory, for the gates hold the weights in float32 too.
# --odd-shapes runs the kernels' other tests on the device too: many small shapes, each of which is compiled.
# --vllm wants an environment with vLLM (pip install -e ".[vllm]" pytest pytest-timeout hypothesis) and a GPU with 120 GB
# to itself: each engine has weights of its own.
# --tiny --device cpu goes through the same steps on a machine without a GPU, and proves nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda out=gpu-check tiny= odd= vllm=
while [ $# -gt 0 ]; do
  case "$1" in
    --tiny) tiny=1 ;;
    --odd-shapes) odd=1 ;;
    --vllm) vllm=1 ;;
    --device) device=${2:?--device needs cuda or cpu}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) echo "gpu_check.sh: $1 is no option; expected --tiny, --device, --odd-shapes, --vllm, --out" >&2; exit 2 ;;
  esac
  shift
done
python=${PYTHON:-python}
case "$device$tiny" in
  cuda | cuda1) "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check.sh: torch sees no CUDA device; --tiny --device cpu is a dry run without one" >&2; exit 2; } ;;
  cpu1) export TRITON_INTERPRET=1 ;;
  *) echo "gpu_check.sh: --device $device: expected cuda, or cpu together with --tiny" >&2; exit 2 ;;
esac
mkdir -p "$out"
bench() { "$python" -m plt_eval bench "$@" --device "$device"; }

if [ -n "$vllm" ]; then
  echo "== PLT on vLLM against plt_model"
  PLT_EVAL_REQUIRE_VLLM=1 "$python" -m pytest -q -m "slow or not slow" tests/vllm ${tiny:+--collect-only}
  echo "== decode in vLLM, one trip and R, by batch"
  for loops in 2 4; do # the engines of both, with the weights that the gates compare with, are too much for one GPU
    if [ -n "$tiny" ]; then
      bench vllm --shape small --loops $loops --context 48 --tokens 4 --rounds 1 --json "$out/vllm-$loops.json"
    else
      bench vllm --shape 7b --loops $loops --batch 1,8,32 --context 512 --rounds 5 --json "$out/vllm-$loops.json"
    fi
  done
  echo "== done: $out"
  exit
fi

# Most of the tests' time is the compilers': in parallel, where pytest-xdist is there.
beside=$("$python" -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null || true)

echo "== kernels, graphs, sessions and diagnostics against their definitions"
if [ "$device" = cuda ]; then
  # shellcheck disable=SC2086
  "$python" -m pytest -q $beside -m gpu tests/model tests/diagnostics
  if [ -n "$odd" ]; then
    # shellcheck disable=SC2086
    "$python" -m pytest -q $beside tests/model/test_kernel_gswa_decode.py tests/model/test_kernel_gswa_prefill.py \
      tests/model/test_attention_choice.py -k "not sm_90 and not hopper"
  fi
else
  "$python" -m pytest -q -m gpu tests/model tests/diagnostics --collect-only | tail -1
fi

echo "== the fused prefill kernel against two attention calls and the blend"
"$python" scripts/gpu_kernels.py --device "$device" ${tiny:+--tiny} --json "$out/kernels.json"

echo "== decode, one text, context 4096"
if [ -n "$tiny" ]; then
  bench decode --shape small --loops 1,2,4 --context 64 --tokens 4 --rounds 2 --baselines trips --json "$out/decode.json"
  bench prefill --shape small --loops 1,2 --context 128 --rounds 1 --json "$out/prefill.json"
  bench train --shape small --loops 1,2 --context 64 --rounds 1 --json "$out/train.json"
else
  bench decode --shape 7b --loops 1,2,4 --context 4096 --tokens 32 --rounds 10 --baselines trips --json "$out/decode.json"
  bench prefill --shape 7b --loops 1,2 --context 4096 --rounds 3 --json "$out/prefill.json"
  bench train --shape medium --loops 1,2 --batch 8 --context 2048 --rounds 5 --json "$out/train.json"
fi
echo "== done: $out"
