"""Without a GPU, Triton's kernels run in its interpreter. That is decided when triton is first imported, which
transformers does, so it is said here, before any test module loads."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest has put this folder on the path, where tests/vllm would pass for a package called vllm.
sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
