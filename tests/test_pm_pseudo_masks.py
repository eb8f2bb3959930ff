"""Guessed masks: the spectral cut of a model's keys, thresholded maps, and training on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cv2 import connectedComponents
from test_pm_training import PREPROCESSING, TINY, vit
from torch import Tensor

from vitexplain import InputError
from vitexplain.data.example import Example
from vitexplain.data.stripes import PATCH, SIZE, stripes_examples
from vitexplain.training import pseudo_masks
from vitexplain.training.patch_masks import train_patch_masks
from vitexplain.training.pseudo_masks import spectral_masks, thresholded, with_pseudo_masks


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return stripes_examples(range(5))


def test_thresholding_is_by_standard_deviations() -> None:
    scores = torch.tensor([[[0.0, 0.0], [0.0, 4.0]]])  # mean 1, standard deviation √3
    assert thresholded(scores, 1.7).tolist() == [[[False, False], [False, True]]]
    assert not thresholded(scores, 1.8).any()


def test_the_spectral_cut_finds_the_smaller_group_and_its_connected_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of like keys; the few have the larger magnitude in the eigenvector. A far part is left out."""
    region = torch.zeros(SIZE // PATCH, SIZE // PATCH, dtype=torch.bool)
    region[2:5, 3:6] = True
    far = region.clone()
    far[7, 0] = True
    generator = torch.Generator().manual_seed(0)
    groups = torch.where(far.flatten()[:, None], torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))
    keys = groups + 0.05 * torch.randn(64, 3, generator=generator)
    monkeypatch.setattr(pseudo_masks, "_keys", lambda capture: torch.cat([torch.ones(1, 3), keys])[None])
    found = spectral_masks(vit(), torch.randn(1, 3, SIZE, SIZE, generator=generator))[0]
    assert torch.equal(found, region) or torch.equal(found, far & ~region)
    assert not (found & ~far).any()


def test_the_spectral_cut_equals_a_generalised_eigenproblem_on_the_keys() -> None:
    model, images = vit(), torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    kept: list[Tensor] = []
    handle = model.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, output: kept.append(output))
    model(images)
    handle.remove()
    found = spectral_masks(model, images)
    for mask, projected in zip(found, kept[0].detach(), strict=True):
        keys = projected.chunk(3, dim=-1)[1][1:].double().numpy()
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        edges = np.where(keys @ keys.T > 0.2, 1.0, 1e-5)
        degrees = edges.sum(1)
        values, vectors = np.linalg.eig((np.diag(degrees) - edges) / degrees[:, None])
        second = vectors[:, np.argsort(values.real)[1]].real
        side, seed = second > second.mean(), int(np.abs(second).argmax())
        side = (side if side[seed] else ~side).reshape(8, 8)
        parts = connectedComponents(side.astype(np.uint8), connectivity=4)[1]
        assert np.array_equal(mask.numpy(), parts == parts.flatten()[seed])


@pytest.mark.parametrize("source", ["spectral_cut", "rollout", "gradcam"])
def test_examples_with_guessed_masks_can_be_trained_on(tmp_path: Path, examples: list[Example], source: str) -> None:
    model = vit()
    bare = [replace(each, mask=None) for each in examples]
    guessed = with_pseudo_masks(bare, model, PREPROCESSING, source, batch_size=2)
    assert [each.labels for each in guessed] == [each.labels for each in bare]
    for each in guessed:
        assert each.mask is not None
        assert each.mask.shape == (SIZE, SIZE)
        assert set(np.unique(each.mask)) == {0, 1}
        blocks = each.mask.reshape(8, PATCH, 8, PATCH)
        assert (blocks == blocks[:, :1, :, :1]).all()
    record = train_patch_masks(model, bare, guessed, PREPROCESSING, tmp_path / "pm.safetensors", TINY)
    assert record["annotated"] == 5


def test_guessing_needs_labels_and_examples(examples: list[Example]) -> None:
    with pytest.raises(InputError, match="has no label"):
        with_pseudo_masks([replace(examples[0], labels=())], vit(), PREPROCESSING, "rollout")
    with pytest.raises(InputError, match="at least one"):
        with_pseudo_masks([], vit(), PREPROCESSING)
