"""The memory and speed drivers: they run, their figures are positive, and their verdicts follow from the figures."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from vitexplain import get_explainer
from vitexplain.bench import read_configuration
from vitexplain.benchmarks import measuring, memory, processes, speed
from vitexplain.benchmarks.memory import Peak
from vitexplain.benchmarks.speed import Times
from vitexplain.data import dataset_info
from vitexplain.metrics import metric_info

CONFIGURATIONS = Path(__file__).parents[1] / "benchmarks" / "configurations"
TINY = "vit_tiny_patch16_224"
SIZE = 48

linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return measuring.random_vit(TINY, SIZE, depth=3)


def cells(markdown: str) -> list[list[str]]:
    """The rows of a report's table, without header and rule."""
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


# ------------------------------------------------------------------------------------------ what is compared with


def test_forward_backward_gives_the_gradient_at_the_first_block(vit):
    images = measuring.random_images(2, SIZE)
    blocks = vit.blocks
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images))).detach().requires_grad_(True)
    score = vit.forward_head(vit.norm(blocks(tokens)))[:, 3].sum()
    (expected,) = torch.autograd.grad(score, tokens)
    torch.testing.assert_close(measuring.forward_backward(vit, images, 3), expected)


def test_the_usual_implementation_gives_the_map_of_generic_attention(vit):
    images = measuring.random_images(2, SIZE)
    usual = measuring.usual_generic_attention(vit, images, 5)
    scores = get_explainer("generic_attention", vit)(images, 5).scores
    torch.testing.assert_close(usual, scores.flatten(1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", [measuring.FORWARD, measuring.FORWARD_BACKWARD, measuring.USUAL, "tokentm"])
def test_a_candidate_leaves_the_model_as_it_was(vit, name):
    vit.blocks[1].mlp.fc1.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    measuring.candidate(name, vit, measuring.random_images(1, SIZE))()
    assert before == {name: parameter.requires_grad for name, parameter in vit.named_parameters()}
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert all(block.attn.fused_attn for block in vit.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_models_and_images_repeat():
    first, second = (measuring.random_vit(TINY, SIZE, depth=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(measuring.random_images(1, SIZE), measuring.random_images(1, SIZE))


# ------------------------------------------------------------------------------------------ verdicts and tables


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"224 px": 1.0, "512 px": 1.25}, "C: **met**, largest ratio 1.250× (512 px)."),
        ({"224 px": 1.2501, "512 px": 1.1}, "C: **not met**, largest ratio 1.250× (224 px)."),
        ({"224 px": 1.3, "512 px": None}, "C: **not met**, no figure for 512 px."),
        ({}, "C: **not met**, no figure for any case."),
    ],
)
def test_verdict(ratios, expected):
    assert measuring.verdict("C", ratios, 1.25) == expected


def test_markdown_table():
    assert measuring.markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_unknown_methods_are_named_before_anything_is_measured():
    with pytest.raises(SystemExit, match=r"\['rolout'\].*rollout"):
        measuring.known_methods(["rolout", "tokentm"])


# ------------------------------------------------------------------------------------------ memory

MADE_UP = [
    Peak(measuring.FORWARD_BACKWARD, 224, 100.0, 90.0),
    Peak("tokentm", 224, 110.0, 99.0),
    Peak("generic_attention", 224, 130.0, 99.0),
    Peak(measuring.USUAL, 224, 200.0, 180.0),
    Peak(measuring.FORWARD_BACKWARD, 64, 50.0, 45.0),
    Peak("tokentm", 64, 60.0, 49.0),
    Peak("generic_attention", 64, 60.0, 50.0),
    Peak(measuring.USUAL, 64, failure="killed by SIGKILL, as when memory runs out"),
]


def test_memory_report_on_made_up_figures():
    report = memory.report(MADE_UP, ["tokentm", "generic_attention"], TINY, "facts")
    tokentm, generic = (line for line in report.splitlines() if line.startswith("- "))
    assert "`tokentm`" in tokentm
    assert tokentm.endswith("**met**, largest ratio 1.200× (64 px).")
    assert "`generic_attention`" in generic
    assert generic.endswith("**not met**, largest ratio 1.300× (224 px).")
    table = cells(report)
    assert [row[1] for row in table] == ["64"] * 4 + ["224"] * 4
    assert ["tokentm", "224", "110", "99", "1.10"] in table
    assert [measuring.USUAL, "64", "killed by SIGKILL, as when memory runs out", "", ""] in table
    assert report.endswith("facts\n")


@pytest.mark.parametrize("failed", [measuring.FORWARD_BACKWARD, "tokentm"])
def test_a_failed_process_meets_no_target(failed):
    peaks = [peak if peak.candidate != failed else Peak(failed, peak.size, failure="killed") for peak in MADE_UP]
    assert memory.ratios(peaks, "tokentm") == {"64 px": None, "224 px": None}
    assert "**not met**, no figure for 64 px, 224 px" in memory.report(peaks, ["tokentm"], TINY, "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nmore"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ValueError("no such model\nmore"), "ValueError: no such model"),
        (ValueError(), "ValueError: "),
    ],
)
def test_failures_in_words(error, expected):
    assert processes.failure(error) == expected


def test_memory_csv_keeps_all_figures():
    rows = list(csv.DictReader(io.StringIO(memory.table_file(MADE_UP))))
    assert [row["candidate"] for row in rows] == [peak.candidate for peak in MADE_UP]
    assert float(rows[1]["process"]) == 110.0
    assert rows[-1]["process"] == ""
    assert rows[-1]["failure"].startswith("killed by SIGKILL")


def test_the_plot_is_drawn_also_where_a_candidate_failed_everywhere():
    pytest.importorskip("matplotlib")
    file = io.BytesIO()
    memory.draw([*MADE_UP, Peak("rollout", 64, failure="killed")], TINY, file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_tensor_peak_counts_what_lives_together():
    def run() -> None:
        for _ in range(3):
            first = torch.ones(256, 1024)  # 1 MiB
            second = first + 1
            del first, second

    assert memory.tensor_peak(run) == pytest.approx(2, abs=0.1)


@linux
def test_resident_rise_sees_what_is_freed_before_the_end():
    code = (  # in a process of its own, as drivers measure: this one may hold free memory to give
        "import torch; from vitexplain.benchmarks.memory import resident_rise; torch.ones(2**20).sum(); "
        "print(resident_rise(lambda: torch.ones(16 * 2**20).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(64, abs=8)  # MiB


@linux
def test_a_process_that_fails_gives_a_row():
    with processes.Processes([]) as alone:
        peak = memory.measure(alone, "no such method", TINY, SIZE)
    assert peak.process is None
    assert "no such method" in peak.failure


@linux
@pytest.mark.slow
def test_memory_driver(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    memory.main(["--sizes", "96", "--methods", "tokentm", "--model", TINY, "--output", str(tmp_path)])
    report = (tmp_path / "memory.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    table = cells(report)
    assert [row[0] for row in table] == [measuring.FORWARD_BACKWARD, "tokentm", measuring.USUAL]
    assert all(float(figure) > 0 for row in table for figure in row[2:])
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.csv", "memory.md", "memory.png"]
    figures = [float(row["process"]) for row in csv.DictReader((tmp_path / "memory.csv").read_text().splitlines())]
    assert all(figure > 1 for figure in figures)


# ------------------------------------------------------------------------------------------ speed


def made_up_times() -> dict[str, Times]:
    return {
        measuring.FORWARD: Times([1.0, 2.0, 1.0], [1.0, 1.0, 1.0]),
        measuring.FORWARD_BACKWARD: Times([2.0, 4.0, 2.0], [2.0, 2.0, 2.0]),
        "rollout": Times([1.1, 2.2, 5.0], [9.0, 9.0, 9.0]),
        "tokentm": Times([2.6, 5.2, 2.6], [2.0, 2.0, 2.0]),
    }


def test_speed_report_on_made_up_figures():
    report = speed.report({(TINY, 1): made_up_times(), (TINY, 2): made_up_times()}, 224, 8, "facts")
    rollout, tokentm = (line for line in report.splitlines() if line.startswith("- "))
    assert rollout == f"- `rollout` takes at most 1.15× forward: **met**, largest ratio 1.100× ({TINY})."
    assert tokentm.endswith(f"1.2× forward + backward: **not met**, largest ratio 1.300× ({TINY}).")
    assert "ratio of CPU time with 1 thread:" in report
    table = cells(report)
    assert [row[2] for row in table] == ["1"] * 4 + ["2"] * 4
    assert table[2][3:] == ["2200", "9000", "forward", "1.100 [1.100, 3.050]", "9.000 [9.000, 9.000]", "1.15"]


def test_ratios_are_taken_within_rounds():
    assert speed.quartiles([1.0, 20.0, 3.0], [1.0, 10.0, 3.0]) == (1.0, 1.0, 1.5)


def test_rounds_are_interleaved_every_other_one_backwards_and_nothing_follows_itself():
    seen: list[str] = []
    times = speed.interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=4)
    assert "".join(seen[3:]) == "abcbacbcacba"
    assert all(one != other for one, other in pairwise(seen))
    assert all(len(each.cpu) == len(each.wall) == 4 for each in times.values())


def test_speed_driver(tmp_path, capsys):
    before = torch.get_num_threads()
    options = ["--size", str(SIZE), "--batch", "2", "--rounds", "2", "--threads", "1", "--output", str(tmp_path)]
    speed.main(["--models", TINY, *options])
    assert torch.get_num_threads() == before
    report = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    table = cells(report)
    assert [row[0] for row in table] == [measuring.FORWARD, measuring.FORWARD_BACKWARD, *speed.TARGETS]
    assert all(float(re.match(r"[\d.]+", row[column])[0]) > 0 for row in table for column in (3, 4, 6, 7))
    assert f"--models {TINY}" in report
    assert [path.name for path in Path(tmp_path).iterdir()] == ["speed.md"]


def test_speed_driver_refuses_no_rounds(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--rounds", "0"])
    assert "--rounds" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_understood(path: Path) -> None:
    configuration = read_configuration(path)
    dataset = dataset_info(configuration.data.format)
    assert set(configuration.data.options) <= {each.name for each in dataset.options}
    requires = frozenset[str]().union(*(metric_info(each.name).requires for each in configuration.metrics))
    assert requires & {"masks", "boxes", "labels"} <= set(dataset.gives)
