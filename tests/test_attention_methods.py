"""Attention-based methods: against their references, against maps of the authors' code, and known on paper."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import all_families, make_images, make_model
from golden_maps import check, compare
from on_paper import FEATURES
from references import REFERENCES, Trace
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vitexplain import (
    Capture,
    ExplanationWarning,
    Needs,
    UnsupportedModelError,
    create_method,
    get_explainer,
    method_info,
)
from vitexplain.attention import AttentionOperands, GivenAttention, propagate
from vitexplain.block_scores import score_blocks
from vitexplain.fusion import discard_lowest

pytestmark = pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "agcam": [{}, {"start_layer": 1}],
    "attcat": [{}, {"start_layer": 1}],
    "attention_flow": [{}, {"start_layer": 1, "max_tokens": 100}],
    "attention_gradcam": [{}, {"layer": 0}, {"relu": True}],
    "beyond_intuition": [
        {"points": 3},
        {"points": 4, "start_layer": 1},
        {"points": 3, "variant": "head"},
        {"points": 2, "variant": "head", "start_layer": 2},
    ],
    "centre_prior": [{}, {"sigma": 0.4}],
    "gmar": [{}, {"norm": "l2"}, {"start_layer": 1}],
    "gradient_rollout": [
        {},
        {"discard_ratio": 0.0, "start_layer": 1},
        {"discard_ratio": 0.5, "normalisation": "column"},
    ],
    "legrad": [{}, {"layers": 1, "pooling": "head"}, {"layers": 9}, {"normalised": True}],
    "random_scores": [{}, {"seed": 7}],
    "transition_attention": [{"points": 3}, {"points": 4, "start_layer": 1}],
}


def small_swin() -> nn.Module:
    """Four blocks in two stages: 16×16 tokens of 12 features, then 8×8 of 24."""
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3), num_classes=7
    ).eval()


def test_every_option_is_tried() -> None:
    for name, tried in OPTIONS.items():
        known = {each.name for each in method_info(name).options} - {"gradient"}  # see test_balanced.py
        untried = known - {key for options in tried for key in options}
        assert not untried, f"options of {name} that no reference test varies: {untried}"


@pytest.mark.exact_states
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_method_equals_its_reference(name: str, family: str) -> None:
    # float64 on both sides: what is left is the algorithm
    model, images = make_model(family).double(), make_images(family).double()
    described = all_families()[family]
    count = described.prefix + math.prod(described.grid)
    for options in OPTIONS[name]:
        scores = get_explainer(name, model, **options)(images, 4).scores
        image, map_ = (images[1], scores[1]) if name == "attention_flow" else (images[0], scores[0])
        trace = Trace(copy.deepcopy(model), image, 4, described.pooling(count))
        expected = REFERENCES[name](trace, **options)[described.prefix :].view_as(map_)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            map_.double(), expected, rtol=1e-6, atol=1e-7 * scale, msg=lambda m, options=options: f"{options}: {m}"
        )


@pytest.mark.parametrize("target", [0, 1])
def test_maps_known_on_paper(paper_model: nn.Module, target: int) -> None:
    image = torch.zeros(1, 3, 1, 3)
    image[0, :2, 0] = FEATURES.T
    unnormalised = torch.exp(FEATURES[:, 0] / math.sqrt(2))
    attention = unnormalised / (unnormalised.sum() + 1)  # 1 = exp(0): CLS itself
    gathered = (attention[:, None] * FEATURES).sum(0)
    evidence, positive = FEATURES[:, target], FEATURES[:, target].clamp(min=0)

    # y by features: each patch's value reaches CLS directly, and its key moves attention
    gradient = torch.zeros(3, 2)
    gradient[:, target] += attention
    gradient[:, 0] += attention * (evidence - gathered[target]) / math.sqrt(2)

    outer = math.exp(-((1 / 3) ** 2) / (2 * 0.25**2))
    expected: dict[str, Tensor] = {
        "agcam": positive * (FEATURES[:, 0] / math.sqrt(2)).sigmoid(),
        "attcat": attention * (FEATURES * gradient).sum(1),  # every token attends alike
        "attention_flow": attention / 2,
        "attention_gradcam": evidence.mean() * attention,
        "beyond_intuition": attention * positive / 2,  # no token grows, and G(t x) = t x, whose mean is half of x
        "centre_prior": torch.tensor([outer, 1.0, outer]),
        "gmar": attention / 2,
        "gradient_rollout": attention * positive / (1 + (attention * positive).sum()),
        "legrad": positive / 4,  # a mean over four tokens
        "transition_attention": attention * positive / 2,
    }
    for method, scores in expected.items():
        explanation = get_explainer(method, paper_model)(image, target)
        torch.testing.assert_close(
            explanation.scores[0, 0], scores, rtol=1e-5, atol=1e-6, msg=lambda m, method=method: f"{method}: {m}"
        )


def test_maps_do_not_depend_on_contrasts_of_equals() -> None:
    """A class against itself moves nothing, and no method finds something."""
    model, images = make_model("cls"), make_images("cls")
    for name in ("agcam", "attcat", "attention_gradcam", "gmar", "gradient_rollout"):
        explanation = get_explainer(name, model)(images, (3, 3))
        assert not explanation.scores.any(), name
        assert not explanation.diagnostics["prefix_share"].any(), name


def test_attcat_of_rounding_alone_is_refused() -> None:
    """Behind a CLS head, patches enter the last block through its norm alone, at right angles to their gradient."""
    with pytest.raises(UnsupportedModelError, match="cancel on every patch"):
        get_explainer("attcat", make_model("cls"), start_layer=2)(make_images("cls"))


class TestAttentionFlow:
    def test_a_network_solved_by_hand(self) -> None:
        """Two layers, two tokens: the way from the head to token 1 is as wide as its narrowest places together."""
        from vitexplain.methods.attention_flow import _flows

        lower = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
        upper = torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
        flows = _flows(torch.stack([lower, upper]), torch.tensor([1.0, 0.0], dtype=torch.float64))
        expected = [min(0.6, 0.9) + min(0.4, 0.3), min(0.6, 0.1) + min(0.4, 0.7)]
        torch.testing.assert_close(flows, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)

    def test_many_tokens_are_refused_with_what_they_would_cost(self) -> None:
        with pytest.raises(
            UnsupportedModelError, match=r"found 25 tokens in 3 blocks, expected at most 20.*1,875 edges"
        ):
            get_explainer("attention_flow", make_model("cls"), max_tokens=20)(make_images("cls"))

    def test_attention_that_is_no_distribution_is_refused(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"blocks \[0, 1, 2\] is no distribution"):
            get_explainer("attention_flow", make_model("differential"))(make_images("differential"))


class TestBaselines:
    def test_random_scores_belong_to_the_image(self) -> None:
        model, images = make_model("cls"), make_images("cls", batch=3)
        explainer = get_explainer("random", model)
        together = explainer(images).scores
        torch.testing.assert_close(explainer(images.flip(0)).scores.flip(0), together, rtol=0, atol=0)
        for precision in (torch.float64, torch.bfloat16):
            scores = get_explainer("random", model.to(precision))(images).scores
            torch.testing.assert_close(scores.float(), together, rtol=0, atol=0)
        half = get_explainer("random", model.half())
        assert not torch.equal(half(images).scores, together)
        torch.testing.assert_close(half(images.flip(0)).scores.flip(0), half(images).scores, rtol=0, atol=0)
        other = get_explainer("random", model, seed=1)(images).scores
        pairs = torch.corrcoef(torch.cat([together, other]).flatten(1))
        assert pairs.fill_diagonal_(0).abs().max() < 0.6  # 24 patches
        assert ((together >= 0) & (together < 1)).all()

    def test_random_scores_are_uniform(self) -> None:
        model = make_model("dynamic")
        images = torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
        drawn = get_explainer("random", model)(images).scores.flatten()  # 1600
        assert abs(drawn.mean() - 0.5) < 0.03
        assert abs(drawn.std() - 12**-0.5) < 0.02

    def test_the_centre_is_in_the_centre_of_any_shape(self) -> None:
        model = make_model("dynamic")
        scores = get_explainer("centre prior", model)(torch.randn(2, 3, 24, 40)).scores
        assert scores.shape == (2, 3, 5)
        torch.testing.assert_close(scores[0], scores[0].flip(0).flip(1))
        assert scores[0].argmax() == 7
        assert scores[0, 1, 2] == 1


class TestGate:
    """The integrated gradient of the last attention."""

    def test_costs_no_backward_below_the_last_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        gradient = torch.autograd.grad

        def counted(outputs: Tensor, inputs: Any, *args: Any, **named: Any) -> Any:
            seen.append(len(inputs))
            return gradient(outputs, inputs, *args, **named)

        monkeypatch.setattr(torch.autograd, "grad", counted)
        get_explainer("transition_attention", make_model("cls"), points=4)(make_images("cls"))
        assert seen == [4, 2, 2, 2]  # three blocks, then one; and the output itself

    def test_windows_are_refused(self) -> None:
        for name in ("beyond_intuition", "transition_attention", "gradient_rollout"):
            with pytest.raises(UnsupportedModelError, match=r"windows.*generic_attention"):
                get_explainer(name, small_swin())(torch.randn(1, 3, 32, 32), 1)


class TestBlockScores:
    def test_blocks_of_another_width_than_the_head_are_refused(self) -> None:
        explained = get_explainer("legrad", small_swin())(torch.randn(1, 3, 32, 32), 1)
        assert explained.scores.shape == (1, 8, 8)
        with pytest.raises(UnsupportedModelError, match="12 features a token, expected the 24 that the head takes"):
            get_explainer("legrad", small_swin(), layers=3)(torch.randn(1, 3, 32, 32), 1)

    def test_a_block_goes_back_through_itself_alone(self) -> None:
        """What a score of the first block's output finds does not depend on the blocks above."""
        model, images = make_model("cls"), make_images("cls")
        with torch.no_grad(), Capture(model, Needs()) as capture:
            capture.forward(images)
            before = score_blocks(capture, 3, lambda tokens: tokens[:, 0, 0])
            for parameter in model.blocks[2].parameters():
                parameter.mul_(1.5)
            after = score_blocks(capture, 3, lambda tokens: tokens[:, 0, 0])
        assert [each.index for each in after] == [0, 1, 2]
        for lower in (0, 1):
            torch.testing.assert_close(
                before[lower].attention_gradient(), after[lower].attention_gradient(), rtol=0, atol=0
            )
        assert (before[2].attention_gradient() - after[2].attention_gradient()).abs().max() > 1e-3

    def test_a_model_that_fails_is_given_back_without_hooks(self) -> None:
        model, images = make_model("cls"), make_images("cls")

        def fail(tokens: Tensor) -> Tensor:
            raise LookupError("in the score")

        with torch.no_grad(), Capture(model, Needs()) as capture:
            capture.forward(images)
            with pytest.raises(LookupError, match="in the score"):
                score_blocks(capture, 2, fail)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TestSharedPieces:
    def test_several_rows_at_once_are_each_row_alone(self) -> None:
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 2, 3, 11, 4, generator=generator)
        operands = AttentionOperands(q, k, v, 0.5)
        rows = torch.randn(2, 5, 11, generator=generator)
        rows[:, :, 3] = 0  # a query row that is never computed
        for weigh in (lambda tile: tile.attention, lambda tile: tile.attention.mean(1)):
            together = propagate(rows, operands, weigh, tile_rows=4)
            for index in range(5):
                torch.testing.assert_close(together[..., index, :], propagate(rows[:, index], operands, weigh))
            nothing = propagate(rows * 0, operands, weigh)
            assert nothing.shape == together.shape
            assert not nothing.any()

    def test_scores_are_what_the_softmax_is_taken_of(self) -> None:
        q, k, v = torch.randn(3, 2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
        for bias in (None, torch.randn(7, 7), torch.ones(7, 7, dtype=torch.bool).tril()):
            operands = AttentionOperands(q, k, v, 0.5, bias)
            torch.testing.assert_close(operands.scores().softmax(-1), operands.probabilities())
            torch.testing.assert_close(operands.scores(slice(2, 5)), operands.scores()[:, :, 2:5])
        with pytest.raises(UnsupportedModelError, match=r"sdpa.*generic_attention"):
            GivenAttention(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3)).scores()

    def test_discarding_goes_image_by_image(self) -> None:
        fused = torch.tensor([[[4.0, 1.0], [3.0, 2.0]], [[10.0, 30.0], [20.0, 40.0]]])
        assert discard_lowest(fused, 0.5).tolist() == [[[4.0, 0.0], [3.0, 0.0]], [[0.0, 30.0], [0.0, 40.0]]]
        torch.testing.assert_close(discard_lowest(fused, 0.0), fused)


def test_a_gradient_that_is_zero_in_one_block_leaves_the_others() -> None:
    """GMAR: a block whose heads do not move the target carries relevance down as it is."""
    model, images = make_model("cls").double(), make_images("cls").double()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
    whole = get_explainer("gmar", model)(images, 1).scores
    above = get_explainer("gmar", model, start_layer=1)(images, 1).scores
    torch.testing.assert_close(whole, above / 2)


def test_a_map_all_below_zero_is_constant_behind_the_relu_and_that_is_said(
    paper_model: nn.Module,
) -> None:
    image = torch.zeros(1, 3, 1, 3)
    image[0, 0, 0] = torch.tensor([-1.0, -2.0, -3.0])
    assert (get_explainer("attention_gradcam", paper_model)(image, 0).scores < 0).all()
    with pytest.warns(ExplanationWarning, match="attention_gradcam gave a constant map"):
        assert not get_explainer("attention_gradcam", paper_model, relu=True)(image, 0).scores.any()
    assert create_method("attention_gradcam").signed
    assert not create_method("attention_gradcam", relu=True).signed


@pytest.mark.parity
class TestParity:
    """The authors' code on real weights; every map of each file."""

    @pytest.mark.parametrize("discard", ["0", "0.9"])
    def test_gradient_rollout(
        self,
        goldens: Path,
        real_models: Any,
        real_inputs: Any,
        discard: str,
    ) -> None:
        def choose(label: str, variant: str, image: str) -> Any:
            options = {"discard_ratio": float(discard), "normalisation": "column"}
            return ("gradient_rollout", options, int(label)) if variant == f"paired_attngrad_d{discard}" else None

        file = goldens / "vit_explain_grad_rollout.npz"
        check(compare(file, real_models, real_inputs, choose, divide=True), 22)

    def test_attention_gradcam(self, goldens: Path, real_models: Any, real_inputs: Any) -> None:
        def choose(label: str, variant: str, image: str) -> Any:
            chosen = variant == "attn_gradcam_preclamp_own"
            return ("attention_gradcam", {}, int(label)) if chosen else None

        check(compare(goldens / "chefer_cvpr21.npz", real_models, real_inputs, choose), 22)

    def test_attention_gradcam_is_clamped_as_released(
        self,
        goldens: Path,
        real_models: Any,
        real_inputs: Any,
    ) -> None:
        """Maps that are almost all below zero keep little: their errors are measured by what there was before."""
        maps = np.load(goldens / "chefer_cvpr21.npz")
        keys = [key for key in maps.files if key.endswith("/attn_gradcam_raw")]
        assert len(keys) == 22
        for key in keys:
            name, image, label, _ = key.split("/")
            images = torch.from_numpy(real_inputs[f"{name}/{image}"])[None]
            ours = (
                get_explainer("attention_gradcam", real_models[name], relu=True)(images, int(label)).scores[0].numpy()
            )
            before = maps[key.replace("_raw", "_preclamp_own")]
            assert np.abs(ours - maps[key]).max() <= 1e-4 * np.abs(before).max(), key

    def test_attcat(self, goldens: Path, real_models: Any, real_inputs: Any) -> None:
        def choose(label: str, variant: str, image: str) -> Any:
            return ("attcat", {}, int(label)) if variant == "" else None

        check(compare(goldens / "attcat.npz", real_models, real_inputs, choose), 22)

    @pytest.mark.parametrize(
        ("variant", "name", "options"),
        [
            ("mean_logit_last2_raw", "vit_tiny", {}),
            ("cls_logit_last2_raw", "deit_tiny", {"pooling": "head"}),
            ("mean_logit_all_raw", "deit_tiny", {"layers": 12}),
            ("cls_logit_all_raw", "vit_tiny", {"layers": 12, "pooling": "head"}),
            ("mean_l2normed_last2_raw", "vit_tiny", {"normalised": True}),
        ],
    )
    def test_legrad(
        self,
        goldens: Path,
        real_models: Any,
        real_inputs: Any,
        variant: str,
        name: str,
        options: dict[str, Any],
    ) -> None:
        def choose(label: str, found: str, image: str) -> Any:
            return ("legrad", options, int(label)) if found == variant else None

        check(compare(goldens / "legrad.npz", {name: real_models[name]}, real_inputs, choose), 11)

    @pytest.mark.parametrize(
        ("file", "variant", "chosen", "options"),
        [
            ("beyond_intuition", "H_start4", "beyond_intuition", {"variant": "head", "start_layer": 3}),
            ("beyond_intuition", "T_start7", "beyond_intuition", {"start_layer": 6}),
            ("beyond_intuition", "T_start6", "beyond_intuition", {"start_layer": 5}),
            ("tam", "start4", "transition_attention", {"start_layer": 4}),
            ("tam", "start0", "transition_attention", {"start_layer": 0}),
        ],
    )
    def test_gated_methods(
        self,
        goldens: Path,
        real_models: Any,
        real_inputs: Any,
        file: str,
        variant: str,
        chosen: str,
        options: dict[str, Any],
    ) -> None:
        def choose(label: str, found: str, image: str) -> Any:
            # both classes of one photograph: 20 forwards and backwards each
            return (chosen, options, int(label)) if found == variant and image == "catdog" else None

        one = {"vit_tiny": real_models["vit_tiny"]}
        check(compare(goldens / f"{file}.npz", one, real_inputs, choose), 2)
