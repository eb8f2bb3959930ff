"""The manifest of an export: what determines it, and what each run into it was; refusals name the difference."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import ExportError, InputError
from ..keys import own_code
from ..method import Method
from ..models.loading import LoadedModel
from .entries import Entry
from .rows import printable
from .settings import ExportSettings
from .shard import MapShape

LAYOUT = 1
"""Of the files; raised when the same files come to mean something else."""

_PACKAGES = ("torch", "timm", "numpy", "pillow", "opencv-python-headless", "zarr", "pyarrow")


def describe(
    model: LoadedModel, methods: Mapping[str, Method], shapes: Mapping[str, MapShape], settings: ExportSettings
) -> dict[str, Any]:
    """All that determines what is stored, besides the images; plain JSON types."""
    described = {
        label: {
            "name": method.info.name,
            "options": method.options,
            "class_specific": method.info.class_specific,
            "approximate": model.subject.adapter.approximate if method.follows_blocks else None,
            # where maps take up just the image, as nearly always, exports stay what they were without this entry
            **{name: value for name, value in asdict(shapes[label]).items() if (name, value) != ("extent", None)},
            **dict(zip(("code",), own_code(type(method)), strict=False)),
        }
        for label, method in methods.items()
    }
    everything = {"model": model.identity(), "methods": described, "settings": settings.determining()}
    plain: dict[str, Any] = json.loads(json.dumps(everything))
    return plain


def circumstances(settings: ExportSettings, device: str) -> dict[str, Any]:
    """What is noted of a run and determines nothing."""
    return {
        "started": now(),
        "finished": None,
        "versions": {name: _version(name) for name in ("vitexplain", *_PACKAGES)},
        "python": platform.python_version(),
        "host": platform.node(),
        "device": device,
        "engine": settings.engine,
        "batch_size": settings.batch_size,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that was written.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        layout = manifest["layout"]
    except FileNotFoundError as error:
        raise InputError(f"no export in {str(path.parent)!r}: manifest.json is missing; check the folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {type(error).__name__}: {error}; expected a manifest") from error
    if layout != LAYOUT:
        raise InputError(
            f"{str(path)!r} has layout {layout}, expected {LAYOUT}: read it with the version that wrote it"
        )
    return manifest


def check_same(stored: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on with something else than what the folder holds.

    Raises:
        ExportError: a difference; the message names it, with both values.
    """
    found = list(_differences("", stored, asked))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ExportError(
            f"the folder {str(folder)!r} holds another export: {'; '.join(found[:3])}{more}. Choose another folder, or "
            "the same settings"
        )


def check_entries(stored: Sequence[Entry], asked: Sequence[Entry], folder: Path) -> None:
    """Refuses to go on with other images than those that the folder was begun with.

    Raises:
        ExportError: images were added, left out, or are in another order; the message names the first.
    """
    before, now_ = [_comparable(each) for each in stored], [_comparable(each) for each in asked]
    if before == now_:
        return
    added, gone = sorted(set(now_) - set(before), key=str), sorted(set(before) - set(now_), key=str)
    parts = [f"{len(added)} were not there before (such as {added[0][0]!r})"] if added else []
    parts += [f"{len(gone)} are missing (such as {gone[0][0]!r})"] if gone else []
    raise ExportError(
        f"the folder {str(folder)!r} was begun with {len(before)} images, now there are {len(now_)}: "
        f"{' and '.join(parts) or 'they are in another order'}. Export into another folder, or give the same inputs"
    )


def _comparable(entry: Entry) -> tuple[Any, ...]:
    return tuple(printable(each) if isinstance(each, str) else each for each in entry.identity)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _differences(name: str, stored: Any, asked: Any) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*stored, *asked]):
            yield from _differences(
                f"{name}.{key}" if name else str(key), stored.get(key, "none"), asked.get(key, "none")
            )
    elif stored != asked:
        yield f"{name} is {_short(stored)} there, and {_short(asked)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _version(package: str) -> str:
    if package == "vitexplain":
        from .. import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
