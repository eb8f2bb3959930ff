"""What the drivers behind the tables on Vision DiffMask compute, on cases with a known answer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import vitexplain
from vitexplain import load_model
from vitexplain.benchmarks import counting_grids, diffmask_photographs, diffmask_scenes, diffmask_speed
from vitexplain.benchmarks.counting_grids import agreement_with, figures, top_cells
from vitexplain.data import open_dataset
from vitexplain.diffmask.evaluation import MaskReport
from vitexplain.training.diffmask import DiffMaskSettings

RED = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1]]).bool()


def rows(markdown: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_agreement_of_a_mask_with_an_answer() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    precision, recall, union = agreement_with(mask, RED)
    torch.testing.assert_close(precision, torch.tensor([1 / 3, math.nan]), equal_nan=True)
    torch.testing.assert_close(recall, torch.tensor([1 / 2, 0.0]))
    torch.testing.assert_close(union, torch.tensor([1 / 4, 0.0]))


def test_as_many_top_cells_as_the_answer_has() -> None:
    scores = torch.tensor([[0.1, 3.0, 2.0, -5.0, 2.0, 0.0], [7.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert top_cells(scores, RED).int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]]
    assert top_cells(scores, ~RED).int().tolist() == [[1, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1]]
    assert not top_cells(scores, torch.zeros_like(RED)).any()


def test_the_better_answer_is_chosen_for_each_image() -> None:
    answers = {"red": RED, "others": ~RED}
    mask = torch.stack([RED[0], ~RED[1]])
    found = {name: value.item() for name, value in figures(dict.fromkeys(answers, mask), answers).items()}
    assert found["better: exact"] == found["better: IoU"] == 1
    assert found["red: exact"] == found["others: exact"] == 0.5
    assert found["red: IoU"] == found["red: precision"] == 0.5


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_the_settings_of_the_counting_task_are_chosen_without_labels() -> None:
    model, _ = counting_grids.learn_counting(steps=3, seed=0)
    settings = DiffMaskSettings(steps=2, evaluate_every=1, warmup_steps=1, margin=5.0, agreement=0.0)
    trained, start = counting_grids.learn_masks(model, settings)
    assert start in counting_grids.CHOICES
    test = counting_grids.make_counting_grids(6, 0, extremes=False)
    found, note = counting_grids.measure(trained, model, test)
    assert {"diffmask", "rollout", "generic_attention"} <= set(found)
    assert all(0 <= value <= 1 for each in found.values() for value in each.values() if not value.isnan())
    assert "kept" in note


def test_reports_of_several_batches_are_joined() -> None:
    report = MaskReport(torch.rand(3), torch.rand(3), torch.rand(3) > 0.5, torch.rand(3))
    joined = diffmask_scenes.joined([report, report])
    for field in dataclasses.fields(MaskReport):
        assert torch.equal(getattr(joined, field.name), getattr(report, field.name).repeat(2))
    assert len(diffmask_scenes.row(joined)) == len(diffmask_scenes.HEADER)


def test_figures_of_the_shipped_gates() -> None:
    lines = rows(diffmask_scenes.table(6))
    assert [line[0] for line in lines] == ["1", "2"]
    assert all(0 < float(line[1].rstrip("%")) < 60 for line in lines)


def test_cost_is_told_beside_the_forward_pass() -> None:
    text = diffmask_speed.report(["vit_tiny_patch16_224"], size=32, batch=1, rounds=3)
    ((model, forward, own, ratio),) = rows(text)
    assert model == "vit_tiny_patch16_224"
    assert min(int(forward), int(own)) > 0
    assert float(ratio.split()[0]) > 0.5
    assert "at most 1.25× forward" in text


@pytest.mark.parity
def test_photographs_to_train_on_and_to_test_on_are_apart(test_data: Path) -> None:
    trained, chosen_by, tested = diffmask_photographs.photographs(test_data)
    files = [example.image for example in tested]
    assert (len(trained), len(chosen_by), len(files)) == (1261, 64, 325)
    assert len({*trained, *chosen_by, *files}) == 1261 + 64 + 325


def test_masks_stand_beside_as_many_patches_chosen_otherwise() -> None:
    gates = Path(vitexplain.__file__).parent / "assets" / "scenes_diffmask.safetensors"
    examples = open_dataset("scenes", split="test", count=12)
    lines = diffmask_photographs.of_the_same_number(gates, load_model(), list(examples))
    assert [name for name, *_ in lines] == ["gates", *diffmask_photographs.RIVALS, "by chance"]
    assert len({kept for _, kept, *_ in lines}) == 1
    divergence = {name: float(value) for name, *_, value in lines}
    assert divergence["gates"] < 0.2 < divergence["by chance"]
