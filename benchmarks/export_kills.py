"""Exports killed at random moments and resumed: what comes out in the end is that of an unbroken run.

``python -m vitexplain.benchmarks.export_kills --data FOLDER --kills 30 --output benchmarks/results``

Each life of an export is a forked process, ended by SIGKILL after a random part of the time that an unbroken run
takes; lives follow each other in the same folder until it is complete, and then begin anew in another one, until
there have been enough kills. Each completed folder is compared with the unbroken one: every score, every figure of the
table, every byte of the pictures. Linux and macOS only.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from vitexplain import export_heatmaps, load_model
from vitexplain.files import write_whole
from vitexplain.models.loading import LoadedModel

from .export_images import contents, repeat_images, shown
from .measuring import machine_facts

_MODULE = "vitexplain.benchmarks.export_kills"


def live(model: LoadedModel, images: Path, folder: Path, seconds: float | None) -> bool:
    """One process that exports; returns whether it ended by itself.

    Args:
        model: loaded already, so that most of a life is the export.
        images: folder of the images.
        folder: where to.
        seconds: when it is killed; None lets it finish.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            export(model, images, folder)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"an export into {folder.name} failed by itself")
    return os.WIFEXITED(status)


def export(model: LoadedModel, images: Path, folder: Path) -> None:
    """The export that is killed: small shards, scores and pictures."""
    export_heatmaps(images, folder, model=model, methods=["rollout", "tokentm"], view="overlay", shard_size=16)


def torture(images: Path, scratch: Path, kills: int, seed: int) -> tuple[int, list[int], list[str]]:
    """Kills and resumes until there have been enough kills.

    Returns:
        Kills; how many shards were there at each of them; and what differs, one line a completed folder.
    """
    model = load_model("scenes")
    for module in ("zarr", "pyarrow.parquet", "vitexplain.export.run"):  # once, and not in every life
        importlib.import_module(module)
    start = time.perf_counter()
    live(model, images, scratch / "unbroken", None)
    whole = time.perf_counter() - start
    expected, differences = contents(scratch / "unbroken"), list[str]()
    draw, done, found = random.Random(seed), 0, list[int]()
    attempt = 0
    while done < kills:
        folder, attempt = scratch / f"killed-{attempt}", attempt + 1
        while not live(model, images, folder, draw.uniform(0.02, 0.7) * whole if done < kills else None):
            done += 1
            found.append(len(list((folder / "rows").glob("*.parquet"))))
        got = contents(folder)
        differences += [f"folder {attempt}: {name}" for name in expected if got.get(name) != expected[name]]
    return done, found, differences


def main(arguments: Sequence[str] | None = None) -> None:
    """Kills, prints, and writes export_kills.md where asked; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with photographs")
    parser.add_argument("--images", type=int, default=320, help="how many photographs")
    parser.add_argument("--kills", type=int, default=30, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    torch.set_num_threads(1)  # threads do not live on in a forked process
    with tempfile.TemporaryDirectory() as scratch:
        repeat_images(options.data, Path(scratch, "images"), options.images)
        kills, shards, differences = torture(Path(scratch, "images"), Path(scratch), options.kills, options.seed)
    facts = machine_facts(_MODULE, shown(given), "one thread of torch")
    text = "\n".join(
        [
            "# Killed and resumed\n",
            f"{options.images} photographs in shards of 16, scores of two methods and overlays; {kills} kills at "
            f"random moments, with {', '.join(map(str, shards))} shards committed when they came.\n",
            f"Differences from an unbroken run: **{len(differences)}**\n",
            *(f"- {each}" for each in differences[:20]),
            facts,
            "",
        ]
    )
    print(text)
    if options.output:
        write_whole(options.output / "export_kills.md", lambda file: file.write(text.encode()))
    if differences:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
