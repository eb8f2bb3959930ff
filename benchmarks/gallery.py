r"""All methods on the same pictures, side by side, for docs/choosing-a-method.md.

``python -m vitexplain.benchmarks.gallery --output docs/images/all-methods.jpg``

The embedded model is explained on two scenes with one object, and on one with two, once for each of them. `pm` is
shown on its own model, which learnt masks. With photographs and a model of your own, the predicted classes are
explained::

    python -m vitexplain.benchmarks.gallery --photographs a.jpg b.jpg --model timm:vit_tiny_patch16_224 \
        --checkpoint model.safetensors --output photographs.jpg

Left out are methods that learn and of which no weights ship, and what is not defined on the model. Takes a few minutes,
most of it RISE and attention flow.
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
from vitexplain.models.loading import EMBEDDED, EMBEDDED_FOR_PM, LoadedModel
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

_COLUMNS, _WIDTH, _GAP, _SCALE = 4, 336, 2, 1
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


@dataclass(frozen=True, eq=False)
class Drawn:
    """Maps of several methods on the same pictures.

    Attributes:
        pictures: what was explained, as the models see it.
        names: of the explained class of each.
        found: comparisons that have the maps, by the name of the method.
    """

    pictures: Sequence[Pixels]
    names: Sequence[str]
    found: Mapping[str, Comparison]


def in_order(names: Sequence[str]) -> list[str]:
    """Names by kind, those of no known kind last."""
    known = [name for kind in KINDS.values() for name in kind]
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def shippable(names: Sequence[str]) -> list[str]:
    """Those that need no training, or were trained for the embedded model."""
    model = load_model(EMBEDDED).model
    return [name for name in names if not method_info(name).trainable or shipped_checkpoint(name, model)]


def of_scenes(names: Sequence[str], shown: Sequence[Shown] = SHOWN) -> Drawn:
    """Methods on scenes."""
    images = [each.scene.image for each in shown]
    pictures, targets = [Image.fromarray(image) for image in images], [[each.label] for each in shown]
    found: dict[str, Comparison] = {}
    for model, methods in ((EMBEDDED, [name for name in names if name != "pm"]), (EMBEDDED_FOR_PM, ["pm"])):
        wanted = [name for name in methods if name in names]
        if wanted:
            comparison = compare(load_model(model), pictures, wanted, targets)
            found |= dict.fromkeys(wanted, comparison)
    return Drawn(images, [CLASS_NAMES[each.label] for each in shown], found)


def of_photographs(names: Sequence[str], files: Sequence[Path], model: LoadedModel) -> Drawn:
    """Methods that need no training on photographs, the predicted class explained."""
    wanted = [name for name in names if not method_info(name).trainable]
    comparison = compare(model, list(files), wanted)
    explanation = next(iter(comparison.explanations.values()))
    classes = [names[0].partition(",")[0] for names in explanation.target_names()]
    return Drawn(list(explanation.pictures()), classes, dict.fromkeys(wanted, comparison))


def draw(drawn: Drawn) -> Image.Image:
    """The input, then a place a method: its maps of all that is shown, side by side."""
    side = _WIDTH // len(drawn.pictures)
    pictures = [_resized(picture, side * _SCALE) for picture in drawn.pictures]
    cells = [Cell(_beside(pictures), "input: " + ", ".join(drawn.names))]
    for name in in_order(list(drawn.found)):
        if name not in {label for _, label in drawn.found[name].explanations}:
            continue  # not defined on this model; compare has said why
        explanation = drawn.found[name][name]
        maps = [
            draw_view("overlay", picture, scores[0], signed=explanation.signed)
            for picture, scores in zip(pictures, explanation.scores, strict=True)
        ]
        info = method_info(name)
        kind = "signed" if explanation.signed else "" if info.class_specific else "the same for every class"
        cells.append(Cell(_beside(maps), ", ".join(filter(None, [name, kind]))))
    rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    width = side * len(pictures) + _GAP * (len(pictures) - 1)
    return panel(rows, cell_size=width, scale=_SCALE)


def _resized(picture: Pixels, side: int) -> Pixels:
    if side >= picture.shape[0]:
        return enlarged(picture, side)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def _beside(pictures: Sequence[Pixels]) -> Pixels:
    gap = np.full((pictures[0].shape[0], _GAP * _SCALE, 3), _WHITE, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)]
    return np.concatenate(parts[1:], axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Explains, draws, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="these alone")
    parser.add_argument("--photographs", nargs="+", type=Path, help="these instead of scenes")
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224", help="explained on photographs")
    parser.add_argument("--checkpoint", type=Path, help="its weights")
    parser.add_argument("--output", type=Path, required=True, help="JPEG file to write")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    names = [method_info(name).name for name in options.methods or list_methods()]
    if options.photographs:
        model = load_model(options.model, checkpoint=options.checkpoint)
        image = draw(of_photographs(names, options.photographs, model))
    else:
        image = draw(of_scenes(shippable(names)))
    # colours in full resolution: the maps are in them
    style = {"quality": _QUALITY, "subsampling": 0, "optimize": True}
    write_whole(options.output, lambda file: image.save(file, format="JPEG", **style))


if __name__ == "__main__":
    main()
