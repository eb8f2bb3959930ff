"""Gates and their distribution: goldens, formulas written out, chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitexplain.diffmask.calibration import calibrated_offset, fresh_gates, set_offsets
from vitexplain.diffmask.constraint import divergence
from vitexplain.diffmask.gates import Gates, GateShape, log_kept, sampled_mask
from vitexplain.diffmask.hard_concrete import log_survival, stretched

SHAPE = GateShape(width=6, depths=4, hidden=3, stretch=15.0)


def make_gates(shape: GateShape = SHAPE, seed: int = 0) -> Gates:
    torch.manual_seed(seed)
    gates = Gates(shape)
    for index, gate in enumerate(gates.gates):
        torch.nn.init.constant_(gate.offset, 1.0 + index)
        torch.nn.init.normal_(gate.outer.parametrizations.weight.original0, 1.0)
    return gates


def make_states(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) * 2 for _ in range(count)]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("class_width", [0, 2])
def test_gates_equal_their_formula_patch_by_patch(normalise: bool, class_width: int) -> None:
    shape = GateShape(6, 4, 3, 15.0, normalise, class_width)
    gates, states = make_gates(shape).double(), make_states()
    classes = torch.tensor([[0.3, -1.0], [0.5, 0.2]], dtype=torch.float64)[:, :class_width]
    logits = gates(states, classes if class_width else None)
    assert logits.shape == (2, 4, 5)
    for image in range(2):
        for depth, gate in enumerate(gates.gates):
            for patch in range(5):
                halves = []
                for state in (states[0], states[depth]):
                    x = state[image, patch]
                    if normalise:
                        x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
                    halves.append(x)
                vector = torch.cat([*halves, classes[image]])
                for layer in (gate.inner, gate.outer):
                    gain, direction = (getattr(layer.parametrizations.weight, f"original{i}") for i in (0, 1))
                    rows = [g * row / row.norm() for g, row in zip(gain[:, 0], direction, strict=True)]
                    vector = torch.stack(
                        [torch.tanh(row @ vector + c) for row, c in zip(rows, layer.bias, strict=True)]
                    )
                expected = 15.0 * vector[0] + gate.offset
                torch.testing.assert_close(logits[image, depth, patch], expected, rtol=1e-9, atol=1e-9)


def test_fewer_states_use_the_first_gates() -> None:
    gates, states = make_gates().double(), make_states()
    torch.testing.assert_close(gates(states[:2]), gates(states)[:, :2], rtol=1e-12, atol=1e-12)


def test_survival_is_what_sampling_gives() -> None:
    logits = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.7, 2.0])
    uniform = torch.rand(40_000, len(logits), generator=torch.Generator().manual_seed(0))
    found = (stretched(logits.expand_as(uniform), uniform) > 0).double().mean(0)
    torch.testing.assert_close(log_survival(logits.double()).exp(), found, rtol=0, atol=1e-2)


def test_samples_lie_below_one_and_follow_the_formula() -> None:
    logits, uniform = torch.tensor([-2.0, 0.0, 0.1, 9.0]), torch.tensor([0.9, 0.5, 0.0, 0.4])
    concrete = [1 / (1 + math.exp(-(math.log(u / (1 - u)) + x) / 0.2)) if u else 0.0 for x, u in zip(logits, uniform)]  # noqa: B905
    expected = torch.tensor([min(1.0, max(0.0, -0.2 + 1.2 * each)) for each in concrete])
    torch.testing.assert_close(stretched(logits, uniform), expected, rtol=1e-4, atol=1e-6)


def test_log_probabilities_do_not_saturate() -> None:
    extreme = torch.tensor([-90.0, -60.0, 15.0, 22.0])
    found = log_survival(extreme)
    assert found.isfinite().all()
    assert (found.diff() > 0).all()
    # z is clipped to nothing, with no way back: the gradient of the sample is exactly zero, and no NaN
    extreme.requires_grad_(True)
    stretched(extreme, torch.tensor([0.5, 0.0, 0.5, 0.5])).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_a_patch_is_kept_if_all_gates_keep_it() -> None:
    logits = torch.tensor([[[30.0, 30.0, -30.0], [30.0, -30.0, 30.0]]])
    assert sampled_mask(logits).tolist() == [[1.0, 0.0, 0.0]]
    expected = torch.stack([log_survival(logits[:, 0]), log_survival(logits[:, 0]) + log_survival(logits[:, 1])], 1)
    torch.testing.assert_close(log_kept(logits), expected)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.7])
def test_calibration_masks_what_was_asked_for(share: float) -> None:
    states = make_states()
    gates = fresh_gates(SHAPE, states[0].float(), seed=3)
    torch.testing.assert_close(gates.replacement.detach(), states[0].float().mean((0, 1)))
    set_offsets(gates, calibrated_offset(gates, states, None, share))
    masked = 1 - log_kept(gates(states))[:, -1].exp().mean()
    assert masked.item() == pytest.approx(share, abs=1e-4)
    assert len({gate.offset.item() for gate in gates.gates}) == 1


def test_fresh_gates_leave_the_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (fresh_gates(SHAPE, make_states()[0].float(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    weight = first.gates[0].inner.weight
    assert torch.equal(weight, second.gates[0].inner.weight)
    assert not torch.equal(weight, other.gates[0].inner.weight)


class TestDivergence:
    whole = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    masked = torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.5, 0.5]])
    classes = torch.tensor([0, 2])

    def test_distribution(self) -> None:
        p, q = self.whole.softmax(1), self.masked.softmax(1)
        expected = (p * (p / q).log()).sum(1)
        torch.testing.assert_close(divergence("distribution", self.whole, self.masked), expected)

    def test_class(self) -> None:
        p, q = (each.softmax(1)[[0, 1], self.classes] for each in (self.whole, self.masked))
        expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        torch.testing.assert_close(divergence("class", self.whole, self.masked, self.classes), expected)

    def test_evidence_counts_losses_alone(self) -> None:
        found = divergence("evidence", self.whole, self.masked, self.classes)
        p, q = (each.softmax(1)[0, 0] for each in (self.whole, self.masked))
        assert found[0].item() == pytest.approx((p / q).log().item(), rel=1e-5)
        better = divergence("evidence", self.masked[:1], self.whole[:1], self.classes[:1])
        assert better.item() == 0.0

    @pytest.mark.parametrize("constraint", ["distribution", "class", "evidence"])
    def test_of_certain_answers_stays_finite(self, constraint: Any) -> None:
        certain = torch.tensor([[200.0, 0.0, -200.0]])
        other = certain.flip(1).clone().requires_grad_(True)
        found = divergence(constraint, certain, other, torch.tensor([0]))
        assert found.item() == pytest.approx(400.0)
        found.sum().backward()
        assert other.grad is not None
        assert other.grad.isfinite().all()
        assert divergence(constraint, certain, certain, torch.tensor([0])).item() == 0.0

    @pytest.mark.parametrize("constraint", ["distribution", "class", "evidence"])
    def test_classes_that_the_model_rules_out_take_no_part(self, constraint: Any) -> None:
        gone = torch.tensor([False, True, False])
        masked = self.masked.clone().requires_grad_(True)
        classes = torch.zeros(len(masked), dtype=torch.long)
        found, nearly = (
            divergence(constraint, self.whole.masked_fill(gone, low), masked.masked_fill(gone, low), classes)
            for low in (-torch.inf, -1e4)
        )
        torch.testing.assert_close(found, nearly)
        found.sum().backward()
        assert masked.grad is not None
        assert masked.grad.isfinite().all()


@pytest.fixture(scope="module")
def golden(goldens: Path) -> Any:
    return np.load(goldens / "diffmask_gates.npz")


def golden_gates(golden: Any) -> Gates:
    gates = Gates(GateShape(192, 14, 48, float(golden["alpha"]), normalise_inputs=False))
    state = {"replacement": torch.from_numpy(golden["w/placeholder"]).flatten()}
    for index in range(14):
        state[f"gates.{index}.offset"] = torch.from_numpy(golden[f"w/g_hat.{index}.add_activation"])
        for ours, theirs in (("inner", "f.0"), ("outer", "f.2")):
            for name, key in (
                ("bias", "bias"),
                ("parametrizations.weight.original0", "weight_g"),
                ("parametrizations.weight.original1", "weight_v"),
            ):
                state[f"gates.{index}.{ours}.{name}"] = torch.from_numpy(golden[f"w/g_hat.{index}.{theirs}.{key}"])
    gates.load_state_dict(state)
    return gates


@pytest.mark.parity
def test_gate_logits_of_the_published_code(golden: Any) -> None:
    with torch.no_grad():
        logits = golden_gates(golden)(list(torch.from_numpy(golden["states"])))
    torch.testing.assert_close(logits.movedim(1, -1), torch.from_numpy(golden["gate_logits"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "voting", "sampled"),
    [
        ("all", slice(14), slice(14)),
        ("depth5", slice(6), slice(6)),
        ("nonaggregated", slice(13, 14), slice(14)),  # samples all gates whatever was asked for
    ],
)
def test_masks_of_the_published_code(golden: Any, name: str, voting: slice, sampled: slice) -> None:
    logits = torch.from_numpy(golden["gate_logits"]).movedim(-1, 1)
    uniform = torch.from_numpy(golden["U"]).movedim(-1, 1)
    states, learnt = torch.from_numpy(golden["states"][0]), torch.from_numpy(golden["w/placeholder"])[0, 0]
    expected = torch.from_numpy(golden[f"{name}/log_expected_L0"])
    found = log_survival(logits[:, voting]).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # their sampler clips probabilities to float32's resolution, and so logits to ±15.94
    z = stretched(logits.clamp(-15.942385, 15.942385), uniform)[:, sampled].prod(1)
    torch.testing.assert_close(z, torch.from_numpy(golden[f"{name}/gates"]), rtol=1e-5, atol=1e-5)
    mixed = z[..., None] * states + (1 - z[..., None]) * learnt
    torch.testing.assert_close(mixed, torch.from_numpy(golden[f"{name}/masked_states0"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_map_of_the_published_code(golden: Any) -> None:
    with torch.no_grad():
        kept = log_kept(golden_gates(golden)(list(torch.from_numpy(golden["states"]))))[:, -1, 1:]
    expected = torch.from_numpy(golden["all/mask_prob_5x5"])[:, 0]
    torch.testing.assert_close(kept.exp().reshape(-1, 5, 5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_hard_concrete_of_the_published_code(golden: Any) -> None:
    logits, uniform = torch.from_numpy(golden["hc/logits"]), torch.from_numpy(golden["hc/U"])
    torch.testing.assert_close(log_survival(logits), torch.from_numpy(golden["hc/log_p_gt0"]), rtol=1e-5, atol=1e-5)
    exact = torch.from_numpy(golden["hc/sample_f64_formula"])
    torch.testing.assert_close(stretched(logits.double(), uniform.double()), exact, rtol=1e-5, atol=1e-5)
    survival = torch.from_numpy(golden["hc/log_p_gt0_f64_formula"])
    torch.testing.assert_close(log_survival(logits.double()), survival, rtol=1e-9, atol=1e-12)


@pytest.mark.parity
def test_loss_of_the_published_code(golden: Any) -> None:
    whole, masked = torch.from_numpy(golden["loss/logits_orig"]), torch.from_numpy(golden["loss/logits_masked"])
    expected = torch.from_numpy(golden["loss/kl"])
    torch.testing.assert_close(divergence("distribution", whole, masked), expected, rtol=1e-5, atol=1e-5)
