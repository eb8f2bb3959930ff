"""The picture of all methods: every one is in it, once, with the maps that it gives."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain import ExplanationWarning, get_explainer, list_methods, load_model
from vitexplain.benchmarks import gallery
from vitexplain.benchmarks.gallery import KINDS, SHOWN, Shown
from vitexplain.data.scenes import CLASS_NAMES


def test_every_method_has_its_place() -> None:
    known = list(chain.from_iterable(KINDS.values()))
    assert len(known) == len(set(known))
    assert set(known) <= {*list_methods()}
    assert gallery.in_order(["rollout", "new", "gradcam", "raw_attention"]) == [
        "raw_attention",
        "rollout",
        "gradcam",
        "new",
    ]


def test_what_has_no_weights_is_left_out() -> None:
    assert gallery.shippable(["diffmask", "diffmask_class", "iavit", "rise"]) == ["diffmask", "iavit", "rise"]


def test_what_is_shown_is_recognised() -> None:
    model = load_model("scenes")
    for each in SHOWN:
        with torch.no_grad():
            logits = model.model(model.preprocessing([each.scene.image]))[0]
        assert each.label in logits.topk(each.objects).indices.tolist()
    assert sorted(each.objects for each in SHOWN) == [1, 1, 2, 2]


def test_maps_are_those_of_the_methods_on_their_models() -> None:
    shown = [Shown(9, 2, 1), Shown(7, 1)]
    found = gallery.of_scenes(["gradcam", "pm"], shown).found
    for name, model in (("gradcam", "scenes"), ("pm", "scenes-pm")):
        pictures = [Image.fromarray(each.scene.image) for each in shown]
        alone = get_explainer(name, load_model(model))(pictures, [each.label for each in shown])
        torch.testing.assert_close(found[name][name].scores[:, 0], alone.scores, rtol=1e-4, atol=1e-6)


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "all.jpg"
    with pytest.warns(ExplanationWarning, match="full_lrp is left out"):
        gallery.main(["--methods", "pm", "rollout", "full_lrp", "--output", str(path)])
    with Image.open(path) as image:
        whole = np.asarray(image.convert("RGB"))
    assert 1000 < whole.shape[1] < 1200  # three places: full_lrp is not defined
    assert all((whole[30:90, 25 + 352 * column : 355 + 352 * column] < 250).any() for column in range(3))
    assert path.stat().st_size < 200_000


def test_photographs_are_explained_by_what_needs_no_training(tmp_path: Path) -> None:
    scene, file = SHOWN[0].scene, tmp_path / "photograph.png"
    Image.fromarray(scene.image).save(file)
    drawn = gallery.of_photographs(["gradcam", "diffmask", "rollout"], [file], load_model("scenes"))
    assert list(drawn.found) == ["gradcam", "rollout"]
    assert drawn.names == [CLASS_NAMES[SHOWN[0].label]]
    np.testing.assert_array_equal(drawn.pictures[0], scene.image)
    assert gallery.draw(drawn).size[0] > 3 * 336
