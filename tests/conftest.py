"""Without a GPU, Triton's kernels run in its interpreter. That is decided when triton is first imported, which
transformers does, so it is said here, before any test module loads."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
