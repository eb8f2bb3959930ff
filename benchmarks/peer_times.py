"""Times of both sides of each pair on one model, image size and batch, in the same rounds as the plain passes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitexplain.metrics.predictor import Predictor

from .measuring import FORWARD, FORWARD_BACKWARD, Run, forward, forward_backward
from .peer_cells import TimeCell, likeness
from .peer_libraries import Subject
from .peer_methods import Pair, Plan, Side
from .speed import Times, interleaved, quartiles


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant maps of random weights, and what peers warn of
        Predictor.of(of.model).logits(of.images[:1])  # tries the short last block, which is done once a model
        fullest = max((plans[name] for name in pairs), key=lambda plan: (plan.rounds, plan.warm))
        plain: dict[str, Run] = {
            FORWARD: lambda: forward(of.model, of.images),
            FORWARD_BACKWARD: lambda: forward_backward(of.model, of.images),
        }
        warm = any(plans[name].warm for name in pairs)
        sides = {name: Side(run, fullest, called=not warm) for name, run in plain.items()}
        sides |= {
            f"{name} {side}": Side.of(prepare, of, plans[name], called=not warm)
            for name, pair in pairs.items()
            for side, prepare in (("ours", pair.run_ours), ("peer", pair.run_peer))
        }
        gc.collect()
        gc.freeze()  # or each call waits until all that is loaded has been looked through for garbage
        try:
            label = f"{place['model']}, {place['size']} px, batch {place['batch']}"
            times = interleaved(sides, fullest.rounds, label, warm=warm)
        finally:
            gc.unfreeze()
        return [
            TimeCell(**place, **pair.names(name), **_figures(name, times, sides), **_likeness(name, pair, of, sides))
            for name, pair in pairs.items()
        ]


def _figures(name: str, times: Mapping[str, Times], sides: Mapping[str, Side]) -> dict[str, Any]:
    """The fields of a `TimeCell` that were timed, and those that say what was not."""
    both = {side: sides[f"{name} {side}"] for side in ("ours", "peer")}
    rounds = both["ours"].plan.rounds
    cpu = {side: times[f"{name} {side}"].cpu[:rounds] for side, each in both.items() if not each.failure}
    figures: dict[str, Any] = {f"{side}_failure": each.failure for side, each in both.items()} | {"rounds": rounds}
    figures |= {f"{side}_seconds": float(np.median(own)) for side, own in cpu.items()}
    for reference, run in (("forward", FORWARD), ("backward", FORWARD_BACKWARD)):
        if sides[run].failure:
            figures["plain_failure"] = f"{run} ({sides[run].failure})"
            continue
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
