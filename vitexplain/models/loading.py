"""Models by name: the embedded one, timm's architectures, and weights from files."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, UnknownNameError, UnsupportedModelError
from ..explainer import Subject
from ..preprocessing import Preprocessing
from . import adapt

EMBEDDED = "scenes"
_TIMM_MODULES = ("vision_transformer", "deit")
_OFFLINE = (
    "Offline alternatives: the embedded model (scenes), or weights in a file (checkpoint=FILE.safetensors, "
    "--checkpoint on the command line)"
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with everything needed to explain it.

    Attributes:
        name: what was asked for, e.g. ``"scenes"`` or ``"timm:vit_tiny_patch16_224"``.
        model: the module, in evaluation mode.
        subject: adapter, preprocessing and labels.
        weights: where the weights came from: ``"embedded"``, ``"hub"`` or a path.
    """

    name: str
    model: nn.Module
    subject: Subject
    weights: str

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become the model's input."""
        if self.subject.preprocessing is None:
            raise InputError(f"the preprocessing of {self.name} is not known; load the model with load_model")
        return self.subject.preprocessing

    @property
    def labels(self) -> Sequence[str] | None:
        """Class names, where known."""
        return self.subject.labels

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, JSON-able: name, weights and their SHA-256, preprocessing."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {
            "name": self.name,
            "weights": self.weights,
            "sha256": digest.hexdigest(),
            "preprocessing": self.preprocessing.to_dict(),
        }

    def class_index(self, label: str) -> int:
        """The class that a user names: an index, a full label, or a comma-separated part of one ("zebra").

        Raises:
            UnknownNameError: no class, or several, have this name.
        """
        text = label.strip().lower()
        if text.lstrip("-").isdigit():
            return int(text)
        labels = [each.lower() for each in self.labels or ()]
        for matches in (
            [index for index, each in enumerate(labels) if each == text],
            [index for index, each in enumerate(labels) if text in (part.strip() for part in each.split(","))],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise UnknownNameError(f"class {label!r} is ambiguous: it may be {matches}; give the index")
        if not labels:
            raise UnknownNameError(f"class {label!r} cannot be looked up: no labels are known; give an index or labels")
        parts = {part.strip() for each in labels for part in each.split(",")}
        raise UnknownNameError.listing("class", label, parts if len(parts) <= 40 else _similar(text, parts))


def load_model(
    name: str = EMBEDDED,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """A model by name, ready to be explained.

    Args:
        name: ``"scenes"``, the embedded model; or ``"timm:ARCHITECTURE"``, with weights from the hub, or from
            `checkpoint` with no network.
        checkpoint: `.safetensors`, or a `.pt`/`.pth`/`.bin` state dict (read with ``weights_only=True``).
        labels: class names in order, or a file of them: JSON list, JSON object by index, or one name a line.
        preprocessing: fields of `Preprocessing` to override, e.g. ``{"mean": (0.5, 0.5, 0.5)}``.
        device: where to put the model; the CPU by default.

    Raises:
        UnknownNameError: no such model.
        UnsupportedModelError: the architecture is not supported.
        CheckpointError: weights are missing, unreadable, or do not fit; or the hub cannot be reached.
        InputError: the labels do not fit the model.
    """
    if name == EMBEDDED:
        if checkpoint is not None:
            raise CheckpointError("the embedded model brings its own weights; name its architecture as timm:… instead")
        from .embedded import load_scenes_model

        model, weights = load_scenes_model(), "embedded"
        names: Sequence[str] | None = _scene_labels()
    elif name.startswith("timm:"):
        model, weights = _timm_model(name, checkpoint)
        names = _imagenet_labels(model)
    else:
        raise UnknownNameError(
            f"no model called {name!r}. Known: {EMBEDDED} (embedded), timm:ARCHITECTURE (for instance "
            "timm:vit_tiny_patch16_224; `vitexplain models` lists them)"
        )
    if labels is not None:
        names = _read_labels(labels)
        classes = getattr(model, "num_classes", len(names))
        if len(names) != classes:
            raise InputError(f"found {len(names)} labels, expected {classes}, one a class of {name}")
    model = model.eval().to(device or "cpu")
    prepare = Preprocessing.from_timm(model).replace(**(preprocessing or {}))
    return LoadedModel(name, model, Subject(adapt(model), prepare, names), weights)


def list_architectures(pattern: str = "*") -> Iterator[tuple[str, str]]:
    """Supported timm architectures, found out by building each one without weights.

    Args:
        pattern: shell pattern of architecture names.

    Yields:
        Name as `load_model` takes it, and a note: "" if every method works, else what does not.
    """
    import timm

    for module in _TIMM_MODULES:
        for name in timm.list_models(module=module):
            if not fnmatch.fnmatch(name, pattern):
                continue
            try:
                with torch.device("meta"):
                    adapter = adapt(timm.create_model(name, depth=1))
            except UnsupportedModelError:
                continue
            note = ""
            try:
                adapter.seed(adapter.num_prefix_tokens + 1)
            except UnsupportedModelError as error:
                note = str(error).split(";")[0]
            yield f"timm:{name}", note


def _timm_model(name: str, checkpoint: str | os.PathLike[str] | None) -> tuple[nn.Module, str]:
    import timm

    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        known = {each for module in _TIMM_MODULES for each in timm.list_models(module=module)}
        raise UnknownNameError.listing("timm architecture", architecture, _similar(architecture, known))
    if checkpoint is None:
        try:
            return timm.create_model(architecture, pretrained=True), "hub"
        except Exception as error:  # the hub client raises many kinds, none of them ours
            cause = str(error).strip().splitlines() or [""]
            raise CheckpointError(
                f"the pretrained weights of {name} could not be fetched ({type(error).__name__}: {cause[0][:200]}). "
                f"{_OFFLINE}"
            ) from error
    state = read_state(checkpoint)
    options = {}
    if "head.weight" in state:
        options["num_classes"] = len(state["head.weight"])
    model = timm.create_model(architecture, **options)
    load_strictly(model, state, str(checkpoint))
    return model, str(checkpoint)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from a file; nothing is unpickled but plain tensors.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {str(path)!r}; expected a .safetensors file or a torch state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise kinds of their own on broken files
        raise CheckpointError(
            f"{str(path)!r} cannot be read as weights ({type(error).__name__}: {str(error).splitlines()[0][:150]}); "
            "expected a .safetensors file or a torch state dict"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(each, Tensor) for each in state.values()):
        raise CheckpointError(f"{str(path)!r} holds no state dict; expected tensors by name")
    return state


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights that must fit exactly.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first of them.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    wrong = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    if any(keys for _, keys in wrong):
        found = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])}…)" for kind, keys in wrong if keys)
        raise CheckpointError(f"the weights in {source!r} are not of this architecture: {found}")
    model.load_state_dict(dict(state))


def _read_labels(labels: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    if not isinstance(labels, str | os.PathLike):
        return [str(each) for each in labels]
    try:
        text = Path(labels).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the labels file {str(labels)!r} cannot be read: {error}") from error
    if Path(labels).suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[key] for key in sorted(content, key=int)]
        return [_label(each) for each in content]
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"the labels file {str(labels)!r} is not understood ({error}); expected a JSON list of names, a JSON "
            "object of names by class index, or text with one name a line"
        ) from error


def _label(entry: Any) -> str:
    """A name from what label files hold: a string, a list ending in one, or an object with a name."""
    if isinstance(entry, dict):
        entry = next(entry[key] for key in ("name", "names", "label") if key in entry)
    if isinstance(entry, list):
        entry = ", ".join(entry) if all(isinstance(each, str) for each in entry) else entry[-1]
    return str(entry)


def _scene_labels() -> Sequence[str]:
    from ..data.scenes import CLASS_NAMES

    return CLASS_NAMES


def _imagenet_labels(model: nn.Module) -> Sequence[str] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return None if subset is None else ImageNetInfo(subset).label_descriptions()


def _similar(name: str, known: set[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, sorted(known), n=8, cutoff=0.3)
