"""Put a finished study's models where `--model NAME` finds them, with all that says how they came about.

    plt-eval study --recipe plt-tiny --loops 1-4 --out results/studies/plt-tiny
    python scripts/bundle_family.py results/studies/plt-tiny --name plt-tiny --summary "..."

Writes plt_eval/bundled/NAME/: family.json, recipe.yaml, rR/ (checkpoint, tokenizer, metrics.jsonl, result.json), data/
(the manifests, and for installed packages the table of files), study.json and summary.md; and the last two into
results/NAME/ for people.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
from pathlib import Path

import yaml

from plt_eval.models import BUNDLED
from plt_eval.study.records import STUDY, SUMMARY, Study, read_study
from plt_model.training.shards import Manifest

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ABSOLUTE = re.compile(r"(?:^|(?<=[=,]))/[^,=]*[^,=/][^,=]*")
"""A path from the root on, but not the root itself."""


def bundle(folder: Path, name: str, summary: str, seed: int) -> Path:
    """Returns the family's folder. Raises ValueError for a study that is not complete."""
    study = read_study(folder)
    if study.status != "complete":
        raise ValueError(f"{folder}: the study is {study.status}: run it to its end first")
    family = BUNDLED / name
    shutil.rmtree(family, ignore_errors=True)
    family.mkdir(parents=True)
    for variant in study.variants:
        if variant.seed == seed:
            copy_member(folder / variant.model, family / f"r{variant.loops}")
    copy_data(folder / study.data, family / "data", study)
    described = {"name": name, "loops": list(study.loops), "recipe": name, "summary": summary}
    (family / "family.json").write_text(json.dumps(described, indent=1) + "\n")
    (family / "recipe.yaml").write_text(yaml.safe_dump(study.recipe, sort_keys=False))
    shown = ROOT / "results" / name
    shown.mkdir(parents=True, exist_ok=True)
    for target in (family, shown):
        for file in (STUDY, SUMMARY):
            shutil.copyfile(folder / file, target / file)
    return family


def copy_member(model: Path, target: Path) -> None:
    """One checkpoint, and the log and result of its training."""
    target.mkdir()
    for file in CHECKPOINT:
        shutil.copyfile(model / file, target / file)
    for file in ("metrics.jsonl", "result.json"):
        shutil.copyfile(model.parent / file, target / file)


def copy_data(data: Path, target: Path, study: Study) -> None:
    """What each entry of the mix was made of, without the tokens."""
    for entry in study.recipe["data"]:
        source, folder = data / entry["name"], target / entry["name"]
        folder.mkdir(parents=True)
        text = (source / "manifest.json").read_text(encoding="utf-8")
        (folder / "manifest.json").write_text(portable_manifest(text), encoding="utf-8")
        table = source / "files.jsonl"
        if table.exists():
            # No time stamp, so that the same table gives the same file.
            (folder / "files.jsonl.gz").write_bytes(gzip.compress(table.read_bytes(), mtime=0))


def portable_manifest(text: str) -> str:
    """A manifest whose command names files and folders of this machine by their last component only.

    An absolute path may be an argument, or a value in one: --out=/work/data, kind=folder,path=/home/me/src.
    """
    manifest = Manifest.model_validate_json(text)
    command = tuple(ABSOLUTE.sub(lambda path: Path(path[0]).name, argument) for argument in manifest.command)
    return manifest.model_copy(update={"command": command}).model_dump_json(indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the finished study")
    parser.add_argument("--name", required=True)
    parser.add_argument("--summary", required=True, help="one line for listings")
    parser.add_argument("--seed", type=int, default=0, help="whose models to bundle")
    args = parser.parse_args()
    family = bundle(args.study, args.name, args.summary, args.seed)
    size = sum(path.stat().st_size for path in family.rglob("*") if path.is_file())
    print(f"{family}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
