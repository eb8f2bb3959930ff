"""Time and memory of other packages' methods beside the same methods here, as ratios to the plain passes of one run.

``python -m vitexplain.benchmarks.peers --data … --output benchmarks/results``

One command measures the whole list, and begins new tables. Same model, images, classes and process for both sides of a
pair, and for the plain passes; all of them in turn, round after round, as in `speed`. Memory is measured as in
`memory`, each side in a process of its own, one after the other beside the times: leave it a core. A cell is one pair,
model, image size and batch. A pair has a given time in each place: the plain forward pass is timed there, and from it
follows how many rounds fit. One round there is in any case, but for a pair of which one call takes too long: it is left
out, with a row that says so, as a side that fails has a row that says how. Cells are written as they come, the cheap
places first, so that a run that is cut short leaves most of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexplain import explainer

from .measuring import (
    forward,
    load_vit,
    machine_facts,
    random_images,
    random_vit,
)
from .memory import available_memory, limit_memory
from .peer_cells import Cell, MemoryCell, TimeCell
from .peer_libraries import Subject
from .peer_memory import LOADED, memory_cells
from .peer_methods import PAIRS, Failure, Pair, Plan, attempt
from .peer_report import add_cells
from .peer_times import time_cells
from .processes import Processes

HALF = 0.48
"""Share of the free memory that a process may take, of two at a time."""

_MODULE = "vitexplain.benchmarks.peers"

_WRITING = Lock()
_Cell = TypeVar("_Cell", bound=Cell)


def subject(model: nn.Module, size: int, batch: int, data: Path | None) -> Subject:
    """Model, images and predicted classes; pictures of a folder of test data, or noise without one."""
    images = random_images(batch, size) if data is None else _pictures(model, data, batch, size)
    return Subject(model, images, forward(model, images).argmax(1).clone())


def _pictures(model: Any, data: Path, batch: int, size: int) -> Tensor:
    files = sorted(path for path in (data / "xai_samples").iterdir() if path.suffix in (".jpg", ".png"))
    if not files:
        raise SystemExit(f"found no pictures in {data / 'xai_samples'}: leave --data out for random images")
    prepared = explainer.Subject.of(model).prepare([files[index % len(files)] for index in range(batch)])
    return F.interpolate(prepared, (size, size), mode="bicubic", antialias=True)


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
    alone: Processes | None,
) -> Future[None] | None:
    """Adds the cells of one model, image size and batch to the tables, whatever fails there.

    Returns:
        The memory cells on their way, which `beside` measures meanwhile; None without processes.
    """
    _give_back()
    pairs = {each: PAIRS[each] for each in options.only}
    model: Any
    model, weights = load_vit(name, size, options.data)
    plain, shape = batch * forward_seconds(model, size), (model.patch_embed.num_patches, model.embed_dim)
    limits = options.seconds, options.rounds, options.longest
    plans = {each: Plan(plain * pair.cost(*shape), *limits) for each, pair in pairs.items()}
    reasons = {each: plan.left_out for each, plan in plans.items()}
    fitting = {each: pair for each, pair in pairs.items() if not reasons[each]}
    place: dict[str, Any] = {"model": name, "size": size, "batch": batch, "threads": options.threads, "facts": facts}

    def add(kind: type[_Cell], where: dict[str, Any], measured: Callable[[], list[_Cell]]) -> None:
        found = attempt(measured) if fitting else []
        if isinstance(found, Failure):  # of a plain pass, as sides keep theirs
            found = left_out(kind, where, fitting, dict.fromkeys(fitting, found.text))
        with _WRITING:
            add_cells(kind, [*found, *left_out(kind, where, pairs, reasons)], options.output, list(PAIRS))

    held = {**place, "weights": "random"}
    memory = None
    if alone is not None:
        memory = beside.submit(add, MemoryCell, held, lambda: memory_cells(held, fitting, plans, alone, allowed))
    if options.what != "memory":
        timed = {**place, "weights": weights, "load": round(os.getloadavg()[0], 1)}
        add(TimeCell, timed, lambda: time_cells(timed, subject(model, size, batch, options.data), fitting, plans))
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
    places = _places(options)
    if not options.add:
        for kind in (TimeCell, MemoryCell):
            (options.output / kind.file).unlink(missing_ok=True)
    allowed = int(options.share * available_memory())
    settings = f"{options.threads} threads, {allowed / 2**30:.1f} GiB a process"
    facts = machine_facts(_MODULE, _without_paths(given), f"{settings}; {_versions()}")
    processes = nullcontext() if options.what == "time" else Processes(LOADED)
    with processes as alone, _settings(options.threads, allowed), ThreadPoolExecutor(1) as beside:
        try:
            on_their_way = [measure_place(*place, options, facts, allowed, beside, alone) for place in places]
            for memory in filter(None, on_their_way):
                memory.result()
        except BaseException:
            beside.shutdown(wait=False, cancel_futures=True)  # what has not begun is not measured any more
            raise
    print((options.output / "peers.md").read_text(encoding="utf-8"))


@contextmanager
def _settings(threads: int, allowed: int) -> Iterator[None]:
    """This process's threads, and so much memory that what needs more raises; both are set back.

    NumPy's threads are held, too: after a peer's decomposition they wait busily, and what runs next would pay for it.
    """
    import resource

    before, limits = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_DATA)
    torch.set_num_threads(threads)
    limit_memory(allowed)
    held: AbstractContextManager[Any] = nullcontext()
    if find_spec("threadpoolctl"):  # comes with the peers that need it
        held = import_module("threadpoolctl").threadpool_limits(threads)
    try:
        with held:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        torch.set_num_threads(before)


def _give_back() -> None:
    """Has free memory go back to the system, where the library that holds it can: else large places find none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
