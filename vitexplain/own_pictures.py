"""Which pictures earlier runs wrote, so that a search for images leaves them out."""

from __future__ import annotations

import json
import re
from pathlib import Path

VIEWS = "views"
"""The folder of the pictures, in that of an export."""

_MAP = re.compile(r"[a-z][a-z0-9_]*(-\d+)?-\d+")  # the method, with a number where it is there twice, and the class


def is_own_picture(file: Path) -> bool:
    """Whether a picture is an overlay of `explain` or a view of an export: what lies beside it says so."""
    return _is_overlay(file) or _is_view(file)


def is_record(file: Path) -> bool:
    """Whether a JSON file is a record that `explain` wrote, and not somebody else's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(content["maps"], list) and "vitexplain" in content["versions"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_overlay(file: Path) -> bool:
    if file.suffix != ".png" or not file.with_suffix(".npy").exists():
        return False
    parts = file.stem.split("-")  # the image's name may have more of them
    return any(
        _MAP.fullmatch("-".join(parts[count:])) and is_record(file.with_name(f"{'-'.join(parts[:count])}.json"))
        for count in range(1, len(parts))
    )


def _is_view(file: Path) -> bool:
    shard = file.absolute().parent
    export = shard.parent.parent
    return (
        shard.parent.name == VIEWS
        and shard.name.isdecimal()
        and (export / "inputs.parquet").is_file()
        and (export / "manifest.json").is_file()
    )
