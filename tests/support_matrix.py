"""The support matrix: what the contract tests ran, as a table.

``pytest tests/test_contract.py --support-matrix docs/support.md``
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from families import NOT_DEFINED, all_families

from vitexplain import list_methods

TITLES = {
    "cls": "timm `VisionTransformer`, CLS head (ViT, DeiT, AugReg, FlexiViT, CLIP towers)",
    "registers": "timm `VisionTransformer`, registers and LayerScale (DINOv2)",
    "mean_pooled": "timm `VisionTransformer`, mean pooling, registers, no CLS",
    "mean_pooled_with_cls": "timm `VisionTransformer`, mean pooling beside CLS, q/k norms",
    "distilled": "timm `VisionTransformerDistilled`, two heads (DeiT)",
    "dynamic": "timm `VisionTransformer`, any image size, dropout",
    "attention_pool": "timm `VisionTransformer`, attention pool (SigLIP)",
    "post_norm": "timm `VisionTransformer`, post-norm blocks",
    "parallel": "timm `VisionTransformer`, parallel blocks",
    "differential": "timm `VisionTransformer`, differential attention",
    "several_attentions": "timm `VisionTransformer`, several attentions a block",
    "eva": "timm `Eva`, mean pooling (EVA02)",
    "eva_rope": "timm `Eva`, rotary positions, registers, SwiGLU (DINOv3, EVA02)",
    "eva_rope_mixed": "timm `Eva`, mixed rotary positions (RoPE ViT, PE)",
    "beit": "timm `Beit`, relative position bias",
    "beit_shared_bias": "timm `Beit`, shared position bias, CLS head",
    "relative_positions": "timm `VisionTransformerRelPos`",
    "naflex": "timm `NaFlexVit`",
    "hf_vit": "transformers `ViTForImageClassification` (ViT-MAE classifier)",
    "hf_vit_eager": "transformers `ViTForImageClassification`, eager attention",
    "hf_deit": "transformers `DeiTForImageClassification`",
    "hf_deit_two_heads": "transformers `DeiTForImageClassificationWithTeacher`",
    "hf_beit": "transformers `BeitForImageClassification`",
    "hf_dinov2": "transformers `Dinov2ForImageClassification`",
    "hf_dinov2_registers": "transformers `Dinov2WithRegistersForImageClassification`",
    "hf_dinov3": "transformers `DINOv3ViTModel` with a linear head",
    "hf_clip": "transformers `CLIPForImageClassification`",
    "hf_siglip": "transformers `SiglipForImageClassification`",
    "siglip_pool": "transformers `SiglipVisionModel` with a linear head on its attention pool",
    "siglip2": "transformers `Siglip2ForImageClassification`, any image size (NaFlex)",
    "torchvision": "torchvision `VisionTransformer`",
    "own": "your own model on `nn.MultiheadAttention`",
    "own_batch_second": "your own model, tokens before batch (OpenAI CLIP)",
    "own_attention_pool": "your own model with an attention pool",
}
"""What each family of the tests stands for."""


class SupportMatrix:
    """Pytest plug-in that writes the table when the contract tests are through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed: dict[tuple[str, str], int] = {}
        self.failed: set[tuple[str, str]] = set()

    def pytest_runtest_logreport(self, report: object) -> None:
        """Counts the passed and failed tests of each method and family."""
        keywords = dict(getattr(report, "user_properties", ()))
        if "support" not in keywords:
            return
        pair = tuple(keywords["support"])  # a list, where another process ran the test
        if report.when == "call" and report.passed:  # type: ignore[attr-defined]
            self.passed[pair] = self.passed.get(pair, 0) + 1
        elif report.failed:  # type: ignore[attr-defined]
            self.failed.add(pair)

    def pytest_sessionfinish(self) -> None:
        """Writes the table."""
        self.path.write_text("\n".join(self.lines()) + "\n", encoding="utf-8")

    def lines(self) -> Iterable[str]:
        """The table as Markdown."""
        methods = list_methods()
        yield "# What works on what"
        yield ""
        yield "Written by `pytest tests/test_contract.py --support-matrix docs/support.md`. A number: how many contract"
        yield "tests (batch equals loop, fused equals eager, several targets, model given back, bfloat16, …) the method"
        yield "passed on a tiny model of the family; only what a test ran is marked. A dash: the family's mathematics"
        yield "does not define the method, and asking for it raises `UnsupportedModelError`."
        yield ""
        yield "Plain transformers only. What works on Swin, CaiT (approximately) and other kinds of models (Grad-CAM):"
        yield "[architecture.md](architecture.md), tested in `tests/test_tiers.py`."
        yield ""
        yield "| family | " + " | ".join(methods) + " |"
        yield "|---|" + "---|" * len(methods)
        for family in all_families():
            cells = [self._cell(method, family) for method in methods]
            yield f"| {TITLES[family]} | " + " | ".join(cells) + " |"
        reasons = sorted(
            {f"`{method}` on {TITLES[family]}: {reason}" for (method, family), reason in NOT_DEFINED.items()}
        )
        yield ""
        yield from (f"- {reason}." for reason in reasons)

    def _cell(self, method: str, family: str) -> str:
        pair = (method, family)
        if pair in NOT_DEFINED:
            return "–"
        if pair in self.failed or not self.passed.get(pair):
            return "fails" if pair in self.failed else ""
        return str(self.passed[pair])
