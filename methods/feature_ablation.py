"""Feature ablation: each patch replaced on its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.captum_attribution import AblationAttribution
from vitexplain.patch_pixels import gather_by_patch, patch_of_pixel
from vitexplain.registry import register_method
from vitexplain.target_response import ImageResponse


@register_method(
    "feature_ablation",
    title="Feature ablation",
    paper="Kokhlikyan et al., Captum, arXiv 2009.07896, 2020; patch by patch",
    class_specific=True,
    passes="(2 + P)F",
    signed=True,
    aliases=("leave_one_out",),
)
@dataclass(frozen=True)
class FeatureAblation(AblationAttribution):
    r"""What the class loses when one patch is replaced, by captum.

    .. math:: m_j = y(x) - y(x_{j \leftarrow b})

    with x_{j ← b} the image whose patch j shows the baseline. One forward pass for each of the P patches, besides the
    capture's and one of the unchanged image. Scores (B, h, w).
    """

    def image_scores(self, one: ImageResponse, grid: tuple[int, int], extent: tuple[int, int] | None) -> Tensor:
        """Scores (1, h, w)."""
        from captum.attr import FeatureAblation as CaptumFeatureAblation

        image = one.image
        pixels = CaptumFeatureAblation(one).attribute(
            image,
            baselines=one.baseline(self.baseline),
            feature_mask=patch_of_pixel(image.shape[-2:], grid, extent)[None, None].to(image.device),
            perturbations_per_eval=one.batch.forward_size,
        )
        return gather_by_patch(pixels[:, 0], grid, extent, mean=True)
