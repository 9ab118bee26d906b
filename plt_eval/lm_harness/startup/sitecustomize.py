"""Lets lm-eval's own command know the model `plt`, where this folder is on PYTHONPATH:

    PYTHONPATH="$(plt-eval lm-eval --hook)" lm-eval run --model plt --model_args pretrained=CHECKPOINT,loops=2 ...

Python imports a module of this name whenever it starts. Nothing more happens before lm-eval's list of models is
imported, and then only a name is added to that. A sitecustomize of the system, which this one hides, is run as it would
have been.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path

_LISTING = "lm_eval.models"
_MODEL, _TARGET = "plt", "plt_eval.lm_harness.models:PltLM"  # as plt_eval.lm_harness.official has them


class _AfterListing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and runs lm-eval's list of models as Python would have, and then adds ours to it."""

    def __init__(self):
        self._loader = None

    def find_spec(self, name, path=None, target=None):  # noqa: ARG002
        if name != _LISTING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self._loader
        from lm_eval.api.registry import model_registry

        if _MODEL not in model_registry:
            model_registry.register(_MODEL, target=_TARGET)


def _run_hidden():
    """The sitecustomize that Python would have found without this folder, if there is one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec(__name__, others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _AfterListing())
_run_hidden()
