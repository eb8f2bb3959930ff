"""What the drivers of the export share: real images repeated under new names, and what a folder's export holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitexplain.export import open_export
from vitexplain.images import find_images

PHOTOGRAPHS = (".jpg", ".jpeg")
"""Suffixes of what is repeated; masks are PNG files."""


def repeat_images(source: Path, folder: Path, count: int) -> list[Path]:
    """Links to the photographs below a folder, over and over, under new names.

    Args:
        source: searched recursively.
        folder: where the links go.
        count: how many there are to be.

    Returns:
        The links, `count` of them.
    """
    photographs = [path.resolve() for path in find_images(source) if path.suffix.lower() in PHOTOGRAPHS]
    if not photographs:
        raise SystemExit(f"no photographs below {source}; expected a folder with {' or '.join(PHOTOGRAPHS)}")
    folder.mkdir(parents=True, exist_ok=True)
    links = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, link in enumerate(links):
        if not link.is_symlink():
            link.symlink_to(photographs[number % len(photographs)])
    return links


def contents(folder: Path) -> dict[str, object]:
    """All that must not depend on how an export came about: scores and figures by image, and the pictures' content."""
    export = open_export(folder)
    found: dict[str, object] = {"complete": export.complete}
    for row in export.table().to_pylist():
        view = row["view"] and hashlib.sha256((folder / row["view"]).read_bytes()).hexdigest()
        found[f"{row['image']} {row['method']} {row['target']}"] = repr({**row, "view": (row["view"], view)})
    for method in export.methods:
        for shard in range(export.num_shards):
            scores = np.ascontiguousarray(export.all_scores(method, shard))
            found[f"{method} {shard}"] = hashlib.sha256(scores.tobytes()).hexdigest()
    return found


def shown(arguments: Sequence[str]) -> list[str]:
    """Arguments as a report shows them: of a folder or file of this machine, the last part of its path."""
    return [Path(each).name if Path(each).is_absolute() else each for each in arguments]
