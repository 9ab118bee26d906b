"""What data folders hold, for `plt-eval data show`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from plt_eval.errors import UserError
from plt_model.training.shards import (
    MANIFEST,
    Manifest,
    ShardError,
    SourceRecord,
    TokenData,
    file_sha256,
    read_manifest,
)


def open_folders(folder: Path) -> dict[Path, Manifest]:
    """The data folder `folder`, or those right below it, with their sizes checked. Raises UserError."""
    paths = [folder]
    if not (folder / MANIFEST).exists():
        paths = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) or paths
    try:
        manifests = {path: read_manifest(path) for path in paths}
        for path, manifest in manifests.items():
            for split in manifest.splits:
                TokenData.open(path, split)
    except ShardError as error:
        raise UserError(str(error)) from error
    return manifests


def verify_folder(folder: Path, manifest: Manifest) -> None:
    """Read every file that the manifest names against its SHA-256. Raises UserError naming the first that differs."""
    try:
        for split in manifest.splits:
            TokenData.open(folder, split).verify()
    except ShardError as error:
        raise UserError(str(error)) from error
    if manifest.files is None:
        return
    path = folder / manifest.files.file
    if not path.is_file():
        raise UserError(f"{path}: missing, the manifest says {manifest.files.rows} rows")
    found = file_sha256(path)
    if found != manifest.files.sha256:
        raise UserError(f"{path}: SHA-256 is {found}, the manifest says {manifest.files.sha256}")


def display_names(manifests: Mapping[Path, Manifest]) -> dict[Path, str]:
    """What to call each folder: its data's name, or the path where several data have that name."""
    counts = Counter(manifest.name for manifest in manifests.values())
    return {path: manifest.name if counts[manifest.name] == 1 else str(path) for path, manifest in manifests.items()}


def source_tables(manifest: Manifest, name: str) -> list[Table]:
    """The sources of the data called `name`; then, for each that has them, its packages, and for every other its
    licences."""
    tables = [_sources(manifest, name)]
    for source in manifest.sources:
        tables.append(_packages(source) if source.packages else _licences(source))
    return tables


def _sources(manifest: Manifest, name: str) -> Table:
    table = _table(f"sources of {name}", ("kind", "location", "revision"), ("read", "kept", "bytes", "duplicates"))
    table.add_column("rejected", overflow="fold")
    for source in manifest.sources:
        counts = (source.read, source.kept.documents, source.kept.bytes, source.duplicates)
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in source.rejected.items())
        _row(table, (source.kind, source.location, source.revision or "-"), counts, (rejected or "-",))
    return table


def _packages(source: SourceRecord) -> Table:
    """Largest first; the standard library's modules are added up, by split."""
    table = _table("packages", ("package", "version", "licence", "split"), ("documents", "bytes", "left out"))
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for row in source.packages:
        key: tuple[str, str, str, str] = (row.package.partition("/")[0], row.version, row.licence, row.split)
        total = sums.setdefault(key, [0, 0, 0])
        for place, count in enumerate((row.documents, row.bytes, row.left_out)):
            total[place] += count
    for key, counts in sorted(sums.items(), key=lambda item: (-item[1][1], item[0])):
        _row(table, key, counts)
    return table


def _licences(source: SourceRecord) -> Table:
    table = _table(f"licences of {source.kind} {source.location}", ("licence",), ("documents", "bytes"))
    for licence, amount in sorted(source.licences.items(), key=lambda item: (-item[1].bytes, item[0])):
        _row(table, (licence,), (amount.documents, amount.bytes))
    return table


def _table(title: str, names: Iterable[str], counts: Iterable[str]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for heading in names:
        table.add_column(heading, overflow="fold")
    for heading in counts:
        table.add_column(heading, justify="right")
    return table


def _row(table: Table, names: Iterable[str], counts: Iterable[int], more: Iterable[str] = ()) -> None:
    table.add_row(*(Text(name) for name in names), *(f"{count:,}" for count in counts), *(Text(one) for one in more))
