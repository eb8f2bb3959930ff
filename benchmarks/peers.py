"""Time and memory of other packages' methods beside the same methods here, as ratios to the plain passes of one run.

``python -m vitexplain.benchmarks.peers --data … --output benchmarks/results``

Same model, images, classes and process for both sides of a pair, and for the plain passes; all of them in turn, round
after round, as in `speed`. Memory is measured as in `memory`, each side in a process of its own (``--what memory``).
A side that fails has a row that says how. A cell is one pair, model, image size and batch. Cells are kept in CSV files
in the output folder, so that a long table can be made by several runs: each replaces its own cells and leaves the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
from .peer_cells import MemoryCell, TimeCell, add_cells, likeness, without_places
from .peer_libraries import Subject
from .peer_methods import PAIRS, Pair
from .speed import Times, interleaved, quartiles

_MODULE = "vitexplain.benchmarks.peers"

Outcome = Any
"""What a run gave, or a `Failure`."""


@dataclass(frozen=True)
class Failure:
    """How a run failed: the exception's type and the first line of what it says."""

    text: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """From an exception."""
        first = (str(error).splitlines() or [""])[0]
        return cls(f"{type(error).__name__}: {without_places(first)}"[:150])


def subject(model_name: str, size: int, batch: int, data: Path | None) -> tuple[Subject, str]:
    """Model, images and predicted classes; and whether the weights are trained or random.

    Args:
        model_name: a timm Vision Transformer.
        size: image side in pixels.
        batch: number of images.
        data: folder of test data with weights and pictures; without it both are random.
    """
    model, weights = load_vit(model_name, size, data)
    images = random_images(batch, size) if data is None else _pictures(model, data, batch, size)
    return Subject(model, images, forward(model, images).argmax(1).clone()), weights


def _pictures(model: Any, data: Path, batch: int, size: int) -> Tensor:
    files = sorted(path for path in (data / "xai_samples").iterdir() if path.suffix in (".jpg", ".png"))
    if not files:
        raise SystemExit(f"found no pictures in {data / 'xai_samples'}: leave --data out for random images")
    prepared = explainer.Subject.of(model).prepare([files[index % len(files)] for index in range(batch)])
    return F.interpolate(prepared, (size, size), mode="bicubic", antialias=True)


def attempt(run: Callable[[], Outcome]) -> Outcome:
    """What a run gives; a `Failure` where it raises."""
    try:
        return run()
    except Exception as error:  # a peer may raise anything
        return Failure.of(error)


def prepared(prepare: Callable[[Subject], Run], of: Subject) -> tuple[Run | None, Outcome]:
    """One side of a pair, ready to run, and what it gave once; None and a `Failure` where it cannot do the work."""
    run = attempt(lambda: prepare(of))
    outcome = run if isinstance(run, Failure) else attempt(run)
    return (None if isinstance(outcome, Failure) else run), outcome


def time_cells(place: dict[str, Any], of: Subject, pairs: dict[str, Pair], rounds: int) -> list[TimeCell]:
    """Times all pairs on one subject in the same rounds.

    Args:
        place: the fields of a cell that say where it was measured, besides the pair.
        of: the subject.
        pairs: what is measured.
        rounds: how often each side runs; once more for each does not count.
    """
    runs: dict[str, Run] = {
        FORWARD: lambda: forward(of.model, of.images),
        FORWARD_BACKWARD: lambda: forward_backward(of.model, of.images),
    }
    known: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant maps of random weights, and what peers warn of
        for name, pair in pairs.items():
            (own, outcome), (other, outcome_of_peer) = prepared(pair.run_ours, of), prepared(pair.run_peer, of)
            runs |= {f"{name} {side}": run for side, run in (("ours", own), ("peer", other)) if run is not None}
            known[name] = {**place, "pair": name, "ours": pair.ours, "peer": pair.peer, "rounds": rounds}
            for side, found in (("ours", outcome), ("peer", outcome_of_peer)):
                known[name][f"{side}_failure"] = found.text if isinstance(found, Failure) else ""
            if own is not None and other is not None:
                rows = pair.ours_rows(outcome, of), pair.peer_rows(outcome_of_peer, of)
                known[name]["likeness"] = likeness(*rows)
        times = interleaved(runs, rounds, f"{place['model']}, {place['size']} px, batch {place['batch']}")
    return [TimeCell(**known[name], **_figures(name, times)) for name in pairs]


def _figures(name: str, times: Mapping[str, Times]) -> dict[str, Any]:
    """The fields of a `TimeCell` that were timed."""
    cpu = {side: times[f"{name} {side}"].cpu for side in ("ours", "peer") if f"{name} {side}" in times}
    figures: dict[str, Any] = {f"{side}_seconds": float(np.median(own)) for side, own in cpu.items()}
    for reference, plain in (("forward", times[FORWARD].cpu), ("backward", times[FORWARD_BACKWARD].cpu)):
        figures[f"{reference}_seconds"] = float(np.median(plain))
        figures |= {f"{side}_{reference}": quartiles(own, plain) for side, own in cpu.items()}
    if len(cpu) == 2:
        figures["speedup"] = quartiles(cpu["peer"], cpu["ours"])
    return figures


def memory_cells(place: dict[str, Any], pairs: dict[str, Pair]) -> list[MemoryCell]:
    """Measures both sides of all pairs and the plain passes, each in a process of its own; weights are random."""
    where = [place["model"], place["size"], place["batch"], place["threads"]]
    plain = {name: in_process(_MODULE, [name, "plain", *where]) for name in (FORWARD, FORWARD_BACKWARD)}
    cells = []
    for name, pair in pairs.items():
        found = {side: in_process(_MODULE, [name, side, *where]) for side in ("ours", "peer")}
        figures = {side: each["process"] for side, each in found.items() if isinstance(each, dict)}
        failures: dict[str, Any] = {
            f"{side}_failure": without_places(each) for side, each in found.items() if isinstance(each, str)
        }
        reference = {name: each["process"] for name, each in plain.items() if isinstance(each, dict)}
        cells.append(
            MemoryCell(
                **place,
                pair=name,
                ours=pair.ours,
                peer=pair.peer,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes peers.md and its CSV files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("time", "memory"), default="time", help="what is measured")
    parser.add_argument("--models", type=_words, default=["vit_tiny", "vit_base"], help="vit_tiny, vit_base, …")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32], help="images at a time, such as 1,8,32")
    parser.add_argument("--sizes", type=_numbers, default=[224, 384, 768], help="image sides in pixels")
    parser.add_argument("--only", type=_words, default=list(PAIRS), help=f"pairs: {','.join(PAIRS)}")
    parser.add_argument("--rounds", type=int, default=7, help="how often each side is timed")
    parser.add_argument("--threads", type=int, default=1, help="number of threads")
    parser.add_argument("--data", type=Path, default=os.environ.get("VITEXPLAIN_TEST_DATA"), help="test data")
    parser.add_argument("--output", type=Path, required="--child" not in sys.argv, help="folder of the tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.child:
        limit_memory()
        print(json.dumps(measure_here(*json.loads(options.child))))
        return
    if min(options.rounds, options.threads, *options.batches, *options.sizes) < 1:
        parser.error("found a number below 1, expected whole numbers >= 1")
    if unknown := sorted(set(options.only) - PAIRS.keys()):
        parser.error(f"unknown pairs {unknown}; there are {', '.join(PAIRS)}")
    pairs = {name: PAIRS[name] for name in options.only}
    data = None if options.data is None else Path(options.data)
    facts = machine_facts(_MODULE, _without_paths(given), f"{options.threads} threads; {_versions()}")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for name, size, batch in _places(options):
            place = {"model": name, "size": size, "batch": batch, "threads": options.threads, "facts": facts}
            if options.what == "memory":
                cells = memory_cells({**place, "weights": "random"}, pairs)
                add_cells(MemoryCell, cells, options.output, list(PAIRS))
                continue
            of, weights = subject(name, size, batch, data)
            place |= {"weights": weights, "load": round(os.getloadavg()[0], 1)}
            add_cells(TimeCell, time_cells(place, of, pairs, options.rounds), options.output, list(PAIRS))
    finally:
        torch.set_num_threads(before)
    print((options.output / "peers.md").read_text(encoding="utf-8"))


def _places(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    for name in options.models:
        for size in options.sizes:
            for batch in options.batches:
                yield (name if "_patch" in name else f"{name}_patch16_224"), size, batch


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
