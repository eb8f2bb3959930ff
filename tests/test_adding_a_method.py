"""A new method is one file: this one is written, dropped in, and held to everything that the others are held to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_contract
from families import all_families, make_images, make_model
from typer.testing import CliRunner

import vitexplain
from vitexplain import OptionError, create_method, explain_with, get_explainer, list_methods, method_info, registry
from vitexplain.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

FILE = '''"""Value rollout: attention to tokens, by the length of what they say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitexplain.method import ResidualMethod
from vitexplain.options import option
from vitexplain.needs import Needs
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method


@register_method(
    "value_rollout",
    title="Value rollout",
    paper="no paper; an example, 2026",
    class_specific=True,
    passes="1F + 1B",
    aliases=("rollout_of_values",),
)
@dataclass(frozen=True)
class ValueRollout(ResidualMethod):
    r"""Positive gradient of attention times the length of the values, followed through all blocks.

    .. math:: R \\leftarrow R + \\mathrm{E}_h[(G_l)^+ \\mathrm{diag}(\\lVert v_{l,h}\\rVert^p)]\\,R, \\qquad m = s\\,R

    with R = I at first, G the derivative of the target's score by the attention, v the values, s the seed row.
    Scores (B, N) >= 0.
    """

    power: float = option(1.0, "p, how much the length of a value counts", minimum=0, maximum=2)

    @property
    def needs(self) -> Needs:
        """Attention and its gradient."""
        return replace(super().needs, attention_gradient=True)

    def moved(self, row: Tensor, block: BlockRecord) -> Tensor:
        """`row` · E_h[(G)+ diag(‖v‖^p)]."""
        lengths = block.operands.v.to(row.dtype).norm(dim=3) ** self.power
        return (block.propagate(row, lambda tile: tile.gradient.clamp(min=0)) * lengths).mean(1)
'''

NAME = "value_rollout"
FAMILIES = ("registers", "distilled", "attention_pool", "hf_vit_eager", "own")

ON_ONE_MODEL: list[Callable[..., None]] = [
    test_contract.test_logits_are_those_of_the_model,
    test_contract.test_several_targets_equal_several_runs,
    test_contract.test_claim_class_specific,
    test_contract.test_model_is_given_back_as_it_was,
    test_contract.test_model_is_given_back_after_an_exception,
    test_contract.test_float64_stays_float64,
    test_contract.test_works_inside_inference_mode_and_no_grad,
    test_contract.test_attribute_is_captum_shaped,
]


@pytest.fixture(autouse=True)
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file lies in the folder of methods, as far as Python can tell; afterwards nothing of it is left."""
    import vitexplain.methods

    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(vitexplain.methods, "__path__", [*vitexplain.methods.__path__, str(tmp_path)])
    (tmp_path / f"{NAME}.py").write_text(FILE)
    yield
    sys.modules.pop(f"vitexplain.methods.{NAME}", None)
    vars(vitexplain.methods).pop(NAME, None)


def test_the_file_is_short_and_alone(tmp_path: Path) -> None:
    assert len(FILE.splitlines()) < 60
    assert NAME in list_methods()
    names = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert names == {f"{NAME}.py"}
    root = Path(vitexplain.__file__).parents[1]
    sources = [path for folder in ("vitexplain", "methods") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    assert not [path for path in sources if NAME in path.read_text(encoding="utf-8")]


def test_every_door_knows_it() -> None:
    from vitexplain.cli import app

    assert method_info("Rollout of values").name == NAME
    with pytest.raises(OptionError, match="value_rollout: found power=3, expected a number >= 0 and <= 2"):
        create_method(NAME, power=3)
    listing = CliRunner().invoke(app, ["methods"]).output
    assert "value_rollout" in listing
    assert "power=1.0" in listing


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_keeps_the_contract(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_contract.test_shape_and_finiteness(NAME, kind, make_model(kind), make_images(kind))
    test_contract.test_batch_equals_loop(NAME, kind, make_model(kind))
    test_contract.test_fused_equals_eager(NAME, kind, make_model(kind), make_images(kind))
    test_contract.test_bfloat16_is_near_float32(NAME, kind, make_model(kind), make_images(kind))
    test_contract.test_claim_signed(NAME, kind)
    test_contract.test_claim_passes(NAME, make_model(kind), make_images(kind), monkeypatch)
    for check in ON_ONE_MODEL:
        functools.partial(check, NAME)(model=make_model(kind), images=make_images(kind))


def test_it_shares_a_capture_and_is_measured() -> None:
    from vitexplain.metrics import evaluate

    model, images = make_model("cls"), make_images("cls")
    alone = get_explainer(NAME, model)(images, 2).scores
    both = explain_with([create_method("rollout"), create_method(NAME)], Subject.of(model), images, 2)
    assert both[1].scores.allclose(alone)
    assert both[1].scores.shape == (2, *all_families()["cls"].grid)
    assert NAME in str(evaluate([NAME, "rollout"], images, ["saco"], model=model))


def test_a_claim_that_is_not_true_is_found() -> None:
    """The same file with another claim: the contract is what it is held to, not what it says."""
    info = method_info(NAME)
    registry._methods[NAME] = type(info)(**{**vars(info), "class_specific": False})
    with pytest.raises(AssertionError):
        test_contract.test_claim_class_specific(NAME, make_model("cls"), make_images("cls"))
