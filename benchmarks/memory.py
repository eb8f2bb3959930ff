"""Peak memory of an explanation, beside the plain passes and beside the usual N×N implementation.

``python -m vitexplain.benchmarks.memory --output benchmarks/results``

Each figure comes from a process of its own, one at a time. It builds the model and the input, runs the same
computation once on a tiny model, so that libraries have loaded what they load lazily, sets the kernel's high-water
mark of resident memory back to the present value, and runs once: the rise of the mark is the peak. The allocator is
told to give every large block back at once, so that the mark follows what is alive. A second run, under torch's
profiler, gives the peak of the tensors alone. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vitexplain.files import write_whole

from .measuring import (
    FORWARD_BACKWARD,
    USUAL,
    Run,
    candidate,
    known_methods,
    machine_facts,
    markdown_table,
    random_images,
    random_vit,
    verdict,
)
from .processes import Processes

LIMIT = 1.25
"""How many times the memory of forward + backward an explanation may take."""
_MODULE = "vitexplain.benchmarks.memory"


@dataclass(frozen=True)
class Peak:
    """One measurement.

    Attributes:
        candidate: what ran.
        size: image side in pixels.
        process: rise of the process's resident memory in MiB; on CUDA that of the tensors.
        tensors: peak of the tensors made meanwhile, in MiB.
        failure: how the process failed, if it did; the figures are then None.
    """

    candidate: str
    size: int
    process: float | None = None
    tensors: float | None = None
    failure: str = ""


def resident_rise(run: Run) -> float:
    """Rise of this process's peak resident memory during a run, in MiB.

    The mark is `VmHWM`: `ru_maxrss` of getrusage, without what a process inherits from the one that started it.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
    before = _kibibytes("self/status", "VmHWM")
    run()
    return (_kibibytes("self/status", "VmHWM") - before) / 1024


def _kibibytes(file: str, field: str) -> int:
    return int(re.findall(rf"^{field}:\s+(\d+) kB", Path("/proc", file).read_text(), re.MULTILINE)[0])


def tensor_peak(run: Run) -> float:
    """Largest sum of the CPU tensors that a run holds at a time, in MiB, from the profiler's allocation events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    allocations = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    for event in sorted(allocations, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def measure_here(name: str, model_name: str, size: int, device: str = "cpu") -> Peak:
    """Measures one candidate in this process."""
    candidate(name, random_vit(model_name, 64, depth=2).to(device), random_images(1, 64).to(device))()
    run = candidate(name, random_vit(model_name, size).to(device), random_images(1, size).to(device))
    if torch.device(device).type == "cuda":  # written for a GPU, not yet tried on one
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        rise = (torch.cuda.max_memory_allocated() - before) / 2**20
        return Peak(name, size, rise, rise)
    return Peak(name, size, resident_rise(run), tensor_peak(run))


def measure(alone: Processes, name: str, model_name: str, size: int, device: str = "cpu") -> Peak:
    """Measures one candidate in a process of its own; a process that fails gives a row that says how."""
    found = alone.measure(limited, [name, model_name, size, device])
    return Peak(name, size, failure=found) if isinstance(found, str) else Peak(**found)


def limited(*task: Any) -> dict[str, Any]:
    """`measure_here` as a process does it."""
    limit_memory(int(0.95 * available_memory()))
    return asdict(measure_here(*task))


def available_memory() -> int:
    """Bytes of the machine's memory that are free now."""
    return 1024 * _kibibytes("meminfo", "MemAvailable")


def limit_memory(allowed: int) -> None:
    """Lets this process fail alone when it needs more bytes than that, before the kernel picks a victim."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (allowed, resource.RLIM_INFINITY))


def ratios(peaks: Sequence[Peak], name: str) -> dict[str, float | None]:
    """Image size → memory of a candidate as a multiple of forward + backward; None where either has no figure."""
    by = {(peak.candidate, peak.size): peak.process for peak in peaks}
    sizes = sorted({peak.size for peak in peaks})
    pairs = {f"{size} px": (by.get((name, size)), by.get((FORWARD_BACKWARD, size))) for size in sizes}
    return {place: own / plain if own is not None and plain else None for place, (own, plain) in pairs.items()}


def report(peaks: Sequence[Peak], methods: Sequence[str], model_name: str, facts: str) -> str:
    """The figures and the verdicts as Markdown."""
    rows = []
    for peak in sorted(peaks, key=lambda peak: peak.size):
        figures = [peak.failure, "", ""]
        if peak.process is not None and peak.tensors is not None:
            ratio = ratios(peaks, peak.candidate)[f"{peak.size} px"]
            figures = [f"{peak.process:.0f}", f"{peak.tensors:.0f}", "" if ratio is None else f"{ratio:.2f}"]
        rows.append([peak.candidate, str(peak.size), *figures])
    claim = f"at most {LIMIT}× the memory of forward + backward at every size"
    return "\n".join(
        [
            f"# Peak memory of {model_name}\n",
            "Memory that one explanation of one image (batch 1) takes on top of model and input, in MiB; random "
            "weights, float32. Each row is a process of its own. *Process* is the rise of resident memory, *tensors* "
            f"the peak of the tensors alone; the ratio is of *process*. `{FORWARD_BACKWARD}` has frozen weights, fused "
            f"attention and the gradient at the first block's input. `{USUAL}` is generic attention as it is usually "
            "written, weights frozen too: attention of all blocks kept, its gradients by autograd, matrices "
            "multiplied.\n",
            *(f"- {verdict(f'`{name}` takes {claim}', ratios(peaks, name), LIMIT)}" for name in methods),
            "",
            markdown_table(["computation", "pixels", "process", "tensors", "× forward + backward"], rows),
            "\n![Peak memory against image size](memory.png)\n",
            facts,
            "",
        ]
    )


def table_file(peaks: Sequence[Peak]) -> str:
    """The figures as CSV, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Peak)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(peak) for peak in peaks)
    return text.getvalue()


def draw(peaks: Sequence[Peak], model_name: str, file: BinaryIO) -> None:
    """Draws peak memory against image size as PNG; what failed has no point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, marker in zip(dict.fromkeys(peak.candidate for peak in peaks), "osD^vPX*" * len(peaks), strict=False):
        points = sorted((peak.size, peak.process) for peak in peaks if peak.candidate == name and peak.process)
        broad = {"linewidth": 7, "alpha": 0.3} if name == FORWARD_BACKWARD else {"marker": marker}
        label = name if points else f"{name} (failed)"
        axes.plot([point[0] for point in points], [point[1] for point in points], label=label, **broad)
    axes.set(xlabel="image side in pixels", ylabel="peak memory in MiB", yscale="log")
    axes.set_title(f"{model_name}: memory of one explanation, batch 1, float32", fontsize=11)
    axes.set_xticks(sorted({peak.size for peak in peaks}))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="major", alpha=0.4)
    axes.legend()
    figure.savefig(file, format="png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes memory.md, memory.csv and memory.png where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 768, 1024], help="image sides in pixels")
    parser.add_argument("--methods", nargs="+", default=["tokentm", "generic_attention"], help="explanation methods")
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm Vision Transformer with a CLS token")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (not yet tried on one)")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if sys.platform != "linux":
        parser.error("peak memory is read from /proc: run it on Linux")
    peaks = []
    with Processes([_MODULE]) as alone:
        for size in options.sizes:
            for name in [FORWARD_BACKWARD, *known_methods(options.methods), USUAL]:
                peaks.append(measure(alone, name, options.model, size, options.device))
                print(peaks[-1], file=sys.stderr, flush=True)  # what is known so far, should the next take long
    facts = machine_facts(_MODULE, given, f"{torch.get_num_threads()} threads")
    text = report(peaks, options.methods, options.model, facts)
    print(text)
    if options.output:
        write_whole(options.output / "memory.md", lambda file: file.write(text.encode()))
        write_whole(options.output / "memory.csv", lambda file: file.write(table_file(peaks).encode()))
        write_whole(options.output / "memory.png", lambda file: draw(peaks, options.model, file))


if __name__ == "__main__":
    main()
