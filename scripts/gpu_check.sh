#!/usr/bin/env bash
# Checks and times all that only a GPU can prove: kernels, CUDA graphs, decode at the 7B shape. Under 8 minutes on an H200.
#
#   scripts/gpu_check.sh [--tiny] [--device cpu] [--out FOLDER]      tables on the screen, JSON in FOLDER (gpu-check)
#
# Run it in an environment with this project installed (pip install -e ".[test]"), or name its Python in $PYTHON.
# --tiny --device cpu goes through the same steps on a machine without a GPU, and proves nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda out=gpu-check tiny=
while [ $# -gt 0 ]; do
  case "$1" in
    --tiny) tiny=1 ;;
    --device) device=${2:?--device needs cuda or cpu}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) echo "gpu_check.sh: $1 is no option; expected --tiny, --device, --out" >&2; exit 2 ;;
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

echo "== kernels and graphs against their definitions"
if [ "$device" = cuda ]; then
  "$python" -m pytest -q -m gpu tests/model
  "$python" -m pytest -q tests/model/test_kernel_gswa_decode.py tests/model/test_kernel_gswa_prefill.py \
    tests/model/test_attention_choice.py -k "not sm_90 and not hopper"
else
  "$python" -m pytest -q -m gpu tests/model --collect-only | tail -1
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
