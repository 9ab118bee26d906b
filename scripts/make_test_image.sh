#!/bin/sh
# Make the container image that the tests of the docker sandbox use, from the Python of this machine, without pulling:
# the interpreter, its standard library, the shared libraries they need, and what the code suites' scorer imports, if
# that is installed. Does nothing when the image is there.
#
#     [PYTHON=python3] scripts/make_test_image.sh [IMAGE]
set -eu

image=${1:-plt-eval-sandbox-test:latest}
if docker image inspect "$image" >/dev/null 2>&1; then
    exit 0
fi
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

"${PYTHON:-python3}" - "$root" <<'END'
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

root = Path(sys.argv[1])
SCORER = ("evalplus", "numpy", "numpy.libs", "psutil", "appdirs.py", "multipledispatch", "tempdir", "tqdm", "wget.py")


def inside(path):
    target = root / str(path).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def add_libraries(binaries):
    told = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    for word in told.split():
        if word.startswith("/") and not word.endswith(":") and not inside(word).exists():
            shutil.copy2(os.path.realpath(word), inside(word))


python = Path(os.path.realpath(sys.executable))
stdlib = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix}))
skip = shutil.ignore_patterns("test", "tests", "idlelib", "ensurepip", "site-packages", "dist-packages", "config-*")
shutil.copy2(python, inside(python))
shutil.copytree(stdlib, inside(stdlib), ignore=skip)
ask = [python, "-I", "-c", "import site; print(site.getsitepackages()[0])"]
packages = inside(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
packages.mkdir(parents=True, exist_ok=True)
if scorer := find_spec("evalplus"):
    installed = Path(scorer.origin).parents[1]
    for name in SCORER:
        if (installed / name).is_dir():
            shutil.copytree(installed / name, packages / name, ignore=shutil.ignore_patterns("tests"))
        elif (installed / name).exists():
            shutil.copy2(installed / name, packages / name)
add_libraries([python, *inside(stdlib).rglob("*.so"), *packages.rglob("*.so")])
for name in ("tmp", "proc", "sys", "dev", "etc", "usr/bin", "sandbox"):
    (root / name).mkdir(parents=True, exist_ok=True)
if not (root / "usr/bin/python3").exists():
    (root / "usr/bin/python3").symlink_to(python)
END

chmod -R go+rX "$root"
chmod 1777 "$root/tmp"
tar -C "$root" --owner=0 --group=0 -c . |
    docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin' - "$image" >/dev/null
