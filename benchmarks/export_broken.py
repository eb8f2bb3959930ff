"""Odd and broken inputs: each is exported as it is explained alone, or listed with a reason; nothing else suffers.

``python -m vitexplain.benchmarks.export_broken --inputs 500 --output benchmarks/results``

The inputs lie between sound ones, so that every batch holds some of both.
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitexplain import VitExplainError, create_method, explain_with, export_heatmaps, load_model
from vitexplain.files import write_whole

from .measuring import machine_facts, markdown_table

Pixels = np.ndarray
_MODULE = "vitexplain.benchmarks.export_broken"


def _noise(seed: int, channels: int = 3) -> Pixels:
    pixels: Pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return pixels.repeat(6, 0).repeat(6, 1)


def _encoded(picture: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def _sound(seed: int) -> bytes:
    return _encoded(Image.fromarray(_noise(seed)), "PNG")


def _jpeg(seed: int) -> bytes:
    return _encoded(Image.fromarray(_noise(seed)), "JPEG", quality=90)


def _cmyk(seed: int) -> bytes:
    return _encoded(Image.fromarray(_noise(seed, 4), mode="CMYK"), "JPEG")


def _sixteen_bit(seed: int) -> bytes:
    return _encoded(Image.fromarray(_noise(seed)[..., 0].astype(np.uint16) * 257), "PNG")


def _animated(seed: int) -> bytes:
    frames = [Image.fromarray(_noise(seed + number)) for number in range(3)]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _one_pixel(seed: int) -> bytes:
    return _encoded(Image.new("RGB", (1, 1), (seed % 256, 40, 90)), "PNG")


def _huge_header(seed: int) -> bytes:
    """A PNG of 30,000 x 30,000 pixels, as far as its header goes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


ODD_PICTURES: Mapping[str, tuple[str, Callable[[int], bytes], bool]] = {
    "sound": (".png", _sound, True),
    "truncated JPEG": (".jpg", lambda seed: _jpeg(seed)[: 300 + seed % 50], False),
    "truncated PNG": (".png", lambda seed: _sound(seed)[:120], False),
    "empty": (".jpg", lambda seed: b"", False),
    "text": (".jpg", lambda seed: b"this is no picture\n" * 5, False),
    "web page": (".png", lambda seed: b"<!DOCTYPE html><html></html>", False),
    "random bytes": (".jpg", lambda seed: np.random.default_rng(seed).bytes(500), False),
    "1 x 1": (".png", _one_pixel, True),
    "header of 30,000 x 30,000": (".png", _huge_header, False),
    "CMYK": (".jpg", _cmyk, True),
    "16-bit": (".png", _sixteen_bit, True),
    "animated": (".gif", _animated, True),
    "wrong extension": (".gif", _jpeg, True),
    "unreadable": (".png", _sound, False),
    "gone": (".png", _sound, False),
    "same name": (".jpg", _jpeg, True),
    "unicode name": (".png", _sound, True),
    "very long name": (".png", _sound, True),
    "undecodable name": (".png", _sound, True),
    "very wide": (".png", lambda seed: _encoded(Image.new("RGB", (3000, 2), (9, 99, seed % 256)), "PNG"), True),
}
"""Kinds of input: suffix, content by seed, and whether it is a picture that can be explained."""


def make_inputs(folder: Path, count: int) -> dict[Path, bool]:
    """Writes odd pictures of all kinds, in turn.

    Args:
        folder: where to.
        count: how many.

    Returns:
        The files, and whether each can be explained.
    """
    files: dict[Path, bool] = {}
    for number in range(count):
        kind = list(ODD_PICTURES)[number % len(ODD_PICTURES)]
        suffix, content, readable = ODD_PICTURES[kind]
        path = folder / f"{number:04d}" / _name(kind, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "unreadable":
            path.symlink_to(path.name)  # a loop: nobody can read it, not even root, who may read all files
        elif kind == "gone":
            path.symlink_to("nowhere.png")
        else:
            path.write_bytes(content(number))
        files[path] = readable
    return files


def _name(kind: str, suffix: str) -> str:
    if kind == "unicode name":
        return f"ñandú 鸵鸟 🦤 \n{suffix}"
    if kind == "very long name":
        return "a" * (255 - len(suffix)) + suffix
    if kind == "undecodable name":
        return os.fsdecode(b"caf\xe9") + suffix
    return f"picture{suffix}"


def check(count: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Exports odd inputs, and compares each with what explaining it alone gives.

    Returns:
        How many of each kind were exported or listed; and what is wrong, one line each.
    """
    model, method = load_model("scenes"), create_method("tokentm")
    files = make_inputs(folder / "inputs", count)
    result = export_heatmaps(
        folder / "inputs", folder / "export", model=model, methods=[method], view="overlay", batch_size=16
    )
    reasons, wrong, outcomes = dict(result.failures), [], Counter[str]()
    printed = {str(path).encode("utf-8", "backslashreplace").decode(): path for path in files}
    if len(result) != count:
        wrong.append(f"found {len(result)} images, expected {count}")
    for number, entry in enumerate(result.entries):
        path = printed[entry.path]
        kind = list(ODD_PICTURES)[int(path.parent.name) % len(ODD_PICTURES)]
        reason = reasons.get(entry.path)
        outcomes[f"{kind}: {'exported' if reason is None else 'listed'}"] += 1
        if (reason is None) != files[path]:
            wrong.append(f"{kind}: {reason or 'was exported'}")
        elif reason is None:
            alone = explain_with([method], model.subject, str(path))[0].scores[0].numpy()
            if not np.allclose(result.scores(number, "tokentm"), alone, atol=1e-6, rtol=1e-4):
                wrong.append(f"{kind}: other scores than alone")
    return outcomes, wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, prints, and writes export_broken.md where asked; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500, help="how many inputs")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            outcomes, wrong = check(options.inputs, Path(scratch))
    except VitExplainError as error:
        raise SystemExit(f"the export was not carried out: {error}") from error
    rows = [[*each.split(": "), str(count)] for each, count in sorted(outcomes.items())]
    text = "\n".join(
        [
            "# Broken and odd inputs\n",
            f"{options.inputs} inputs of {len(ODD_PICTURES)} kinds in turn, explained in batches of 16; those that are "
            "exported are compared with the same picture explained alone.\n",
            f"Wrong: **{len(wrong)}**\n",
            *(f"- {each}" for each in wrong[:20]),
            markdown_table(["kind", "outcome", "inputs"], rows),
            "",
            machine_facts(_MODULE, given, "threads as torch chooses"),
            "",
        ]
    )
    print(text)
    if options.output:
        write_whole(options.output / "export_broken.md", lambda file: file.write(text.encode()))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
