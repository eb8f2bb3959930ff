"""`Explanation`: the scores of one method on a batch of images, and the views of them."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, OptionError
from .patch_pixels import Extent, scaled_extent

if TYPE_CHECKING:
    from PIL.Image import Image

    from .images import ImageSource
    from .preprocessing import Preprocessing

_BAR = 208  # logical pixels, a little less than a picture of a panel


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Scores on the patch grid are the data; heatmaps and overlays are views of it.

    Attributes:
        scores: raw relevance of each patch, float32 or wider: (B, h, w) for one target an image, (B, K, h, w)
            for K. Not normalised; higher is more relevant; negative only if `signed`, or where
            a contrast or a function is explained.
        targets: classes explained, (B,) or (B, K) int64; None where the target was a function of the logits.
        logits: the model's output (B, C).
        method: registry name.
        options: the method's options and values.
        grid: patch grid (h, w) of the scores.
        image_size: pixels (H, W) of the model's input.
        signed: scores below zero are evidence against the target.
        approximate: why the map is an approximation of what the method defines, on this model; None where it is exact.
        diagnostics: figures about each map, of shape (B,) or (B, K): ``prefix_share``, the share of absolute
            relevance on prefix tokens (CLS, registers), which no heatmap shows; ``constant``, whether the map is flat.
        preprocessing: how pictures became the model's input, where known.
        labels: class names, where known.
        inputs: what the model saw, (B, channels, H, W), normalised, on its device and in its precision; `pictures`
            and `overlay` show it. None where an explanation was put together without it.
        against: of a contrast, the classes that `targets` are held against, of the same shape; None for other targets.
        extent: pixels (height, width) of the input that the grid takes up from the top left corner on: less than all
            where the model leaves out what is no whole patch, more where it pads that. None: just all, evenly.
    """

    scores: Tensor
    targets: Tensor | None
    logits: Tensor
    method: str
    options: Mapping[str, Any]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    signed: bool = False
    approximate: str | None = None
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    labels: Sequence[str] | None = None
    inputs: Tensor | None = None
    extent: tuple[int, int] | None = None
    against: Tensor | None = None

    def __repr__(self) -> str:
        approximate = f", approximate: {self.approximate}" if self.approximate else ""
        shape = tuple(self.scores.shape)
        return f"Explanation({self.method}, scores {shape}, targets {self._targets_text()}{approximate})"

    def _repr_html_(self) -> str | None:
        """The panel for notebooks; None, so that they fall back on the text, where the pictures are not known."""
        from .showing import image_html

        if self.preprocessing is None or self.inputs is None:
            return None
        return image_html(self.panel(scale=2), repr(self), scale=2)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: SupportsIndex | slice) -> Explanation:
        """The explanation of some images; a whole number, also NumPy's, gives a batch of one."""
        if isinstance(rows, SupportsIndex) and getattr(rows, "ndim", 0) == 0:  # arrays have an index, too
            rows = operator.index(rows)
            if not -len(self) <= rows < len(self):
                raise IndexError(f"found image {rows}, expected {-len(self)} to {len(self) - 1}")
            rows = slice(rows % len(self), rows % len(self) + 1)
        return replace(
            self,
            scores=self.scores[rows],
            targets=None if self.targets is None else self.targets[rows],
            against=None if self.against is None else self.against[rows],
            logits=self.logits[rows],
            diagnostics={name: value[rows] for name, value in self.diagnostics.items()},
            inputs=None if self.inputs is None else self.inputs[rows],
        )

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits at the targets, in [0, 1], of the targets' shape; (B,) of the arg-max without."""
        targets = self.logits.argmax(dim=1) if self.targets is None else self.targets
        return self._probabilities_of(targets)

    def target_names(self) -> list[list[str]]:
        """B lists of K names: the label where known, else the class index; ``"function"`` for a callable."""
        return [["function"] for _ in range(len(self))] if self.targets is None else self._names_of(self.targets)

    def heatmap(
        self,
        size: tuple[int, int] | None = None,
        *,
        mode: Literal["bilinear", "bicubic", "nearest"] = "bilinear",
        scale: Literal["map", "shared"] | tuple[float, float] = "map",
    ) -> Tensor:
        """Scores upsampled to pixels and normalised to [0, 1]; zero is at 0.5 for signed methods.

        Pixels that no patch takes up (see `extent`) look like the nearest patch.

        Args:
            size: pixels (H, W); the model's input size by default.
            mode: ``"bilinear"``, ``"bicubic"``, or ``"nearest"`` for the honest patch grid.
            scale: ``"map"``, each map by its own range; ``"shared"``, one range for all; or ``(low, high)``.

        Returns:
            (B, H, W) or (B, K, H, W), float32.

        Raises:
            OptionError: no such mode or scale, or a size that is none.
        """
        from . import render

        size = size or self.image_size
        if isinstance(size, int):
            raise OptionError(f"found size={size}, expected (height, width), such as ({size}, {size})")
        maps = render.upsample(self.scores.float(), size, mode, self.extent_in(size))
        return render.normalise(maps, signed=self.signed, scale=scale)

    def extent_in(self, size: Sequence[int]) -> Extent | None:
        """`extent` in the pixels of pictures (H, W) that show all of the model's input."""
        return scaled_extent(self.extent, self.image_size, size)

    def pictures(self) -> np.ndarray:
        """The model's input as pictures, uint8 (B, H, W, 3) RGB.

        Raises:
            InputError: the input was a tensor and how it was normalised is not known.
        """
        if self.preprocessing is None or self.inputs is None:
            raise InputError(
                "how the images were normalised is not known, so they cannot be shown: pass pictures=… "
                "(uint8 (B, H, W, 3)), or explain files, PIL images, or a model from load_model"
            )
        return self.preprocessing.picture(self.inputs.float().cpu())

    def overlay(
        self,
        pictures: np.ndarray | Sequence[np.ndarray | Image] | None = None,
        *,
        boxes: Sequence[Tensor | np.ndarray] | None = None,
        box_threshold: float | None = None,
        **style: Any,
    ) -> np.ndarray:
        """Heatmaps over the pictures.

        Args:
            pictures: uint8 (B, H, W, 3) RGB, or a list of B arrays or PIL images of one size, which show what the model
                saw, at any size; by default the model's own input.
            boxes: annotated boxes of each image, B of (n, 4) x0, y0, x1, y1 in pixels of the pictures; drawn in blue.
            box_threshold: draws white boxes around what is hotter than this share of each map's highest heat, as
                `vitexplain.boxes.heatmap_to_boxes` finds them; of signed maps, around what speaks for the target.
            **style: `colormap`, `alpha`, `mode` of `render.overlay`.

        Returns:
            uint8 (B, H, W, 3), or (B, K, H, W, 3) for K targets.

        Raises:
            InputError: pictures or boxes do not fit.
            OptionError: a threshold outside [0, 1), or a style that does not exist.
        """
        from . import render
        from .boxes import ANNOTATED, draw_boxes, heatmap_to_boxes

        pictures = self.pictures() if pictures is None else _together(pictures)
        heatmaps = self.heatmap((pictures.shape[1], pictures.shape[2])).cpu()
        overlays = []
        for maps in (heatmaps[:, None] if heatmaps.ndim == 3 else heatmaps).unbind(1):
            drawn = render.overlay(pictures, maps, signed=self.signed, **style)
            if boxes is not None:
                drawn = draw_boxes(drawn, boxes, color=ANNOTATED)
            if box_threshold is not None:
                drawn = draw_boxes(drawn, heatmap_to_boxes(render.evidence(maps, self.signed), box_threshold))
            overlays.append(drawn)
        return overlays[0] if heatmaps.ndim == 3 else np.stack(overlays, axis=1)

    def overlay_on(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        boxes: Sequence[Tensor | np.ndarray] | None = None,
        box_threshold: float | None = None,
        **style: Any,
    ) -> list[np.ndarray]:
        """Heatmaps over the whole photographs, dimmed where the crop left them out: the model did not see that.

        Args:
            images: the B images that were explained, or one: files, PIL images or whatever else
                `vitexplain.images.load_image` reads. They may differ in size.
            boxes: annotated boxes of each image, B of (n, 4) x0, y0, x1, y1 in pixels of the photographs.
            box_threshold: as for `overlay`.
            **style: as for `overlay`.

        Returns:
            B arrays uint8 (H, W, 3) of the photographs' own sizes, or (K, H, W, 3) for K targets.

        Raises:
            InputError: how photographs became the model's input is not known; or one cannot be read, or is not what
                the model saw; or numbers do not fit.
            OptionError: as for `overlay`.
        """
        from .whole_pictures import overlays_on

        return list(overlays_on(self, images, boxes=boxes, box_threshold=box_threshold, **style))

    def panel(
        self, pictures: np.ndarray | Sequence[np.ndarray | Image] | None = None, *, scale: float = 1, **style: Any
    ) -> Image:
        """One picture of everything: a row an image, the input beside the overlay of each target; what colours mean.

        Args:
            pictures: as for `overlay`.
            scale: pixels for a logical pixel; 2 for high-resolution screens and print.
            **style: of `overlay`.
        """
        from .panels import Cell, colour_bar, panel

        pictures = self.pictures() if pictures is None else _together(pictures)
        overlays = self.overlay(pictures, **style)
        overlays = overlays[:, None] if self.scores.ndim == 3 else overlays
        rows = [
            [Cell(picture), *(Cell(each, caption) for each, caption in zip(image, captions, strict=True))]
            for image, captions, picture in zip(overlays, self._captions(), pictures, strict=True)
        ]
        bar = colour_bar(style.get("colormap"), signed=self.signed, width=_BAR, scale=scale)
        return panel(rows, title=self.method, legends=[None, *[bar] * overlays.shape[1]], scale=scale)

    def show(self) -> None:
        """Shows `panel` in the notebook, or in the system's image viewer."""
        from .showing import show_image

        show_image(self.panel())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the explanation; the suffix says what: ``.png`` the panel, ``.npy`` the raw scores, ``.npz`` all.

        All is scores, logits, diagnostics, targets and of a contrast what they are held against; and `extent` and
        `image_size` where there is an extent.

        Raises:
            InputError: another suffix, or a picture where the pictures are not known.
            ExportError: the file cannot be written.
        """
        from .files import save_arrays, save_scores
        from .render import save_png

        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".png":
            save_png(self.panel(), path)
        elif suffix == ".npy":
            save_scores(self.scores, path)
        elif suffix == ".npz":
            arrays = {"scores": self.scores, "logits": self.logits, **self.diagnostics}
            if self.extent is not None:
                arrays |= {"extent": torch.tensor(self.extent), "image_size": torch.tensor(self.image_size)}
            classes = {"targets": self.targets, "against": self.against}
            save_arrays(arrays | {name: each for name, each in classes.items() if each is not None}, path)
        else:
            raise InputError(f"found suffix {path.suffix!r} in {path}, expected .png, .npy or .npz")
        return path

    @staticmethod
    def concatenate(parts: Sequence[Explanation]) -> Explanation:
        """One explanation of several batches, made by the same method with the same options."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(present) if len(present) == len(tensors) else None

        return replace(
            first,
            scores=torch.cat([part.scores for part in parts]),
            targets=join([part.targets for part in parts]),
            against=join([part.against for part in parts]),
            logits=torch.cat([part.logits for part in parts]),
            diagnostics={name: torch.cat([part.diagnostics[name] for part in parts]) for name in first.diagnostics},
            inputs=join([part.inputs for part in parts]),
        )

    def _captions(self) -> list[list[str]]:
        """B lists of K: what is explained and its probability, of a contrast both; a function of logits has none."""
        if self.targets is None:
            return self.target_names()
        sides = [
            [
                [f"{name.split(',')[0]} {probability:.0%}" for name, probability in zip(*row, strict=True)]
                for row in zip(self._names_of(classes), self._probabilities_of(classes).tolist(), strict=True)
            ]
            for classes in (each.reshape(len(self), -1) for each in (self.targets, self.against) if each is not None)
        ]
        return [[" against ".join(each) for each in zip(*rows, strict=True)] for rows in zip(*sides, strict=True)]

    def _names_of(self, classes: Tensor) -> list[list[str]]:
        rows = classes.reshape(len(self), -1).tolist()
        return [[self.labels[each] if self.labels else f"class {each}" for each in row] for row in rows]

    def _probabilities_of(self, classes: Tensor) -> Tensor:
        chosen = self.logits.float().softmax(dim=1).gather(1, classes.reshape(len(self), -1))
        return chosen.reshape(classes.shape)

    def _targets_text(self) -> str:
        if self.targets is None:
            return "a function"
        return str(self.targets.tolist()) + ("" if self.against is None else f" against {self.against.tolist()}")


def _together(pictures: np.ndarray | Sequence[np.ndarray | Image]) -> np.ndarray:
    """Pictures as one array; an array as it is.

    Raises:
        InputError: they differ in size.
    """
    if not isinstance(pictures, list | tuple):
        return np.asarray(pictures)
    # PIL images have a mode, and may be grey or have alpha
    arrays = [np.asarray(each.convert("RGB") if hasattr(each, "convert") else each) for each in pictures]
    shapes = list(dict.fromkeys(each.shape for each in arrays))
    if len(shapes) != 1:
        raise InputError(
            f"found pictures of {len(shapes)} shapes, such as {shapes[:2]}, expected (H, W, 3), all the same"
        )
    return np.stack(arrays)
