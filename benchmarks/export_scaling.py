"""Cost of an image, and memory, as an export grows.

``python -m vitexplain.benchmarks.export_scaling --data FOLDER --output benchmarks/results``

Exports of several sizes, one after the other in one process, of scores alone. While each runs, a thread notes how
many images are committed, the CPU time spent, and the resident memory. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vitexplain import export_heatmaps, load_model
from vitexplain.files import write_whole

from .export_images import repeat_images, shown
from .measuring import machine_facts, markdown_table

_MODULE = "vitexplain.benchmarks.export_scaling"
_SHARD = 256


@dataclass(frozen=True)
class Trace:
    """One export, looked at as it ran.

    Attributes:
        images: how many there were.
        cpu: CPU milliseconds an image, all in all.
        wall: milliseconds an image.
        memory: resident memory in MiB, over time.
    """

    images: int
    cpu: float
    wall: float
    memory: list[float] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """MiB by which the median of the last quarter lies above that of the second."""
        quarters = np.array_split(np.array(self.memory), 4)
        return float(np.median(quarters[3]) - np.median(quarters[1]))


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def watched(memory: list[float], seconds: float = 0.2) -> Iterator[None]:
    """Notes the resident memory again and again inside the `with`."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(seconds):
            memory.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def trace(files: Sequence[Path], folder: Path, model_name: str, checkpoint: Path | None) -> Trace:
    """Exports some images."""
    model, memory = load_model(model_name, checkpoint=checkpoint), list[float]()
    wall, cpu = time.perf_counter(), time.process_time()
    with watched(memory):
        export_heatmaps(list(files), folder, model=model, methods=["rollout", "tokentm"], shard_size=_SHARD, workers=2)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Trace(len(files), 1000 * cpu / len(files), 1000 * wall / len(files), memory)


def plot(traces: Sequence[Trace]) -> bytes:
    """CPU time an image, and memory over the course of each export."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    left.semilogx([each.images for each in traces], [each.cpu for each in traces], "o-")
    left.set(xlabel="images", ylabel="CPU ms an image", title="cost of an image")
    left.set_ylim(0, 1.2 * max(each.cpu for each in traces))
    for each in traces:
        right.plot(np.linspace(0, 1, len(each.memory)), each.memory, label=f"{each.images:,} images")
    right.set(xlabel="share of the run", ylabel="resident MiB", title="memory")
    right.set_ylim(0, 1.2 * max(max(each.memory) for each in traces))
    right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes export_scaling.md, .csv and .png where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with photographs")
    parser.add_argument("--model", default="scenes", help="model to explain")
    parser.add_argument("--checkpoint", type=Path, help="weights of the model")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 3000, 10_000, 20_000], help="images")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    traces = []
    with tempfile.TemporaryDirectory() as scratch:
        files = repeat_images(options.data, Path(scratch, "images"), max(options.counts))
        trace(files[:64], Path(scratch, "warm"), options.model, options.checkpoint)
        for count in options.counts:
            traces.append(trace(files[:count], Path(scratch, str(count)), options.model, options.checkpoint))
            print(f"{count}: {traces[-1].cpu:.2f} CPU ms, growth {traces[-1].growth:.0f} MiB", flush=True)
    rows = [
        [f"{each.images:,}", f"{each.cpu:.2f}", f"{each.wall:.2f}", f"{max(each.memory):.0f}", f"{each.growth:+.0f}"]
        for each in traces
    ]
    facts = machine_facts(_MODULE, shown(given), f"{options.threads} threads of torch")
    header = ["images", "CPU ms an image", "wall ms an image", "peak resident MiB", "growth MiB"]
    text = "\n".join(
        [
            "# Cost of an image as an export grows\n",
            "Scores of rollout and tokentm. Growth: median resident memory of the last quarter of the run above that "
            "of its second quarter.\n",
            markdown_table(header, rows),
            "",
            "![Cost and memory](export_scaling.png)\n",
            facts,
            "",
        ]
    )
    print(text)
    if options.output:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([header, *rows])
        written = {".md": text.encode(), ".csv": lines.getvalue().encode(), ".png": plot(traces)}
        for suffix, content in written.items():
            write_whole(options.output / f"export_scaling{suffix}", partial(_write, content))


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


if __name__ == "__main__":
    main()
