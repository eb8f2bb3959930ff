"""Models that take patches: called with images, they answer as with the patches of their own processor."""

from __future__ import annotations

import pytest
import torch
from families import make_images, make_model
from torch import nn

from vitexplain import InputError, UnsupportedModelError, adapt, get_explainer
from vitexplain.capture import Capture
from vitexplain.models.patch_input import PatchInput, takes_patches
from vitexplain.needs import Needs


def bare_model() -> nn.Module:
    return make_model("siglip2").model


def test_logits_equal_those_of_the_models_own_patches() -> None:
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    model, images = bare_model(), make_images("siglip2", batch=3)
    patches = torch.stack([convert_image_to_patches(image, 8) for image in images])
    shapes = torch.tensor([[5, 3]] * 3)
    with torch.no_grad():
        own = model(pixel_values=patches, pixel_attention_mask=torch.ones(3, 15), spatial_shapes=shapes).logits
        torch.testing.assert_close(adapt(model).logits(images), own)


def test_grid_follows_the_image() -> None:
    adapter = adapt(bare_model())
    assert adapter.grid((32, 32)) == (4, 4)
    assert adapter.grid((24, 56)) == (3, 7)
    assert get_explainer("rollout", adapter)(torch.randn(1, 3, 24, 56)).grid == (3, 7)


def test_the_model_of_the_user_is_not_changed() -> None:
    model = bare_model()
    names = set(model.state_dict())
    get_explainer("tokentm", model)(make_images("siglip2"))
    assert set(model.state_dict()) == names
    assert takes_patches(model)
    assert not takes_patches(make_model("hf_vit"))


def test_a_model_may_be_converted_or_moved_after_it_was_adapted() -> None:
    model, images = bare_model().half(), make_images("siglip2").double()
    adapter = adapt(model)
    model.double()
    found = adapter.logits(adapter.check_images(images))
    with torch.no_grad():
        torch.testing.assert_close(found, adapt(model).logits(images), rtol=1e-12, atol=1e-12)
    model.to("meta")
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        adapter.check_images(images)


def test_a_model_that_does_not_say_its_patch_size_is_refused() -> None:
    class Nameless(nn.Module):
        def forward(
            self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor, spatial_shapes: torch.Tensor
        ) -> torch.Tensor:
            return pixel_values

    with pytest.raises(UnsupportedModelError, match="does not say patch_size"):
        PatchInput(Nameless())


def test_attention_equals_the_models_eager_attention() -> None:
    model, images = bare_model(), make_images("siglip2")
    with Capture(model, Needs(attention=True)) as capture:
        capture.forward(images)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = (
            adapt(model)
            .model.model.vision_model(
                pixel_values=adapt(model).model.cut(images).flatten(2).transpose(1, 2),
                pixel_attention_mask=torch.ones(2, 15),
                spatial_shapes=torch.tensor([[5, 3]] * 2),
                output_attentions=True,
            )
            .attentions
        )
    assert len(eager) == len(capture.blocks)
    for block, attention in zip(capture.blocks, eager, strict=True):
        torch.testing.assert_close(block.attention(), attention, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["naflex", "siglip2"])
def test_inputs_by_name_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="'patches', 'patch_valid', expected images"):
        get_explainer("rollout", make_model(name))({"patches": torch.zeros(1, 15, 192), "patch_valid": None})
