"""Time and memory of other packages' methods beside the same methods here, as ratios to the plain passes of one run.

``python -m vitexplain.benchmarks.peers --data … --output benchmarks/results``

One command measures the whole list, and begins new tables. Same model, images, classes and process for both sides of a
pair, and for the plain passes; all of them in turn, round after round, as in `speed`. Memory is measured as in
`memory`, each side in a process of its own, one after the other beside the times: leave it a core. A cell is one pair,
model, image size and batch. A pair has a given time in each place: the plain forward pass is timed there, and from it
follows how many rounds fit; a pair of which not even one call fits is left out, with a row that says so, as a side that
fails has a row that says how. Cells are written as they come, the cheap places first, so that a run that is cut short
leaves most of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexplain import explainer

from .measuring import (
    FORWARD,
    FORWARD_BACKWARD,
    Run,
    forward,
    forward_backward,
    load_vit,
    machine_facts,
    random_images,
    random_vit,
)
from .memory import in_process, limit_memory, resident_rise
from .peer_cells import Cell, MemoryCell, TimeCell, add_cells, likeness, without_places
from .peer_libraries import Subject
from .peer_methods import PAIRS, Failure, Pair, Plan, Side, attempt
from .speed import Times, interleaved, quartiles

_MODULE = "vitexplain.benchmarks.peers"

START = 60.0
"""Seconds that a process may take before it measures."""
PATIENCE = 4.0
"""How many times as long as planned a process may take to measure: it gives each block of memory back at once."""

HALF = 0.48
"""Share of the machine's memory that a process may take, of two at a time."""

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


def time_cells(
    place: dict[str, Any], of: Subject, pairs: Mapping[str, Pair], plans: Mapping[str, Plan]
) -> list[TimeCell]:
    """Times all pairs on one subject in the same rounds, of which each has its number.

    Args:
        place: the fields of a cell that say where it was measured, besides the pair.
        of: the subject.
        pairs: what is measured.
        plans: how often each pair runs, at least once.
    """
    plain: dict[str, Run] = {
        FORWARD: lambda: forward(of.model, of.images),
        FORWARD_BACKWARD: lambda: forward_backward(of.model, of.images),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant maps of random weights, and what peers warn of
        sides = {
            f"{name} {side}": Side.of(prepare, of, plans[name])
            for name, pair in pairs.items()
            for side, prepare in (("ours", pair.run_ours), ("peer", pair.run_peer))
        }
        most = max(plans[name].rounds for name in pairs)
        gc.collect()
        gc.freeze()  # or each call waits until all that is loaded has been looked through for garbage
        try:
            times = interleaved(plain | sides, most, f"{place['model']}, {place['size']} px, batch {place['batch']}")
        finally:
            gc.unfreeze()
        return [
            TimeCell(**place, **_names(name, pair), **_figures(name, times, sides), **_likeness(name, pair, of, sides))
            for name, pair in pairs.items()
        ]


def _names(name: str, pair: Pair) -> dict[str, Any]:
    return {"pair": name, "ours": pair.ours, "peer": pair.peer}


def _figures(name: str, times: Mapping[str, Times], sides: Mapping[str, Side]) -> dict[str, Any]:
    """The fields of a `TimeCell` that were timed, and those that say what was not."""
    both = {side: sides[f"{name} {side}"] for side in ("ours", "peer")}
    rounds = both["ours"].plan.rounds
    cpu = {side: times[f"{name} {side}"].cpu[:rounds] for side, each in both.items() if not each.failure}
    figures: dict[str, Any] = {f"{side}_failure": each.failure for side, each in both.items()} | {"rounds": rounds}
    figures |= {f"{side}_seconds": float(np.median(own)) for side, own in cpu.items()}
    for reference, run in (("forward", FORWARD), ("backward", FORWARD_BACKWARD)):
        plain = times[run].cpu[:rounds]
        figures[f"{reference}_seconds"] = float(np.median(plain))
        figures |= {f"{side}_{reference}": quartiles(own, plain) for side, own in cpu.items()}
    if len(cpu) == 2:
        figures["speedup"] = quartiles(cpu["peer"], cpu["ours"])
    return figures


def _likeness(name: str, pair: Pair, of: Subject, sides: Mapping[str, Side]) -> dict[str, Any]:
    """The field of a `TimeCell` that says how alike the maps are; none where a side failed."""
    own, other = sides[f"{name} ours"], sides[f"{name} peer"]
    if own.failure or other.failure:
        return {}
    return {"likeness": likeness(pair.ours_rows(own.outcome, of), pair.peer_rows(other.outcome, of))}


def left_out(
    kind: type[_Cell], place: dict[str, Any], pairs: Mapping[str, Pair], reasons: Mapping[str, str]
) -> list[_Cell]:
    """Cells without figures of the pairs that have a reason."""
    return [kind(**place, **_names(name, pairs[name]), left_out=reason) for name, reason in reasons.items() if reason]


def memory_cells(place: dict[str, Any], pairs: Mapping[str, Pair], plans: Mapping[str, Plan]) -> list[MemoryCell]:
    """Measures both sides of all pairs and the plain passes, each in a process of its own; weights are random."""
    where = [place["model"], place["size"], place["batch"], place["threads"]]

    def measured(name: str, side: str, call: float) -> dict[str, Any] | str:
        return in_process(_MODULE, [name, side, *where], START + PATIENCE * call)

    longest = max(plans[name].call for name in pairs)
    plain = {name: measured(name, "plain", longest) for name in (FORWARD, FORWARD_BACKWARD)}
    reference = {name: each["process"] for name, each in plain.items() if isinstance(each, dict)}
    cells = []
    for name, pair in pairs.items():
        found = {side: measured(name, side, plans[name].call) for side in ("ours", "peer")}
        figures = {side: each["process"] for side, each in found.items() if isinstance(each, dict)}
        failures: dict[str, Any] = {
            f"{side}_failure": without_places(each) for side, each in found.items() if isinstance(each, str)
        }
        cells.append(
            MemoryCell(
                **place,
                **_names(name, pair),
                forward_mebibytes=reference.get(FORWARD),
                backward_mebibytes=reference.get(FORWARD_BACKWARD),
                ours_mebibytes=figures.get("ours"),
                peer_mebibytes=figures.get("peer"),
                **failures,
            )
        )
    return cells


def measure_here(name: str, side: str, model_name: str, size: int, batch: int, threads: int) -> dict[str, float]:
    """Peak memory of one side of a pair, or of a plain pass, in this process: ``process``, in MiB."""
    torch.set_num_threads(threads)

    def run_of(of: Subject) -> Run:
        if side == "plain":
            plain = {FORWARD: forward, FORWARD_BACKWARD: forward_backward}[name]
            return lambda: plain(of.model, of.images)
        return {"ours": PAIRS[name].run_ours, "peer": PAIRS[name].run_peer}[side](of)

    def random_subject(size: int, batch: int, **options: Any) -> Subject:
        return Subject(
            random_vit(model_name, size, **options), random_images(batch, size), torch.zeros(batch, dtype=torch.long)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_of(random_subject(96, 1, depth=4))()  # loads what is loaded lazily
        return {"process": resident_rise(run_of(random_subject(size, batch)))}


def measure_place(
    name: str, size: int, batch: int, options: argparse.Namespace, facts: str, beside: Executor
) -> Future[None] | None:
    """Adds the cells of one model, image size and batch to the tables, whatever fails there.

    Returns:
        The memory cells on their way, which `beside` measures meanwhile; None where they are not asked for.
    """
    pairs = {each: PAIRS[each] for each in options.only}
    model: Any
    model, weights = load_vit(name, size, options.data)
    plain, shape = batch * forward_seconds(model, size), (model.patch_embed.num_patches, model.embed_dim)
    plans = {each: Plan(plain * pair.cost(*shape), options.seconds, options.rounds) for each, pair in pairs.items()}
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
    if options.what != "time":
        memory = beside.submit(add, MemoryCell, held, lambda: memory_cells(held, fitting, plans))
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
    parser.add_argument("--seconds", type=float, default=60, help="what one pair may take in one place, about")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    data = os.environ.get("VITEXPLAIN_TEST_DATA")
    parser.add_argument("--data", type=Path, default=data, help="test data; without it weights and images are random")
    parser.add_argument("--output", type=Path, required="--child" not in sys.argv, help="folder of the tables")
    parser.add_argument("--add", action="store_true", help="keep cells of earlier runs, but for those measured anew")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.child:
        limit_memory(HALF)
        print(json.dumps(measure_here(*json.loads(options.child))))
        return
    if sys.platform != "linux":
        parser.error("memory is read from /proc: run it on Linux")
    if min(options.rounds, options.seconds, options.threads, *options.batches, *options.sizes) < 1:
        parser.error("found a number below 1, expected numbers >= 1")
    if unknown := sorted(set(options.only) - PAIRS.keys()):
        parser.error(f"unknown pairs {unknown}; there are {', '.join(PAIRS)}")
    places = _places(options)
    if not options.add:
        for kind in (TimeCell, MemoryCell):
            (options.output / kind.file).unlink(missing_ok=True)
    facts = machine_facts(_MODULE, _without_paths(given), f"{options.threads} threads; {_versions()}")
    with _settings(options.threads), ThreadPoolExecutor(1) as beside:
        on_their_way = [measure_place(*place, options, facts, beside) for place in places]
        for memory in filter(None, on_their_way):
            memory.result()
    print((options.output / "peers.md").read_text(encoding="utf-8"))


@contextmanager
def _settings(threads: int) -> Iterator[None]:
    """This process's threads, and so much memory that what needs more raises; both are set back.

    NumPy's threads are held, too: after a peer's decomposition they wait busily, and what runs next would pay for it.
    """
    import resource

    before, limits = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_DATA)
    torch.set_num_threads(threads)
    limit_memory(HALF)
    held: AbstractContextManager[Any] = nullcontext()
    if find_spec("threadpoolctl"):  # comes with the peers that need it
        held = import_module("threadpoolctl").threadpool_limits(threads)
    try:
        with held:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
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
    """The packages that are compared with, as installed."""
    found = []
    for name in ("captum", "grad-cam", "torchcam", "quantus", "lxt"):
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
