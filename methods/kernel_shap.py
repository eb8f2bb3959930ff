"""KernelSHAP: Shapley values of patches by weighted regression."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitexplain.captum_attribution import AblationAttribution
from vitexplain.errors import InputError
from vitexplain.options import option
from vitexplain.patch_pixels import patch_of_pixel
from vitexplain.randomness import seeded
from vitexplain.registry import register_method
from vitexplain.surrogate import LeastSquares
from vitexplain.target_response import ImageResponse


@register_method(
    "kernel_shap",
    title="KernelSHAP",
    paper="Lundberg and Lee, A Unified Approach to Interpreting Model Predictions, NeurIPS 2017, theorem 2",
    class_specific=True,
    passes="1025F",
    signed=True,
)
@dataclass(frozen=True)
class KernelShap(AblationAttribution):
    r"""Shapley values of the patches, fitted to the model's answers about random sets of them, by captum.

    .. math:: y(x_S) \approx \phi_0 + \sum_{j \in S} m_j, \qquad
        p(|S| = s) \propto \frac{P - 1}{s (P - s)}

    with x_S the image whose patches outside S show the baseline. The empty and the full set are among the samples,
    with a weight that makes the fit pass through them, so all scores together are y(x) - y(b). With fewer samples than
    patches the fit is not determined and the smallest solution is taken; for P = 196 the default is a rough estimate.
    One forward pass a sample, besides the capture's. Scores (B, h, w).
    """

    samples: int = option(1024, "sets of patches that the model is asked about", minimum=3)
    seed: int = option(0, "seed of the sets, which are the same for every image", minimum=0, maximum=2**32 - 1)

    def image_scores(self, one: ImageResponse, grid: tuple[int, int], extent: tuple[int, int] | None) -> Tensor:
        """Scores (1, h, w).

        Raises:
            InputError: there is one patch only.
        """
        from captum.attr import KernelShap as CaptumKernelShap

        if grid == (1, 1):
            raise InputError("found a grid of one patch, expected several to choose from; use feature_ablation")
        image = one.image
        kernel_shap = CaptumKernelShap(one)
        kernel_shap.interpretable_model = LeastSquares()
        with seeded(self.seed, image.device):
            coefficients: Tensor = kernel_shap.attribute(
                image,
                baselines=one.baseline(self.baseline),
                feature_mask=patch_of_pixel(image.shape[-2:], grid, extent)[None, None].to(image.device),
                n_samples=self.samples,
                perturbations_per_eval=one.batch.forward_size,
                return_input_shape=False,
            )
        return coefficients.view(1, *grid)
