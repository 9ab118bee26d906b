"""The environments in which BigCodeBench's tests run.

The authors run them in a Docker image with Python 3.10 and their Requirements/requirements-eval.txt. These are its
packages for Python 3.11 in the same versions, where they exist for it. Others, which are the next that do: keras and
tensorflow 2.12 (2.11), numpy 1.23.5 (1.21.2), scipy 1.9.3 (1.7.2), numba 0.57.1 (0.55.0), networkx 2.8.8 (2.6.3),
scikit-image 0.20.0 (0.18.0). What these require in turn is pinned too.
"""

from __future__ import annotations

import re
from pathlib import Path

from plt_benchmarks.environments import Environment

BIGCODEBENCH_VERSION = "0.2.5"
_SMALL = frozenset({
    # What 1,033 of the 1,140 problems need, ...
    "beautifulsoup4", "faker", "matplotlib", "numpy", "pandas", "pillow", "psutil", "python-dateutil", "pytz", "regex",
    "requests", "scikit-learn", "scipy", "seaborn", "tree-sitter", "tree-sitter-python",
    # ... and what that requires in turn.
    "certifi", "charset-normalizer", "contourpy", "cycler", "fonttools", "idna", "joblib", "kiwisolver", "packaging",
    "pyparsing", "six", "soupsieve", "threadpoolctl", "tzdata", "urllib3",
})  # fmt: skip

ONLY_FULL = frozenset({
    "Crypto", "Levenshtein", "blake3", "chardet", "cryptography", "cv2", "django", "docx", "flask", "flask_login",
    "flask_mail", "flask_restful", "flask_wtf", "folium", "gensim", "geopandas", "geopy", "holidays", "keras",
    "librosa", "lxml", "mechanize", "natsort", "networkx", "nltk", "numba", "openpyxl", "prettytable", "pyfakefs",
    "pyquery", "pytesseract", "python_http_client", "requests_mock", "rsa", "selenium", "sendgrid", "shapely",
    "skimage", "soundfile", "statsmodels", "sympy", "tensorflow", "textblob", "texttable", "werkzeug", "wikipedia",
    "wordcloud", "wordninja", "wtforms", "xlrd", "xlwt", "xmltodict", "yaml",
})  # fmt: skip
"""Modules that only the full environment has."""


def _pinned() -> tuple[str, ...]:
    lines = (Path(__file__).parents[1] / "data" / "bigcodebench_requirements.txt").read_text().splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


_NLTK_DATA = ("averaged_perceptron_tagger", "brown", "punkt", "stopwords", "vader_lexicon", "wordnet", "words")
_FETCH = f"""
import os, sys, nltk
folder = os.path.join(sys.prefix, "nltk_data")
if not all([nltk.download(name, download_dir=folder, quiet=True) for name in {_NLTK_DATA}]):
    sys.exit("NLTK's server gave no data")
open(os.path.join(folder, "complete"), "w").close()
"""
"""NLTK looks for data below sys.prefix, where jobs in the sandbox find it too."""

FULL = Environment(
    "bigcodebench",
    "BigCodeBench",
    _pinned(),
    bare=(f"bigcodebench=={BIGCODEBENCH_VERSION}",),
    python_version="3.11",
    extras=(("NLTK's data, which 17 problems need", ("-c", _FETCH)),),
)
SMALL = Environment(
    "bigcodebench-small",
    "BigCodeBench, but for 107 problems,",
    tuple(line for line in _pinned() if _name(line) in _SMALL),
    bare=(f"bigcodebench=={BIGCODEBENCH_VERSION}",),
    python_version="3.11",
)


def environment() -> Environment:
    """The full one, or the small one where only that is installed."""
    return SMALL if SMALL.present and not FULL.present else FULL


def has_nltk_data(where: Environment) -> bool:
    """Whether NLTK's data could be fetched when the environment was made."""
    return (where.folder / "nltk_data" / "complete").is_file()
