"""Training of the embedded Vision Transformer on the procedural scenes.

The defaults of `ClassifierSettings` are the recipe of the shipped weights. The model learns the class of an object
from scenes that grow from easy to full clutter. While it trains, two small heads also ask every patch token what
object it shows and where (token labelling); this is meant to shorten training, and the heads are thrown away.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from ..data.scenes import CLASS_NAMES, MEAN, SIZE, SPLITS, STD, make_scene, normalise
from ..errors import InputError, VitExplainError
from ..files import save_json, write_whole
from ..models.embedded import build_model
from ..randomness import begin_at
from .lightning_run import check_output, trainer, undisturbed
from .recipe import PATCH, ClassifierSettings
from .scene_batches import NO_OBJECT, Batch, SceneBatches, ScenePool

__all__ = ["ClassifierSettings", "accuracy", "train_classifier"]


def window_tokens(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Runs the model on windows of scenes, each patch with the position it has in the whole scene.

    Args:
        model: the VisionTransformer.
        batch: windows of (w, w) patches.

    Returns:
        Normalised token states (B, 1 + w * w, D), CLS first. For whole scenes, what the model's own forward computes.
    """
    parts: Any = model
    tokens = parts.patch_embed(batch.images)
    side, columns = math.isqrt(tokens.shape[1]), parts.patch_embed.grid_size[1]
    step = torch.arange(side)
    rows, across = batch.corners[:, 1, None] + step, batch.corners[:, 0, None] + step
    cells = (rows[:, :, None] * columns + across[:, None, :]).flatten(1)
    tokens = tokens + parts.pos_embed[0, 1:][cells]
    first = (parts.cls_token + parts.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    states: torch.Tensor = parts.norm(parts.blocks(torch.cat([first, tokens], dim=1)))
    return states


@torch.inference_mode()
def accuracy(model: nn.Module, seeds: range, *, batch_size: int = 100) -> float:
    """Returns the share of one-object scenes whose class the model names.

    Args:
        model: takes images (B, 3, 96, 96), gives logits (B, 12).
        seeds: of the scenes.
        batch_size: scenes in a forward pass.
    """
    if len(seeds) == 0:
        raise InputError("there are no seeds to measure an accuracy on; give a range with at least one.")
    training = model.training
    model.eval()
    correct = 0
    for start in range(0, len(seeds), batch_size):
        scenes = [make_scene(seed) for seed in seeds[start : start + batch_size]]
        found = model(normalise(np.stack([scene.image for scene in scenes]))).argmax(dim=1).tolist()
        correct += sum(label == scene.classes[0] for label, scene in zip(found, scenes, strict=True))
    model.train(training)
    return correct / len(seeds)


def _learning_module(model: nn.Module, settings: ClassifierSettings, *, refining: bool, progress: bool) -> Any:
    """The Lightning module of the recipe; made in a function because Lightning is optional."""
    import lightning

    steps = settings.refining_steps if refining else settings.steps - settings.refining_steps
    name = "refining" if refining else "learning"
    highest_rate = settings.refining_rate if refining else settings.learning_rate

    class ClassifierModule(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = model
            width = int(settings.architecture["embed_dim"])
            self.patch_label = nn.Linear(width, NO_OBJECT + 1)
            self.patch_mask = nn.Linear(width, PATCH**2)
            self.losses: list[float] = []
            self.history: list[dict[str, Any]] = []
            self.started = time.monotonic()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(images)
            return logits

        def configure_optimizers(self) -> Any:
            blocks: Any = self.model.blocks
            matrices = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
            chosen = {id(parameter) for parameter in matrices}
            others = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
            rate, decay = highest_rate, settings.weight_decay
            optimizers: list[torch.optim.Optimizer] = [
                # With AdamW alone, short runs hardly left the loss of a guess; with Muon on the matrices they did.
                torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(
                    [
                        {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": decay},
                        {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
                    ],
                    lr=rate,
                    betas=(0.9, 0.98),
                ),
            ]
            return optimizers

        def training_step(self, batch: Batch, batch_index: int) -> None:
            rise = min(1.0, (batch_index + 1) / max(1, settings.warmup_steps))
            fall = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * batch_index / steps))
            states = window_tokens(self.model, batch)
            parts: Any = self.model
            loss = nn.functional.cross_entropy(
                parts.head(states[:, 0]), batch.targets, label_smoothing=settings.label_smoothing
            )
            self.losses.append(float(loss.detach()))
            if settings.guidance:
                labels = self.patch_label(states[:, 1:]).flatten(0, 1)
                hint = nn.functional.cross_entropy(labels, batch.patch_labels.flatten())
                masks = self.patch_mask(states[:, 1:])
                hint = hint + nn.functional.binary_cross_entropy_with_logits(masks, batch.patch_masks)
                loss = loss + settings.guidance * hint
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            norm = nn.utils.clip_grad_norm_(self.parameters(), settings.gradient_clip)
            if not (loss.isfinite() and norm.isfinite()):  # before it reaches the weights, and they the file
                raise VitExplainError(
                    f"training gave no loss and gradient that are numbers at step {batch_index + 1} of its round, but "
                    f"{float(loss)} and {float(norm)}; no weights were written. Lower learning_rate or refining_rate"
                )
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = highest_rate * rise * fall
                optimizer.step()
            done = batch_index + 1
            if done % 500 == 0 or done == steps:
                recent = float(np.mean(self.losses[-100:]))
                self.history.append({"round": name, "step": done, "loss": round(recent, 3)})
                if progress:
                    seeds = SPLITS["validation"][: min(400, settings.validation_scenes)]
                    print(
                        f"{name}: step {done}/{steps}, {time.monotonic() - self.started:.0f} s, loss {recent:.3f}, "
                        f"validation accuracy {accuracy(self.model, seeds):.3f}",
                        flush=True,
                    )

    return ClassifierModule()


@torch.inference_mode(False)  # a caller's, in which nothing can be learnt
def train_classifier(
    output: str | Path, settings: ClassifierSettings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Trains the scenes model and writes a checkpoint that `vitexplain.models.embedded.load_checkpoint` reads.

    Args:
        output: file to write, ending in ``.safetensors``; a record with the ending ``.json`` goes beside it. Both
            appear when training is over, never half-written.
        settings: the recipe; by default that of the shipped weights.
        progress: whether to show a progress bar and a short log.

    Returns:
        What the JSON file holds: ``architecture``, ``classes``, ``mean``, ``std``, ``input_size``, ``training`` (the
        recipe), ``history`` (class loss, mean over up to 100 steps before each 500th), ``accuracy`` (``validation``
        and ``test``, one-object scenes), ``wall_seconds``, ``cpu_seconds`` and ``versions``.

    Raises:
        InputError: `output` is no place for a checkpoint.
        ExportError: its folder is read-only.
        VitExplainError: Lightning is not installed, torch is older than 2.9, or training was interrupted or gave no
            number as its loss.
    """
    settings = settings if settings is not None else ClassifierSettings()
    output = check_output(output)
    if not hasattr(torch.optim, "Muon"):
        raise VitExplainError(f"found torch {torch.__version__}; training needs 2.9 or newer: pip install -U torch")
    wall, processor, threads = time.monotonic(), time.process_time(), torch.get_num_threads()
    try:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        model, history = _fit(settings, progress)
        found = {
            split: accuracy(model, SPLITS[split][:length])
            for split, length in (("validation", settings.validation_scenes), ("test", settings.test_scenes))
        }
    finally:
        torch.set_num_threads(threads)
    recipe = dataclasses.asdict(settings)
    record = {
        "architecture": recipe.pop("architecture"),
        "classes": list(CLASS_NAMES),
        "mean": list(MEAN),
        "std": list(STD),
        "input_size": [3, SIZE, SIZE],
        "training": recipe,
        "history": history,
        "accuracy": found,
        "wall_seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "timm", "numpy", "lightning")},
    }
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(output, lambda file: file.write(save(state)))
    save_json(record, output.with_suffix(".json"))
    return record


def _fit(settings: ClassifierSettings, progress: bool) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Runs both rounds of the recipe; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        begin_at(settings.seed, torch.device("cpu"))
        model = build_model(settings.architecture)
        pool = ScenePool.paint(settings.one_object_scenes, settings.two_object_scenes, settings.occlusion)
        history = _fit_round(model, pool, settings, refining=False, progress=progress)
        if settings.refining_steps:
            begin_at(settings.seed + 1, torch.device("cpu"))
            history += _fit_round(model, pool, settings, refining=True, progress=progress)
    return model.eval(), history


def _fit_round(
    model: nn.Module, pool: ScenePool, settings: ClassifierSettings, *, refining: bool, progress: bool
) -> list[dict[str, Any]]:
    """Trains the model for one round, with fresh optimizers and patch heads; returns the history."""
    module = _learning_module(model.train(), settings, refining=refining, progress=progress)
    place = torch.device("cpu")
    with undisturbed(place):
        fitting = trainer(place, None, progress=progress)
        fitting.fit(module, SceneBatches(pool, settings, refining=refining))
    if fitting.interrupted:
        raise VitExplainError(
            f"training stopped after {len(module.losses)} steps of a round; nothing was written: start anew"
        )
    history: list[dict[str, Any]] = module.history
    return history
