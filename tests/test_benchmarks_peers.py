"""The drivers that compare with other packages, and that see time grow; the naive recipes are a known answer."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitexplain import Capture, Needs, get_explainer
from vitexplain.benchmarks import (
    measuring,
    naive_recipes,
    peer_cells,
    peer_libraries,
    peer_memory,
    peer_report,
    peer_times,
    peers,
    processes,
    scaling,
)
from vitexplain.benchmarks.peer_cells import MemoryCell, TimeCell
from vitexplain.benchmarks.peer_libraries import Prepare, Subject
from vitexplain.benchmarks.peer_methods import PAIRS, Pair, Plan, Side
from vitexplain.benchmarks.processes import ALLOCATOR, Processes
from vitexplain.benchmarks.scaling import Curve
from vitexplain.block_scores import RECORDED, score_blocks

TINY = "vit_tiny_patch16_224"
SIZE = 64


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = measuring.random_vit(TINY, SIZE, depth=3)
    return Subject(model, measuring.random_images(2, SIZE), torch.tensor([3, 7]))


# ------------------------------------------------------------------------------------------ what is compared with


@pytest.mark.parametrize("name", naive_recipes.RECIPES)
def test_naive_recipes_are_the_methods(subject: Subject, name: str) -> None:
    naive = naive_recipes.RECIPES[name](subject.model, subject.images, subject.classes)
    scores = get_explainer(name, subject.model)(subject.images, subject.classes).scores.flatten(1)
    torch.testing.assert_close(naive, scores, rtol=1e-4, atol=1e-9)
    assert naive.std(1).min() > 0


@pytest.mark.parametrize("name", naive_recipes.RECIPES)
def test_naive_recipes_leave_the_model_as_it_was(subject: Subject, name: str) -> None:
    naive_recipes.RECIPES[name](subject.model, subject.images, subject.classes)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in subject.model.parameters())
    assert all(block.attn.fused_attn for block in subject.model.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())


@pytest.mark.parametrize("name", ["saliency", "integrated_gradients", "layer_gradcam", "occlusion"])
def test_captum_gives_the_same_maps(subject: Subject, name: str) -> None:
    pair = PAIRS[name]
    own = pair.ours_rows(pair.run_ours(subject)(), subject)
    other = pair.peer_rows(pair.run_peer(subject)(), subject)
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


def test_the_twin_is_the_same_model(subject: Subject) -> None:
    pytest.importorskip("torchvision")
    twin = peer_libraries.torchvision_twin(subject.model)
    with torch.no_grad():
        torch.testing.assert_close(twin(subject.images), subject.model(subject.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("pytorch_grad_cam", ["gradcam", "hirescam", "layercam", "eigencam"]),
        ("torchcam", ["legrad"]),
        ("quantus", ["deletion"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_peers_give_the_same_where_they_are_installed(subject: Subject, package: str, names: list[str]) -> None:
    for name in names:
        side = Side.of(PAIRS[name].run_peer, subject)
        side()
        if importlib.util.find_spec(package) is None:  # then there is a row that says so
            assert side.failure.startswith("ModuleNotFoundError")
            continue
        pair = PAIRS[name]
        rows = pair.ours_rows(pair.run_ours(subject)(), subject), pair.peer_rows(side.outcome, subject)
        correlation, difference = peer_cells.likeness(*rows)
        if name == "deletion":  # ties within a patch are cut in other places
            assert correlation > 0.8
        else:
            assert correlation > 0.999
            assert difference < 1e-4


def test_likeness_on_made_up_rows() -> None:
    rows = torch.tensor([[0.0, 1.0, 2.0, 4.0], [4.0, 3.0, 2.0, 0.0]])
    assert peer_cells.likeness(rows, 5 * rows - 1) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert peer_cells.likeness(rows, -rows)[0] == pytest.approx(-1)
    other = torch.tensor([[0.0, 2.0, 2.0, 4.0], [4.0, 3.0, 2.0, 0.0]])
    correlation, difference = peer_cells.likeness(rows, other)
    assert 0.9 < correlation < 1
    assert difference == pytest.approx(0.25)
    assert peer_cells.likeness(torch.stack([rows, -rows]), -rows) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


# ------------------------------------------------------------------------------------------ the driver


PLACE: dict[str, Any] = {"model": TINY, "size": SIZE, "batch": 2, "threads": 1, "weights": "random", "facts": "F"}


def raising(error: Exception, after: int = 0) -> Prepare:
    """A side that works so many times before it raises."""
    calls = []

    def run() -> object:
        calls.append(1)
        if len(calls) > after:
            raise error
        return torch.arange(2 * SIZE**2).view(2, -1)

    return lambda _: run


def timed(subject: Subject, pair: Pair, *, rounds: int = 2, warm: bool = True) -> TimeCell:
    figures = peer_times.figures(subject, pair, rounds, warm)
    return TimeCell(**PLACE, **pair.names("gradcam"), load=0.5, **figures)


def test_a_failing_peer_has_a_row_that_says_how(subject: Subject) -> None:
    error = LookupError("no such thing | at all\nsecond line")
    cell = timed(subject, replace(PAIRS["gradcam"], run_peer=raising(error)))
    assert cell.peer_failure == "LookupError: no such thing | at all"
    assert cell.ours_failure == ""
    assert cell.speedup is cell.peer_seconds is cell.likeness is None
    assert cell.ours_seconds is not None
    assert cell.ours_seconds > 0
    text = peer_report.report([cell], [])
    assert "0 of 0 rows" in text
    assert "LookupError: no such thing / at all |" in text


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at a.cpp:1] b: can't allocate memory: you tried\nmore")]
)
@pytest.mark.parametrize("after", [0, 2])
def test_a_side_that_runs_out_of_memory_fails_alone(subject: Subject, error: Exception, after: int) -> None:
    cell = timed(subject, replace(PAIRS["gradcam"], run_ours=raising(error, after)))
    assert (cell.ours_failure, cell.left_out) == ("out of memory", "")
    assert cell.ours_seconds is None
    assert "- Failed: gradcam (out of memory)." in peer_report.report([cell], [])


# ------------------------------------------------------------------------------------------ the time of a pair


@pytest.mark.parametrize(
    ("call", "rounds", "warm"),
    [
        (0.1, 7, True),
        (7.5, 7, True),
        (8.6, 5, True),
        (20.0, 2, True),
        (30.0, 1, True),
        (31.0, 1, False),
        (61.0, 1, False),
        (90.0, 1, False),
        (91.0, 0, False),
    ],
)
def test_as_many_rounds_as_fit_a_minute(call: float, rounds: int, warm: bool) -> None:
    plan = Plan(call, seconds=60, most=7, longest=90)
    assert (plan.rounds, plan.warm) == (rounds, warm)
    assert bool(plan.left_out) == (rounds == 0)


def test_a_pair_that_does_not_fit_says_what_it_takes() -> None:
    assert Plan(20.0, 60.0, 7, 10.0).rounds == 0
    assert Plan(310.2, 60.0, 7, 300.0).left_out == "about 310 s for one call of both sides, more than --longest 300"


@pytest.mark.parametrize(("call", "whole"), [(1.0, 7.0), (25.0, 50.0), (40.0, 40.0), (70.0, 0.0)])
def test_what_all_calls_of_a_pair_take(call: float, whole: float) -> None:
    assert Plan(call, seconds=60, most=6, longest=65).whole == pytest.approx(whole)


@pytest.mark.parametrize(("rounds", "warm", "calls"), [(2, True, 3), (1, False, 1)])
def test_both_sides_are_called_once_a_round(subject: Subject, rounds: int, warm: bool, calls: int) -> None:
    done: dict[str, int] = {"ours": 0, "peer": 0}

    def counted(side: str) -> Prepare:
        def run() -> torch.Tensor:
            done[side] += 1
            return torch.arange(2 * SIZE**2).view(2, -1)

        return lambda _: run

    flat = PAIRS["gradcam"].peer_rows
    pair = replace(PAIRS["gradcam"], run_ours=counted("ours"), run_peer=counted("peer"), ours_rows=flat)
    cell = timed(subject, pair, rounds=rounds, warm=warm)
    assert done == {"ours": calls, "peer": calls}
    assert cell.rounds == rounds
    assert cell.likeness == (pytest.approx(1), 0)


def test_what_pairs_cost() -> None:
    occlusion, recipe = PAIRS["occlusion"].cost, PAIRS["naive_rollout"].cost
    assert occlusion(196, 192) == 2 * 144 + 3
    assert recipe(4608, 768) == pytest.approx(2.6 + 4608**2 / (12 * 768**2 + 2 * 4608 * 768))
    assert all(pair.cost(196, 768) >= 2.3 for pair in PAIRS.values())  # no less than forward + backward


def test_one_round_has_no_spread(subject: Subject) -> None:
    one = timed(subject, PAIRS["saliency"], rounds=1, warm=False)
    assert one.speedup is not None
    assert one.speedup[0] == one.speedup[1] == one.speedup[2] > 0
    assert one.likeness is not None


def test_times_of_each_pair_are_those_of_a_process() -> None:
    asked: list[tuple[list[Any], float | None]] = []

    class Answering(Processes):
        def __init__(self) -> None:
            pass

        def measure(self, measure: Any, task: Any, seconds: float | None = None) -> dict[str, Any] | str:
            assert measure is peer_times.measure_here
            asked.append((task, seconds))
            return "ended with status 1 and no figure" if task[0] == "saliency" else {"rounds": 3, "ours_seconds": 0.5}

    plans = {"layer_gradcam": Plan(1, 60, 3, 60), "saliency": Plan(40, 60, 3, 60)}
    pairs = {name: PAIRS[name] for name in plans}
    many, none = peer_times.time_cells({**PLACE, "load": 0.5}, pairs, plans, Answering(), 2**30, Path("data"))
    assert (many.pair, many.rounds, many.ours_seconds) == ("layer_gradcam", 3, 0.5)
    assert (none.pair, none.rounds, none.left_out) == ("saliency", 0, "ended with status 1 and no figure")
    assert asked == [
        (["layer_gradcam", 3, True, TINY, SIZE, 2, 1, 2**30, "data"], peer_times.START + 4 * peer_times.PATIENCE),
        (["saliency", 1, False, TINY, SIZE, 2, 1, 2**30, "data"], peer_times.START + 40 * peer_times.PATIENCE),
    ]


class Here(Processes):
    """Measures in this process: quicker, and what tests change counts."""

    def __init__(self, *_: object) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, measure: Any, task: Any, seconds: float | None = None) -> dict[str, Any] | str:
        found: dict[str, Any] | str = json.loads(processes._attempted(measure.__module__, measure.__name__, task))
        return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "Processes", Here)
    monkeypatch.setattr(peer_times, "limit_memory", lambda _: None)


def tiny_run(folder: Path, *arguments: str) -> str:
    places = ["--models", "vit_tiny", "--sizes", "32", "--rounds", "1", "--output", str(folder)]
    peers.main([*places, "--what", "time", *arguments])
    return (folder / "peers.md").read_text(encoding="utf-8")


def test_pairs_that_take_too_long_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "forward_seconds", lambda *_: 50.0)
    text = tiny_run(tmp_path, "--what", "all", "--batches", "8,32", "--only", "naive_rollout,saliency")
    assert text.count("| left out: about ") == 8
    assert "left out: about 2000 s for one call of both sides, more than --longest 600 |" in text
    assert (
        text.count("- Left out by time: 4 of 4 rows: vit_tiny, 32 px, batch 8 (2); vit_tiny, 32 px, batch 32 (2).") == 2
    )
    assert "Failed" not in text


@pytest.mark.usefixtures("here")
def test_where_a_plain_pass_fails_pairs_are_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(peer_times, "forward_backward", no_memory)
    text = tiny_run(tmp_path, "--batches", "1,2", "--only", "naive_rollout")
    assert (
        "- Nothing is compared with forward + backward (out of memory): "
        "vit_tiny, 32 px, batch 1; vit_tiny, 32 px, batch 2." in text
    )
    for cell in peer_cells.read_cells(TimeCell, tmp_path):
        assert cell.speedup is not None
        assert cell.ours_forward is not None
        assert cell.ours_backward is cell.peer_backward is cell.backward_seconds is None


@pytest.mark.parametrize("share", ["0", "1", "nan"])
def test_a_share_of_memory_is_a_share(tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tiny_run(tmp_path, "--batches", "1", "--share", share)
    assert "expected a number above 0 and below 1" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_cells_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*task: object) -> dict[str, Any]:
        if task[0] == "layer_gradcam":
            raise KeyboardInterrupt
        return {"rounds": 1}

    monkeypatch.setattr(stopped, "__module__", peer_times.__name__)
    stopped.__name__ = "measure_here"
    monkeypatch.setattr(peer_times, "measure_here", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, "--batches", "1", "--only", "naive_rollout,layer_gradcam")
    assert [cell.pair for cell in peer_cells.read_cells(TimeCell, tmp_path)] == ["naive_rollout"]


@pytest.mark.usefixtures("here")
def test_a_place_that_cannot_be_made_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Subject:
        raise MemoryError

    monkeypatch.setattr(peer_times, "subject", no_memory)
    text = tiny_run(tmp_path, "--batches", "1,2", "--only", "naive_rollout")
    assert (
        "- Left out (out of memory): 2 of 2 rows: vit_tiny, 32 px, batch 1 (1); vit_tiny, 32 px, batch 2 (1)." in text
    )


def test_cheap_places_come_first() -> None:
    options = argparse.Namespace(models=["vit_base", "vit_tiny"], sizes=[64, 32], batches=[8, 1])
    found = [(name[:8], size, batch) for name, size, batch in peers._places(options)]
    assert found == [
        ("vit_tiny", 32, 1),
        ("vit_base", 32, 1),
        ("vit_tiny", 64, 1),
        ("vit_tiny", 32, 8),
        ("vit_base", 64, 1),
        ("vit_base", 32, 8),
        ("vit_tiny", 64, 8),
        ("vit_base", 64, 8),
    ]


# ------------------------------------------------------------------------------------------ processes


def answered(value: float) -> dict[str, Any]:
    print("no answer")  # as libraries may
    return {"value": value, "process": os.getpid(), "allocator": os.environ.get("MALLOC_ARENA_MAX")}


def raised(kind: str) -> dict[str, Any]:
    raise {"memory": MemoryError, "lookup": LookupError}[kind]("first line\nsecond")


def killed(signal_number: int) -> dict[str, Any]:
    os.kill(os.getpid(), signal_number)
    return {}


def unwritable() -> dict[str, Any]:
    return {"value": 1.5, "path": Path("somewhere")}


def written_down(path: str) -> dict[str, Any]:
    Path(path + "_").write_text(str(os.getpid()))
    Path(path + "_").rename(path)
    time.sleep(600)
    return {}


def parent_killed() -> dict[str, Any]:
    os.kill(os.getppid(), 9)
    return {}


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the functions above are found
        started = Processes(["no_such_module", "torch"])
    with started:
        yield started


def test_each_measurement_has_a_process_of_its_own(alone: Processes) -> None:
    found = [alone.measure(answered, [value]) for value in (1.5, 2.5)]
    assert all(isinstance(each, dict) for each in found)
    first, second = (each for each in found if isinstance(each, dict))
    assert (first["value"], second["value"]) == (1.5, 2.5)
    assert len({first["process"], second["process"], os.getpid()}) == 3
    assert first["allocator"] == ALLOCATOR["MALLOC_ARENA_MAX"]
    assert "MALLOC_ARENA_MAX" not in os.environ


@pytest.mark.parametrize(
    ("measure", "task", "said"),
    [
        (raised, "memory", "out of memory"),
        (raised, "lookup", "LookupError: first line"),
        (killed, 9, "killed by SIGKILL, as when memory runs out"),
        (killed, 11, "killed by SIGSEGV"),
        (os._exit, 3, "ended with status 3 and no figure"),
        (sys.exit, 3, "ended with status 1 and no figure"),
    ],
)
def test_a_process_that_fails_says_how(alone: Processes, measure: Any, task: object, said: str) -> None:
    assert alone.measure(measure, [task]) == said


def test_a_process_is_killed_when_its_time_is_over(alone: Processes) -> None:
    began = time.monotonic()
    assert alone.measure(time.sleep, [600], 0.5) == "took more than 0 s"
    assert time.monotonic() - began < 60


def test_what_cannot_be_written_down_is_a_failure(alone: Processes) -> None:
    assert str(alone.measure(unwritable, [])).startswith("TypeError: Object of type")
    assert isinstance(alone.measure(answered, [1.0]), dict)


def test_when_what_starts_them_ends_there_is_a_row_that_says_so(alone: Processes) -> None:
    assert alone.measure(parent_killed, []) == "the process that starts the others has ended"
    assert isinstance(alone.measure(answered, [1.0]), dict)  # there is another one


def test_leaving_ends_a_measurement_that_runs(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent))
        started = Processes([])
    with started, ThreadPoolExecutor(1) as beside:
        running = beside.submit(started.measure, written_down, [str(tmp_path / "process")])
        while not (tmp_path / "process").exists():
            assert not running.done()
            time.sleep(0.05)
        child = int((tmp_path / "process").read_text())
        os.kill(child, 0)
        started._parent.stdin.close()  # type: ignore[union-attr]
        assert "killed by SIGKILL" in str(running.result(60))
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


# ------------------------------------------------------------------------------------------ the tables


def test_no_place_of_this_machine_gets_into_a_row() -> None:
    message = "cannot import name 'a' from 'b.c' (/opt/lib/python3/site-packages/b/c.py), 3 px/s"
    assert peer_cells.without_places(message) == "cannot import name 'a' from 'b.c', 3 px/s"


@pytest.mark.usefixtures("here")
def test_cells_of_several_runs_make_one_table(tmp_path: Path) -> None:
    tiny_run(tmp_path, "--batches", "1,2", "--only", "naive_rollout")
    text = tiny_run(tmp_path, "--batches", "2", "--only", "layer_gradcam,naive_rollout", "--threads", "1", "--add")
    rows = list(csv.DictReader((tmp_path / "peers_time.csv").read_text(encoding="utf-8").splitlines()))
    found = [(json.loads(row["batch"]), json.loads(row["pair"])) for row in rows]
    assert found == [(1, "naive_rollout"), (2, "layer_gradcam"), (2, "naive_rollout")]
    assert all(json.loads(row["speedup"])[1] > 0 for row in rows)
    assert ["--threads 1" in row["facts"] for row in rows] == [False, True, True]  # the later run's
    assert "| rollout | naive rollout | vit_tiny | 32 | 2 |" in text
    assert text.count("Command: ") == 2


@pytest.mark.usefixtures("here")
def test_a_run_begins_new_tables(tmp_path: Path) -> None:
    peer_report.add_cells(MemoryCell, [MemoryCell(**PLACE, pair="gradcam", ours="A", peer="P")], tmp_path, list(PAIRS))
    tiny_run(tmp_path, "--batches", "1,2", "--only", "naive_rollout")
    text = tiny_run(tmp_path, "--batches", "1", "--only", "layer_gradcam")
    assert [cell.pair for cell in peer_cells.read_cells(TimeCell, tmp_path)] == ["layer_gradcam"]
    assert not (tmp_path / "peers_memory.csv").exists()
    assert "## Memory" not in text
    assert text.count("Command: ") == 1


def test_the_place_of_the_data_stays_out_of_the_tables() -> None:
    assert peers._without_paths(["--rounds", "1", "--data", "/somewhere"]) == ["--rounds", "1", "--data", "…"]


@pytest.mark.parametrize(
    ("argument", "value"), [("--only", "gradcamm"), ("--rounds", "0"), ("--seconds", "0"), ("--longest", "0")]
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    argument: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers_time.csv").write_text("kept")
    with pytest.raises(SystemExit):
        peers.main(["--output", str(tmp_path), argument, value])
    assert value in capsys.readouterr().err or value == "0"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


MADE_UP: dict[str, Any] = {"model": TINY, "weights": "random", "size": 224, "threads": 1, "facts": "C\n\nM"}


def test_the_report_says_who_is_ahead() -> None:
    memory = [
        MemoryCell(**MADE_UP, batch=1, pair="a", ours="A", peer="P", ours_mebibytes=10.0, peer_mebibytes=25.0),
        MemoryCell(**MADE_UP, batch=8, pair="a", ours="A", peer="P", ours_mebibytes=30.0, peer_mebibytes=15.0),
        MemoryCell(**MADE_UP, batch=8, pair="b", ours="B", peer="Q", ours_mebibytes=30.0, peer_failure="killed"),
    ]
    text = peer_report.report([], memory)
    assert "smaller in 1 of 2 rows" in text
    assert "2.50 to 2.5 times" in text
    assert "- Larger: A against P (vit_tiny, 224 px, batch 8): 0.50." in text
    assert "- Failed: Q (killed)." in text
    assert text.count("C\n\nM") == 1


def test_the_report_begins_with_an_overview() -> None:
    ahead = MemoryCell(**MADE_UP, batch=1, pair="a", ours="A", peer="P", ours_mebibytes=10.0, peer_mebibytes=25.0)
    level = replace(ahead, batch=8, peer_mebibytes=10.04)
    lost = replace(ahead, pair="b", ours="B", peer="Q", batch=32, peer_mebibytes=None, peer_failure="out of memory")
    both = replace(lost, batch=8, ours_mebibytes=None, ours_failure="out of memory")
    left = replace(ahead, pair="c", ours="C", peer="R", ours_mebibytes=None, peer_mebibytes=None, left_out="too slow")
    text = peer_report.report([], [ahead, level, lost, both, left])
    overview = text[text.index("Memory of the other over memory here, vit_tiny") :].split("\n\n")[1]
    assert overview.splitlines()[0] == "| here | other | 224 px, 1 | 224 px, 8 | 224 px, 32 |"
    assert overview.splitlines()[2:] == ["| A | P | 2.50 | **1.00** |  |", "| B | Q |  |  | *room* |"]
    assert "- The other ran out of memory, and the method here did not: 1 row." in text


def test_the_report_sums_each_pair_up() -> None:
    times = [
        TimeCell(**MADE_UP, batch=batch, load=0.0, pair="a", ours="A", peer="P", speedup=[0.5, speedup, 9.0])
        for batch, speedup in ((1, 1.5), (8, 2.25), (32, 12.4))
    ]
    made = {"pair": "b", "ours": "B", "peer": "Q"}
    memory = [MemoryCell(**MADE_UP, batch=1, **made, ours_mebibytes=10.0, peer_failure="out of memory")]
    table = peer_report.report(times, memory).split("\n\n")[2].splitlines()
    assert table[2:] == ["| A | P | 1.50 to 12 (2.25, 3) |  |  |  |", "| B | Q |  |  |  | 1 |"]


def test_the_report_says_what_naive_recipes_hold_of_large_images() -> None:
    large = {**MADE_UP, "size": 768}
    ample = MemoryCell(
        **large, batch=1, pair="naive_rollout", ours="A", peer="P", ours_mebibytes=10.0, peer_mebibytes=73.0
    )
    nothing = replace(ample, batch=32, peer_mebibytes=None, peer_failure="out of memory")
    small, other = replace(ample, size=224, peer_mebibytes=11.0), replace(ample, pair="b", peer_mebibytes=11.0)
    text = peer_report.report([], [ample, nothing, small, other])
    claim = "At 768 pixels the naive recipes take at least 2 times as much: "
    assert f"- {claim}**met**, smallest 7.3 (A, vit_tiny, 768 px, batch 1); 1 of 2 rows have figures of both." in text
    text = peer_report.report([], [ample, replace(ample, batch=8, peer_mebibytes=19.0)])
    assert f"- {claim}**not met**, smallest 1.9 (A, vit_tiny, 768 px, batch 8); 2 of 2 rows" in text
    assert f"- {claim}**not met**, no row has figures of both." in peer_report.report([], [nothing])
    assert claim not in peer_report.report([], [small, other])


def test_cells_come_back_from_their_file(tmp_path: Path) -> None:
    cell = TimeCell(
        **MADE_UP,
        batch=1,
        pair="saliency",
        ours="A",
        peer='P, "quoted"',
        rounds=3,
        load=0.5,
        forward_seconds=0.1,
        backward_seconds=0.2,
        speedup=[1.0, 2.0, 3.0],
    )
    peer_report.add_cells(TimeCell, [cell], tmp_path, ["saliency"])
    assert peer_cells.read_cells(TimeCell, tmp_path) == [cell]
    assert peer_cells.read_cells(MemoryCell, tmp_path) == []


def test_memory_of_both_sides() -> None:
    asked: list[list[Any]] = []

    class Answering(Processes):
        def __init__(self) -> None:
            pass

        def measure(self, measure: Any, task: Any, seconds: float | None = None) -> dict[str, Any] | str:
            asked.append(task)
            assert measure is peer_memory.measure_here
            assert seconds == peer_memory.START + 10 * peer_memory.PATIENCE
            return "out of memory" if task[1] == "peer" else {"process": 7.0}

    place = {**MADE_UP, "batch": 8}
    pairs, plans = {"gradcam": PAIRS["gradcam"]}, {"gradcam": Plan(10.0, 60.0, 7, 60.0)}
    (cell,) = peer_memory.memory_cells(place, pairs, plans, Answering(), allowed=2**30)
    assert (cell.ours_mebibytes, cell.peer_mebibytes, cell.peer_failure) == (7.0, None, "out of memory")
    assert cell.forward_mebibytes == cell.backward_mebibytes == 7.0
    assert {task[-1] for task in asked} == {2**30}
    assert [task[:2] for task in asked] == [
        [measuring.FORWARD, "plain"],
        [measuring.FORWARD_BACKWARD, "plain"],
        ["gradcam", "ours"],
        ["gradcam", "peer"],
    ]


def test_times_do_not_run_under_the_allocator_of_memory() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent))
        started = Processes([], {})
    with started:
        found = started.measure(answered, [1.0])
    assert isinstance(found, dict)
    assert found["allocator"] is None


def test_memory_is_measured_beside_the_times(tmp_path: Path) -> None:
    text = tiny_run(tmp_path, "--what", "all", "--batches", "1", "--only", "naive_rollout")
    (timed_cell,) = peer_cells.read_cells(TimeCell, tmp_path)
    assert (timed_cell.failure, timed_cell.rounds) == ("", 1)
    assert timed_cell.speedup is not None
    (cell,) = peer_cells.read_cells(MemoryCell, tmp_path)
    assert cell.failure == ""
    assert cell.ours_mebibytes is not None
    assert cell.peer_mebibytes is not None
    assert "| rollout | naive rollout | vit_tiny | 32 | 1 |" in text.partition("## Memory")[2]


# ------------------------------------------------------------------------------------------ growth


def test_exponents_of_made_up_curves() -> None:
    values = (1, 2, 4, 8)
    square = Curve("tokens", "A", values, tuple((value**2, value**2, value**2) for value in values))
    assert square.exponent() == pytest.approx(2)
    bent = Curve("tokens", "A", values, tuple((seconds,) * 3 for seconds in (1.0, 1.0, 1.0, 2.0)))
    assert bent.exponent(2) == pytest.approx(1)
    assert 0 < bent.exponent() < 1


def test_growth_is_drawn_and_tabled() -> None:
    pytest.importorskip("matplotlib")
    curves = [
        Curve(axis, name, (1, 2), ((0.9, 1.0, 1.1), (1.8, 2.0, 2.2))) for axis in scaling.AXES for name in ("A", "B")
    ]
    text = scaling.report(curves, TINY, "facts")
    assert text.count("| A | 1000 | 2000 | 1.00 | 1.00 |") == len(scaling.AXES)
    file = io.BytesIO()
    scaling.draw(curves, file)
    assert b"<svg" in file.getvalue()


def test_scaling_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--axes", "targets", "methods", "--largest", "2", "--rounds", "1", "--methods", "gradcam"]
    scaling.main([*options, "--output", str(tmp_path)])
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert f"| {scaling.TOGETHER} |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.md", "scaling.svg"]


# ------------------------------------------------------------------------------------------ LeGrad from one forward


class Mixing(nn.Module):
    """A feed-forward branch in which tokens see each other, so that no token can be computed alone."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + 0.1 * tokens.mean(1, keepdim=True)


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("reads", [1, None])
def test_blocks_computed_again_give_what_a_second_forward_gives(mixing: bool, reads: int | None) -> None:
    model: Any = measuring.random_vit(TINY, SIZE, depth=3)
    images, forwards = measuring.random_images(2, SIZE), []
    if mixing:
        model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Mixing())
    model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def score(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, 0] if reads else tokens.mean(1)).square().sum(1)

    def gradients(needs: Needs) -> list[torch.Tensor]:
        with torch.no_grad(), Capture(model, needs) as capture:
            capture.forward(images)
            return [block.attention_gradient() for block in score_blocks(capture, 2, score, reads)]

    expected = gradients(Needs())
    assert len(forwards) == 2
    found = gradients(RECORDED)
    assert len(forwards) == (4 if mixing and reads else 3)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
        assert other.abs().max() > 0
