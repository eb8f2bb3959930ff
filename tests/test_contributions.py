"""Contributions: the formula written out, what is at its borders, and what "auto" stands for."""

from __future__ import annotations

import pytest
import timm
import torch
from families import make_images, make_model
from torch import Tensor, nn

from vitexplain import ExplanationWarning, OptionError, get_explainer
from vitexplain.balanced import BALANCED
from vitexplain.capture import Capture
from vitexplain.needs import Needs


def written_out(model: nn.Module, images: Tensor, target: int, start: int, gamma: float, beta: float) -> Tensor:
    """The map by whole matrices and loops."""
    with Capture(model, Needs(attention_gradient=True, backward=BALANCED)) as capture:
        capture.backward(capture.forward(images)[:, target].sum())
        moved = [(b.attention() * b.attention_gradient()).sum(1).clamp(min=0) for b in capture.blocks[start:]]
        seed, (h, w), prefix = capture.seed_row(), capture.grid, capture.layouts[0].prefix
    read = torch.stack([torch.einsum("bi,bij->bj", seed, each) for each in moved]).sum(0)[:, prefix:]
    given = torch.stack([each.sum(1) for each in moved]).sum(0)[:, prefix:]
    both = (read / read.sum(1, keepdim=True) + given / given.sum(1, keepdim=True)).reshape(-1, h, w)
    reach, around = (round(h / 7), round(w / 7)), torch.zeros_like(both)
    for i in range(h):
        for j in range(w):
            rows = slice(max(0, i - reach[0]), i + reach[0] + 1)
            columns = slice(max(0, j - reach[1]), j + reach[1] + 1)
            around[:, i, j] = both[:, rows, columns].mean((1, 2))
    sharp = both**gamma
    return sharp / sharp.sum((1, 2), keepdim=True) + beta * around / around.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("kind", ["cls", "distilled", "mean_pooled", "registers", "attention_pool", "eva"])
def test_the_map_is_the_formula(kind: str) -> None:
    model, images = make_model(kind), make_images(kind)
    start = round(len(model.blocks) / 3)
    for options, (gamma, beta) in (({}, (1.3, 0.1)), ({"sharpness": 1.0, "surroundings": 0.5}, (1.0, 0.5))):
        found = get_explainer("contributions", model, **options)(images, target=1).scores
        torch.testing.assert_close(found, written_out(model, images, 1, start, gamma, beta), rtol=1e-4, atol=1e-6)


def test_blocks_below_the_start_are_not_asked() -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = {
        share: get_explainer("contributions", model, start=share)(images, target=0).scores for share in (0.5, 1.0)
    }
    torch.testing.assert_close(expected[0.5], written_out(model, images, 0, round(len(model.blocks) / 2), 1.3, 0.1))
    torch.testing.assert_close(expected[1.0], written_out(model, images, 0, len(model.blocks) - 1, 1.3, 0.1))
    with pytest.raises(OptionError, match="start"):
        get_explainer("contributions", model, start=1.5)


def test_a_score_that_no_token_speaks_for_gives_zeros_and_says_so() -> None:
    with pytest.warns(ExplanationWarning, match="constant map"):
        scores = get_explainer("contributions", make_model("cls"))(
            make_images("cls"), target=lambda y: 0 * y[:, 0]
        ).scores
    assert not scores.any()


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_auto_is_contributions_and_what_works_where_they_are_not_defined() -> None:
    assert get_explainer("auto", make_model("cls")).method.info.name == "contributions"
    assert get_explainer("auto", make_model("cls"), start=0.0).method.start == 0
    pyramid = timm.create_model("pvt_v2_b0", num_classes=3).eval()
    explainer = get_explainer("Auto", pyramid)
    assert explainer.method.info.name == "gradcam"
    assert explainer(torch.rand(1, 3, 64, 64), target=0).scores.isfinite().all()
