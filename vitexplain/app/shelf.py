"""The models that the app has at hand: a few, loaded once, whoever asks."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from ..errors import CheckpointError, VitExplainError
from ..models.loading import EMBEDDED, LoadedModel, load_model

SUGGESTIONS = (
    EMBEDDED,
    "timm:vit_tiny_patch16_224",
    "timm:deit_small_patch16_224",
    "timm:vit_base_patch16_224",
    "timm:vit_small_patch14_reg4_dinov2",
    "timm:swin_tiny_patch4_window7_224",
)
"""Model names that the app offers; any other that `load_model` takes may be typed."""


class Shelf:
    """Loaded models by name, the least recently used given up first.

    Args:
        device: where models are put.
        size: how many are kept.
    """

    def __init__(self, device: str = "cpu", size: int = 3) -> None:
        self.device, self.size = device, size
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def model(self, name: str) -> LoadedModel:
        """A model by name.

        Raises:
            VitExplainError: as `load_model`.
        """
        with self._lock:
            if name not in self._models:
                self._models[name] = load_model(name, device=self.device)
                while len(self._models) > self.size:
                    self._models.popitem(last=False)
            self._models.move_to_end(name)
            return self._models[name]

    def with_weights(self, name: str, checkpoint: str | os.PathLike[str]) -> LoadedModel:
        """A model with weights that a visitor uploaded; it is theirs alone, and not kept here.

        Raises:
            VitExplainError: as `load_model`. The message names the file, and no path.
        """
        try:
            return load_model(name, checkpoint=checkpoint, device=self.device)
        except VitExplainError as error:
            folder = f"{Path(checkpoint).parent}{os.sep}"
            raise CheckpointError(str(error).replace(folder, "")) from error
