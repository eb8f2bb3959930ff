"""Times of both sides of each pair and of the plain passes, each pair in a process of its own.

What one pair leaves behind, such as memory that a failed call has broken into pieces, is no other pair's burden.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitexplain import subject as explained
from vitexplain.metrics.predictor import Predictor

from .measuring import FORWARD, FORWARD_BACKWARD, forward, forward_backward, load_vit, random_images
from .memory import limit_memory
from .peer_cells import TimeCell, likeness, without_places
from .peer_libraries import Subject
from .peer_memory import PATIENCE, START, small_subject
from .peer_methods import PAIRS, Pair, Plan, Side, attempt
from .processes import Processes
from .speed import Times, interleaved, quartiles


def time_cells(
    place: dict[str, Any],
    pairs: Mapping[str, Pair],
    plans: Mapping[str, Plan],
    alone: Processes,
    allowed: int,
    data: Path | None,
) -> Iterator[TimeCell]:
    """Times all pairs in one place, one after the other.

    Args:
        place: the fields of a cell that say where it is measured, besides the pair.
        pairs: what is measured.
        plans: how often each pair runs, at least once.
        alone: gives each pair a process.
        allowed: bytes that a process may take.
        data: folder of test data; None for random weights and images.
    """
    where = [place["model"], place["size"], place["batch"], place["threads"], allowed, data and str(data)]
    for name, pair in pairs.items():
        plan = plans[name]
        found = alone.measure(measure_here, [name, plan.rounds, plan.warm, *where], START + PATIENCE * plan.whole)
        measured = {"left_out": without_places(found)[:150]} if isinstance(found, str) else found
        yield TimeCell(**place, **pair.names(name), **measured)


def measure_here(
    name: str, rounds: int, warm: bool, model_name: str, size: int, batch: int, threads: int, allowed: int, data: str
) -> dict[str, Any]:
    """Times of a pair in this process: the fields of a `TimeCell` that are measured."""
    limit_memory(allowed)
    torch.set_num_threads(threads)
    if find_spec("threadpoolctl"):  # NumPy's threads wait busily after a peer's decomposition: what runs next would pay
        import_module("threadpoolctl").threadpool_limits(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant maps of random weights, and what peers warn of
        small = small_subject(model_name)
        for prepare in (PAIRS[name].run_ours, PAIRS[name].run_peer):
            Side.of(prepare, small)()  # loads what is loaded lazily
        of = subject(model_name, size, batch, Path(data) if data else None)
        return figures(of, PAIRS[name], rounds, warm)


def subject(name: str, size: int, batch: int, data: Path | None) -> Subject:
    """Model, images and predicted classes; pictures of a folder of test data, or noise without one."""
    model, _ = load_vit(name, size, data)
    images = random_images(batch, size) if data is None else _pictures(model, picture_files(data), batch, size)
    return Subject(model, images, forward(model, images).argmax(1).clone())


def picture_files(data: Path) -> list[Path]:
    """The pictures in a folder of test data, in the order of their names."""
    return sorted(path for path in (data / "xai_samples").glob("*") if path.suffix in (".jpg", ".png"))


def _pictures(model: nn.Module, files: list[Path], batch: int, size: int) -> Tensor:
    prepared = explained.Subject.of(model).prepare([files[index % len(files)] for index in range(batch)])
    return F.interpolate(prepared, (size, size), mode="bicubic", antialias=True)


def figures(of: Subject, pair: Pair, rounds: int, warm: bool) -> dict[str, Any]:
    """Times both sides of a pair and the plain passes in the same rounds.

    Args:
        of: the subject.
        pair: what is timed.
        rounds: how many.
        warm: whether a call that does not count goes before them.

    Returns:
        The fields of a `TimeCell` that are measured.
    """
    attempt(lambda: Predictor.of(of.model).logits(of.images[:1]))  # tries the short last block, done once a model
    sides = {
        FORWARD: Side(lambda: forward(of.model, of.images)),
        FORWARD_BACKWARD: Side(lambda: forward_backward(of.model, of.images)),
        "ours": Side.of(pair.run_ours, of),
        "peer": Side.of(pair.run_peer, of),
    }
    gc.collect()
    gc.freeze()  # or each call waits until all that is loaded has been looked through for garbage
    try:
        times = interleaved(sides, rounds, warm=warm)
    finally:
        gc.unfreeze()
    return {"rounds": rounds, **_figures(times, sides), **_likeness(pair, of, sides)}


def _figures(times: Mapping[str, Times], sides: Mapping[str, Side]) -> dict[str, Any]:
    """What was timed, and how the rest failed."""
    both = {side: sides[side] for side in ("ours", "peer")}
    cpu = {side: times[side].cpu for side, each in both.items() if not each.failure}
    found: dict[str, Any] = {f"{side}_failure": each.failure for side, each in both.items()}
    found |= {f"{side}_seconds": float(np.median(own)) for side, own in cpu.items()}
    for reference, run in (("forward", FORWARD), ("backward", FORWARD_BACKWARD)):
        if sides[run].failure:
            found["plain_failure"] = f"{run} ({sides[run].failure})"
            continue
        plain = times[run].cpu
        found[f"{reference}_seconds"] = float(np.median(plain))
        found |= {f"{side}_{reference}": quartiles(own, plain) for side, own in cpu.items()}
    if len(cpu) == 2:
        found["speedup"] = quartiles(cpu["peer"], cpu["ours"])
    return found


def _likeness(pair: Pair, of: Subject, sides: Mapping[str, Side]) -> dict[str, Any]:
    """How alike the maps are; nothing where a side failed."""
    own, other = sides["ours"], sides["peer"]
    if own.failure or other.failure:
        return {}
    return {"likeness": likeness(pair.ours_rows(own.outcome, of), pair.peer_rows(other.outcome, of))}
