"""The rules of relevance on numbers small enough for pen and paper, and what each conserves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitexplain import relevance_rules
from vitexplain.attention import AttentionOperands
from vitexplain.double_precision import Scratch
from vitexplain.linear_relevance import epsilon_gradient, gamma_gradient


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_linear_rule_by_hand() -> None:
    # contributions to the one output: 2, -3, 4 from x = (1, 3, -2), w = (2, -1, -2)
    state, weight = torch.tensor([[1.0, 3.0, -2.0]]).double(), torch.tensor([[2.0, -1.0, -2.0]]).double()
    relevance = torch.tensor([[6.0]]).double()
    of_positive = torch.tensor([[2.0, 0.0, 4.0]]).double()
    torch.testing.assert_close(relevance_rules.linear_alpha_beta(state, weight, relevance), of_positive)
    of_both = 2 * of_positive - torch.tensor([[0.0, 6.0, 0.0]]).double()
    torch.testing.assert_close(relevance_rules.linear_alpha_beta(state, weight, relevance, alpha=2.0), of_both)
    # x⁺w⁺ = 2 and x⁻w⁻ = 4 each take all six
    apart = torch.tensor([[6.0, 0.0, 6.0]]).double()
    torch.testing.assert_close(relevance_rules.linear_signs_apart(state, weight, relevance), apart)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_linear_rule_conserves(alpha: float) -> None:
    state, weight, relevance = random(2, 5, 50), random(11, 50, seed=1), random(2, 5, 11, seed=2)
    shared = relevance_rules.linear_alpha_beta(state, weight, relevance, alpha)
    torch.testing.assert_close(shared.sum(-1), relevance.sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_rule_is_that_of_each_contribution(alpha: float, known: bool, dtype: torch.dtype) -> None:
    state, weight, relevance = random(2, 5, 7), random(11, 7, seed=1), random(2, 5, 11, seed=2)
    state, weight = state.to(dtype).double(), weight.to(dtype).double()
    parts = state[..., None, :] * weight
    signs = parts.clamp(min=0), parts.clamp(max=0)
    shares = [(each / each.sum(-1, keepdim=True)).nan_to_num(0) for each in signs]  # 0 / 0: nothing of nothing
    expected = ((alpha * shares[0] - (alpha - 1) * shares[1]) * relevance[..., None]).sum(-2)
    output = parts.sum(-1).to(dtype) if known else None
    found = relevance_rules.linear_alpha_beta(
        state.to(dtype), weight.to(dtype), relevance, alpha, output=output, scratch=Scratch()
    )
    assert found.dtype == torch.float64
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4  # the stabiliser; a hundredth of seven digits
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_positive_contributions_that_a_float_loses_beside_the_negative_get_all() -> None:
    state, weight = torch.tensor([[1.0, 1e-9]]), torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    relevance = torch.tensor([[3.0, 0.0]]).double()
    shared = relevance_rules.linear_alpha_beta(state, weight, relevance)
    expected = torch.tensor([[0.0, 1.5]]).double()  # half goes to the stabiliser, which is as large
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=0)


def test_relevance_of_any_magnitude_goes_through_single_precision() -> None:
    state, weight = random(4, 7).float(), random(11, 7, seed=1).float()
    relevance = random(4, 11, seed=2)
    shared = relevance_rules.linear_alpha_beta(state, weight, relevance)
    magnitudes = torch.tensor([[1e150], [0.0], [1e-150], [1.0]], dtype=torch.float64)
    found = relevance_rules.linear_alpha_beta(state, weight, relevance * magnitudes)
    assert not found[1].any()
    rows = [0, 2, 3]
    torch.testing.assert_close(found[rows] / magnitudes[rows], shared[rows], rtol=1e-4, atol=1e-5)
    assert not relevance_rules.linear_alpha_beta(state, weight, 0 * relevance).any()


def test_sums_by_hand() -> None:
    left, right = torch.tensor([[1.0, 6.0]]).double(), torch.tensor([[3.0, -3.0]]).double()
    relevance = torch.tensor([[4.0, 1.0]]).double()
    parts = relevance_rules.addition(left, right, relevance)
    torch.testing.assert_close(torch.cat(parts), torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double())
    # sums 3 and 2 of a total of 5: no rescaling where both are positive
    torch.testing.assert_close(relevance_rules.normalised_addition(left, right, relevance), parts)


def test_normalised_sum_gives_no_summand_more_than_there_is() -> None:
    left, right = torch.tensor([[10.0, 1.0]]).double(), torch.tensor([[-9.0, 1.0]]).double()
    relevance = torch.tensor([[1.0, 2.0]]).double()
    plain = relevance_rules.addition(left, right, relevance)
    assert [part.sum().item() for part in plain] == pytest.approx([11, -8])
    first, second = relevance_rules.normalised_addition(left, right, relevance)
    assert [first.sum().item(), second.sum().item()] == pytest.approx([3 * 11 / 19, 3 * 8 / 19])


def test_normalised_sum_goes_over_each_image_alone() -> None:
    left, right, relevance = random(3, 10), random(3, 10, seed=1), random(3, 10, seed=2)
    together = relevance_rules.normalised_addition(left, right, relevance)
    for index in range(3):
        one = slice(index, index + 1)
        alone = relevance_rules.normalised_addition(left[one], right[one], relevance[one])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[one], theirs)
    torch.testing.assert_close(sum(together).sum(1), relevance.sum(1), rtol=1e-6, atol=1e-6)


def test_products_share_evenly() -> None:
    left, right, relevance = random(2, 3, 4), random(2, 4, 5, seed=1), random(2, 3, 5, seed=2)
    parts = relevance_rules.product(torch.matmul, left, right, relevance)
    for part in parts:
        torch.testing.assert_close(part.sum((1, 2)), relevance.sum((1, 2)) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile_bytes", [1, 2**21])
def test_attention_in_tiles_is_two_products(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitexplain.attention.TILE_BYTES", tile_bytes)
    q, k, v, relevance = (random(2, 3, 5, 4, seed=seed) for seed in range(4))
    bias = random(3, 5, 5, seed=4)
    weights = (0.5 * q @ k.mT + bias).softmax(-1)
    of_weights, of_v = relevance_rules.product(torch.matmul, weights, v, relevance)
    of_q, of_k = relevance_rules.product(lambda a, b: a @ b.mT, q, k, of_weights)
    found = relevance_rules.attention(AttentionOperands(q, k, v, 0.5, bias), weights @ v, relevance)
    for ours, expected in zip(found, (of_q, of_k, of_v), strict=True):
        torch.testing.assert_close(ours, expected)


def test_bounded_pixels_share_by_what_they_add_to_the_darkest_and_brightest() -> None:
    pixels, weight, relevance = random(2, 3, 8, 8), random(5, 3, 4, 4, seed=1), random(2, 5, 2, 2, seed=2)

    def apply(state: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(state, weight, stride=4)

    shared = relevance_rules.bounded_convolution(apply, pixels, weight, relevance)
    torch.testing.assert_close(shared.sum((1, 2, 3)), relevance.sum((1, 2, 3)), rtol=1e-6, atol=1e-6)
    # one pixel a patch at the lowest value, and positive weights: it adds nothing, and gets nothing
    pixels[0, 1, 2, 3] = pixels[0].min() - 1
    lowest = relevance_rules.bounded_convolution(apply, pixels, weight.abs(), relevance)
    assert lowest[0, 1, 2, 3] == pytest.approx(0, abs=1e-12)


def test_nothing_is_shared_of_nothing() -> None:
    relevance = torch.tensor([3.0, 4.0])
    assert relevance_rules.share(relevance, torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0.0, 2.0])


@pytest.mark.parametrize("gamma", [0.0, 0.25, 100.0])
def test_linear_rules_in_gradient_form_conserve_what_biases_do_not_take(gamma: float) -> None:
    state, weight, gradient = random(2, 5, 7), random(11, 7, seed=1), random(2, 5, 11, seed=2)
    back = gamma_gradient(F.linear, state, weight, None, gradient, gamma, 0.0)
    incoming = (F.linear(state, weight) * gradient).sum(-1)
    torch.testing.assert_close((state * back).sum(-1), incoming)
    plain = epsilon_gradient(F.linear, state, weight, None, gradient, 0.0)
    torch.testing.assert_close(plain, gradient @ weight)
    if gamma == 0:
        torch.testing.assert_close(back, plain)
    else:
        assert (back - plain).abs().max() > 0.1


def test_epsilon_and_bias_take_their_part() -> None:
    # z = 2·3 - 1 = 5, R = z g = 10; ε = 5 halves what is shared, and the bias takes -1 of 5 of it
    state, weight = torch.tensor([[3.0]]).double(), torch.tensor([[2.0]]).double()
    bias, gradient = torch.tensor([-1.0]).double(), torch.tensor([[2.0]]).double()
    back = epsilon_gradient(F.linear, state, weight, bias, gradient, 5.0)
    assert (state * back).item() == pytest.approx(10 * 6 / 10)
    # γ = 1 counts the positive contribution twice: 12 / (12 - 1) of 10
    boosted = gamma_gradient(F.linear, state, weight, bias, gradient, 1.0, 0.0)
    assert (state * boosted).item() == pytest.approx(10 * 12 / 11)


def test_rules_of_convolutions_are_those_of_the_same_linear_map() -> None:
    pixels, weight, gradient = random(1, 3, 8, 8), random(5, 3, 4, 4, seed=1), random(1, 5, 2, 2, seed=2)
    patches = F.unfold(pixels, 4, stride=4).mT

    def apply(state: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(state, kernel, bias, stride=4)

    bias = random(5, seed=3)
    back = gamma_gradient(apply, pixels, weight, bias, gradient, 0.5, 1e-6)
    flat = gamma_gradient(F.linear, patches, weight.flatten(1), bias, gradient.flatten(2).mT, 0.5, 1e-6)
    torch.testing.assert_close(back, F.fold(flat.mT, (8, 8), 4, stride=4))
