"""All methods on the same three scenes, in one picture for docs/choosing-a-method.md.

``python -m vitexplain.benchmarks.gallery --output docs/images/all-methods.jpg``

The embedded model is explained on two scenes with one object, and on one with two, once for each of them. `pm` is
shown on its own model, which learnt masks. Left out are methods that learn and of which no weights ship, and what is
not defined on this model. Takes a few minutes, most of it RISE and attention flow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitexplain import Comparison, compare, list_methods, load_model, method_info
from vitexplain.comparison.picture import enlarged
from vitexplain.comparison.views import draw_view
from vitexplain.data.scenes import CLASS_NAMES, SPLITS, Scene, make_scene
from vitexplain.files import write_whole
from vitexplain.models.loading import EMBEDDED, EMBEDDED_FOR_PM
from vitexplain.models.shipped import shipped_checkpoint
from vitexplain.panels import Cell, panel
from vitexplain.render import Pixels

KINDS: Mapping[str, tuple[str, ...]] = {
    "attention alone": ("raw_attention", "rollout", "attention_flow"),
    "attention and its gradient": (
        "generic_attention",
        "tokentm",
        "contributions",
        "gradient_rollout",
        "attention_gradcam",
        "agcam",
        "attcat",
        "legrad",
        "gmar",
        "beyond_intuition",
        "transition_attention",
    ),
    "features": ("gradcam", "gradcam_plus_plus", "hirescam", "layercam", "eigencam"),
    "relevance": ("attnlrp", "transformer_attribution", "partial_lrp", "full_lrp", "fullgrad_plus"),
    "gradients at pixels": ("saliency", "input_x_gradient", "smoothgrad", "integrated_gradients", "gradient_shap"),
    "images changed": ("occlusion", "feature_ablation", "kernel_shap", "rise", "vit_cx", "tis"),
    "learnt": ("diffmask", "diffmask_class", "pm", "iavit"),
    "no method": ("centre_prior", "random_scores"),
}
"""Methods in the order in which they are drawn; what is registered beyond these comes last."""

_COLUMNS, _SIDE, _GAP, _SCALE = 4, 84, 2, 1
_WHITE = 255
_QUALITY = 85


@dataclass(frozen=True)
class Shown:
    """One explained class of a scene.

    Attributes:
        number: of the scene in the test split.
        objects: how many it has.
        target: which of its objects is explained.
    """

    number: int
    objects: int
    target: int = 0

    @property
    def scene(self) -> Scene:
        """The scene."""
        return make_scene(SPLITS["test"][self.number], num_objects=self.objects)

    @property
    def label(self) -> int:
        """Its class."""
        return self.scene.classes[self.target]


SHOWN = (Shown(7, 1), Shown(4, 1), Shown(9, 2, 0), Shown(9, 2, 1))


def in_order(names: Sequence[str]) -> list[str]:
    """Names by kind, those of no known kind last."""
    known = [name for kind in KINDS.values() for name in kind]
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def shippable(names: Sequence[str]) -> list[str]:
    """Those that need no training, or were trained for the embedded model."""
    model = load_model(EMBEDDED).model
    return [name for name in names if not method_info(name).trainable or shipped_checkpoint(name, model)]


def explain(names: Sequence[str], shown: Sequence[Shown]) -> Mapping[str, Comparison]:
    """Comparisons that have the maps, by the name of the method."""
    pictures = [Image.fromarray(each.scene.image) for each in shown]
    targets = [[each.label] for each in shown]
    found: dict[str, Comparison] = {}
    for model, methods in ((EMBEDDED, [name for name in names if name != "pm"]), (EMBEDDED_FOR_PM, ["pm"])):
        wanted = [name for name in methods if name in names]
        if wanted:
            comparison = compare(load_model(model), pictures, wanted, targets)
            found |= dict.fromkeys(wanted, comparison)
    return found


def draw(names: Sequence[str], shown: Sequence[Shown] = SHOWN) -> Image.Image:
    """The input, then a place a method: its maps of all that is shown, side by side."""
    found = explain(names, shown)
    pictures = [enlarged(each.scene.image, _SIDE * _SCALE) for each in shown]
    cells = [Cell(_beside(pictures), "input: " + ", ".join(CLASS_NAMES[each.label] for each in shown))]
    for name in in_order(names):
        if name not in {label for _, label in found[name].explanations}:
            continue  # not defined on this model; compare has said why
        explanation = found[name][name]
        maps = [
            draw_view("overlay", picture, scores[0], signed=explanation.signed)
            for picture, scores in zip(pictures, explanation.scores, strict=True)
        ]
        info = method_info(name)
        kind = "signed" if explanation.signed else "" if info.class_specific else "the same for every class"
        cells.append(Cell(_beside(maps), ", ".join(filter(None, [name, kind]))))
    rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    width = _SIDE * len(shown) + _GAP * (len(shown) - 1)
    return panel(rows, cell_size=width, scale=_SCALE)


def _beside(pictures: Sequence[Pixels]) -> Pixels:
    gap = np.full((pictures[0].shape[0], _GAP * _SCALE, 3), _WHITE, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)]
    return np.concatenate(parts[1:], axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Explains, draws, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="these alone")
    parser.add_argument("--output", type=Path, required=True, help="JPEG file to write")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    image = draw(shippable([method_info(name).name for name in options.methods or list_methods()]))
    # colours in full resolution: the maps are in them
    style = {"quality": _QUALITY, "subsampling": 0, "optimize": True}
    write_whole(options.output, lambda file: image.save(file, format="JPEG", **style))


if __name__ == "__main__":
    main()
