"""Peaks of memory of both sides of each pair and of the plain passes, each of a process of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .measuring import FORWARD, FORWARD_BACKWARD, Run, forward, forward_backward, random_images, random_vit
from .memory import limit_memory, resident_rise
from .peer_cells import MemoryCell, without_places
from .peer_libraries import Subject
from .peer_methods import PAIRS, Pair, Plan
from .processes import Processes

START = 60.0
"""Seconds that a process may take before it measures."""
PATIENCE = 4.0
"""How many times as long as planned a process may take to measure: it gives each block of memory back at once."""


def memory_cells(
    place: dict[str, Any], pairs: Mapping[str, Pair], plans: Mapping[str, Plan], alone: Processes, allowed: int
) -> Iterator[MemoryCell]:
    """Measures the plain passes and both sides of all pairs, one after the other; weights are random.

    Args:
        place: the fields of a cell that say where it is measured, besides the pair.
        pairs: what is measured.
        plans: how long a call takes.
        alone: gives each figure a process.
        allowed: bytes that a process may take.
    """
    where = [place["model"], place["size"], place["batch"], place["threads"], allowed]

    def measured(name: str, side: str, call: float) -> dict[str, Any] | str:
        return alone.measure(measure_here, [name, side, *where], START + PATIENCE * call)

    longest = max((plans[name].call for name in pairs), default=0.0)
    plain = {name: measured(name, "plain", longest) for name in (FORWARD, FORWARD_BACKWARD) if pairs}
    reference = {name: each["process"] for name, each in plain.items() if isinstance(each, dict)}
    for name, pair in pairs.items():
        found = {side: measured(name, side, plans[name].call) for side in ("ours", "peer")}
        figures = {side: each["process"] for side, each in found.items() if isinstance(each, dict)}
        failures: dict[str, Any] = {
            f"{side}_failure": without_places(each)[:150] for side, each in found.items() if isinstance(each, str)
        }
        yield MemoryCell(
            **place,
            **pair.names(name),
            forward_mebibytes=reference.get(FORWARD),
            backward_mebibytes=reference.get(FORWARD_BACKWARD),
            ours_mebibytes=figures.get("ours"),
            peer_mebibytes=figures.get("peer"),
            **failures,
        )


def measure_here(
    name: str, side: str, model_name: str, size: int, batch: int, threads: int, allowed: int
) -> dict[str, float]:
    """Peak memory of one side of a pair, or of a plain pass, in this process: ``process``, in MiB."""
    limit_memory(allowed)
    torch.set_num_threads(threads)

    def run_of(of: Subject) -> Run:
        if side == "plain":
            plain = {FORWARD: forward, FORWARD_BACKWARD: forward_backward}[name]
            return lambda: plain(of.model, of.images)
        return {"ours": PAIRS[name].run_ours, "peer": PAIRS[name].run_peer}[side](of)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_of(small_subject(model_name))()  # loads what is loaded lazily
        return {"process": resident_rise(run_of(_random_subject(model_name, size, batch)))}


def small_subject(model_name: str) -> Subject:
    """What takes little time, for a first call."""
    return _random_subject(model_name, 96, 1, depth=4)


def _random_subject(model_name: str, size: int, batch: int, **options: Any) -> Subject:
    model = random_vit(model_name, size, **options)
    return Subject(model, random_images(batch, size), torch.zeros(batch, dtype=torch.long))
