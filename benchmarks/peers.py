"""Time and memory of other packages' methods beside the same methods here, as ratios to the plain passes of one run.

``python -m vitexplain.benchmarks.peers --data … --output benchmarks/results``

One command measures the whole list, and begins new tables. Same model, images, classes and process for both sides of a
pair, and for the plain passes; all of them in turn, round after round, as in `speed`. The next pair has another
process. Memory is measured as in `memory`, each side in a process of its own, one after the other beside the times:
leave it a core. A cell is one pair, model, image size and batch. A pair has a given time in each place: the plain
forward pass is timed there, and from it follows how many rounds fit. One round there is in any case, but for a pair of
which one call takes too long: it is left out, with a row that says so, as a side that fails has a row that says how.
Cells are written as they come, the cheap places first, so that a run that is cut short leaves most of them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib import metadata
from itertools import chain, product
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import nn

from . import peer_memory, peer_times
from .measuring import (
    forward,
    load_vit,
    machine_facts,
    random_images,
    random_vit,
)
from .memory import available_memory
from .peer_cells import Cell, MemoryCell, TimeCell
from .peer_methods import PAIRS, Pair, Plan
from .peer_report import add_cells
from .processes import Processes

HALF = 0.48
"""Share of the free memory that a process may take, of two at a time."""

_MODULE = "vitexplain.benchmarks.peers"
_LOADED = (peer_times.__name__, "captum.attr", "pytorch_grad_cam", "torchcam.methods", "quantus")
"""What every process has loaded; what is not installed fails in the rows that need it."""

_WRITING = Lock()
_Cell = TypeVar("_Cell", bound=Cell)


def forward_seconds(model: nn.Module, size: int) -> float:
    """Time of the plain forward pass of one image: the shorter of two."""
    images, seconds = random_images(1, size), []
    for _ in range(2):
        before = time.perf_counter()
        forward(model, images)
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def left_out(
    kind: type[_Cell], place: dict[str, Any], pairs: Mapping[str, Pair], reasons: Mapping[str, str]
) -> list[_Cell]:
    """Cells without figures of the pairs that have a reason."""
    return [kind(**place, **pairs[name].names(name), left_out=reason) for name, reason in reasons.items() if reason]


def measure_place(
    name: str,
    size: int,
    batch: int,
    options: argparse.Namespace,
    facts: str,
    allowed: int,
    beside: Executor,
    timing: Processes | None,
    weighing: Processes | None,
) -> Future[None] | None:
    """Adds the cells of one model, image size and batch to the tables, as they come.

    Args:
        name: of the model.
        size: image side in pixels.
        batch: number of images.
        options: of the command line.
        facts: command and machine.
        allowed: bytes that a process may take.
        beside: runs what measures memory.
        timing: gives each pair a process; None where times are not measured.
        weighing: gives each side of a pair one; None where memory is not measured.

    Returns:
        The memory cells on their way, which `beside` measures meanwhile; None without `weighing`.
    """
    pairs = {each: PAIRS[each] for each in options.only}
    model: Any
    model, weights = load_vit(name, size, options.data)
    plain, shape = batch * forward_seconds(model, size), (model.patch_embed.num_patches, model.embed_dim)
    del model
    gc.collect()
    limits = options.seconds, options.rounds, options.longest
    plans = {each: Plan(plain * pair.cost(*shape), *limits) for each, pair in pairs.items()}
    reasons = {each: plan.left_out for each, plan in plans.items()}
    fitting = {each: pair for each, pair in pairs.items() if not reasons[each]}
    place: dict[str, Any] = {"model": name, "size": size, "batch": batch, "threads": options.threads, "facts": facts}

    def add(kind: type[_Cell], where: dict[str, Any], measured: Iterable[_Cell]) -> None:
        for each in chain(left_out(kind, where, pairs, reasons), measured):
            with _WRITING:
                add_cells(kind, [each], options.output, list(PAIRS))

    memory = None
    if weighing is not None:
        held = {**place, "weights": "random"}
        memory = beside.submit(add, MemoryCell, held, peer_memory.memory_cells(held, fitting, plans, weighing, allowed))
    if timing is not None:
        timed = {**place, "weights": weights, "load": round(os.getloadavg()[0], 1)}
        add(TimeCell, timed, peer_times.time_cells(timed, fitting, plans, timing, allowed, options.data))
    return memory


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes peers.md and its CSV files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("all", "time", "memory"), default="all", help="what is measured")
    parser.add_argument("--models", type=_words, default=["vit_tiny", "vit_base"], help="vit_tiny, vit_base, …")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32], help="images at a time, such as 1,8,32")
    parser.add_argument("--sizes", type=_numbers, default=[224, 384, 768], help="image sides in pixels")
    parser.add_argument("--only", type=_words, default=list(PAIRS), help=f"pairs: {','.join(PAIRS)}")
    parser.add_argument("--rounds", type=int, default=7, help="how often each side is timed, at most")
    parser.add_argument("--seconds", type=float, default=60, help="what a pair's rounds may take in a place, about")
    parser.add_argument("--longest", type=float, default=600, help="what one call of both may take, or it is left out")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument(
        "--share", type=float, default=HALF, help="of the memory that is free at first, what a process may take"
    )
    data = os.environ.get("VITEXPLAIN_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, help="test data; without it weights and images are random")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--add", action="store_true", help="keep cells of earlier runs, but for those measured anew")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if sys.platform != "linux":
        parser.error("memory is read from /proc: run it on Linux")
    if min(options.rounds, options.seconds, options.longest, options.threads, *options.batches, *options.sizes) < 1:
        parser.error("found a number below 1, expected numbers >= 1")
    if not 0 < options.share < 1:
        parser.error(f"found --share {options.share:g}, expected a number above 0 and below 1")
    if unknown := sorted(set(options.only) - PAIRS.keys()):
        parser.error(f"unknown pairs {unknown}; there are {', '.join(PAIRS)}")
    if options.data is not None and not peer_times.picture_files(options.data):
        parser.error(f"found no pictures in {options.data / 'xai_samples'}: leave --data out for random images")
    places = _places(options)
    if not options.add:
        for kind in (TimeCell, MemoryCell):
            (options.output / kind.file).unlink(missing_ok=True)
    allowed = int(options.share * available_memory())
    settings = f"{options.threads} threads, {allowed / 2**30:.1f} GiB a process"
    facts = machine_facts(_MODULE, _without_paths(given), f"{settings}; {_versions()}")
    timed = nullcontext() if options.what == "memory" else Processes(_LOADED, {})
    weighed = nullcontext() if options.what == "time" else Processes(_LOADED)
    with timed as timing, weighed as weighing, _threads(options.threads), ThreadPoolExecutor(1) as beside:
        try:
            on_their_way = [
                measure_place(*place, options, facts, allowed, beside, timing, weighing) for place in places
            ]
            for memory in filter(None, on_their_way):
                memory.result()
        except BaseException:
            beside.shutdown(wait=False, cancel_futures=True)  # what has not begun is not measured any more
            raise
    print((options.output / "peers.md").read_text(encoding="utf-8"))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for the plain pass from which rounds are planned; set back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _places(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Models, sizes and batches, in the order of tokens × batch × width."""

    def work(place: tuple[str, int, int]) -> int:
        name, size, batch = place
        with torch.device("meta"):
            model: Any = random_vit(name, size)
        return int(model.patch_embed.num_patches * batch * model.embed_dim)

    names = [name if "_patch" in name else f"{name}_patch16_224" for name in options.models]
    return sorted(product(names, options.sizes, options.batches), key=work)


def _versions() -> str:
    """The packages that are compared with, and one that decides whether lxt imports, as installed."""
    found = []
    for name in ("captum", "grad-cam", "torchcam", "quantus", "lxt", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _without_paths(given: Sequence[str]) -> list[str]:
    """The command line without places of this machine."""
    return ["…" if os.path.isabs(each) else each for each in given]


if __name__ == "__main__":
    main()
