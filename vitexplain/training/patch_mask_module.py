"""The training loop of patch masks, on Lightning; imported where Lightning is known to be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModelError, VitExplainError
from ..iavit.trunk import dropped_patches
from ..layout import to_tokens
from ..models.adapter import ModelAdapter
from ..models.token_head import TokenHead
from ..randomness import begin_at
from .diffmask_state import read_training_state, write_training_state
from .patch_mask_batches import PatchMaskBatch
from .patch_mask_losses import mask_loss, patch_cover
from .patch_mask_settings import PatchMaskSettings
from .trained_model import undecayed

_SPREAD = 1_000_003  # a prime, so that steps of neighbouring seeds draw different dropout


class PatchMaskModule(lightning.LightningModule):
    """Cross-entropy of the image's class, plus the mask loss of the patches; AdamW, rates falling with depth.

    Args:
        adapter: the model that is trained.
        head: its own norm and classifier, on single tokens.
        settings: the recipe.
        state: file that an interrupted training can go on from; written after the last step, too.
        identity: what the file is good for: model, settings, data.
        before: the model as it was, in evaluation mode, where the recipe distils it.

    Attributes:
        step: steps done.
        history: an entry every `log_every` steps: mean losses since the one before.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        head: TokenHead,
        settings: PatchMaskSettings,
        state: Path,
        identity: dict[str, Any],
        before: ModelAdapter | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = adapter.model
        self.adapter, self.token_head, self.settings = adapter, head, settings
        self.before = before
        self.state, self.identity = state, identity
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._recent: list[tuple[float, float]] = []
        self._resumed: dict[str, Any] | None = None

    def resume(self) -> None:
        """Goes on from the file, once training starts.

        Raises:
            CheckpointError: the file is broken, or of another model, other settings or other data.
        """
        self._resumed = read_training_state(self.state, self.identity)
        self.step = self._resumed["step"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.adapter, self.token_head, self.settings))

    def on_fit_start(self) -> None:
        if self._resumed is not None:
            optimizer: Any = self.optimizers()
            self.model.load_state_dict(self._resumed["model"])
            optimizer.optimizer.load_state_dict(self._resumed["optimizer"])
            self.history = self._resumed["history"]
            self._recent = self._resumed.get("recent", [])  # older files do not have it
            self._resumed = None
        self.model.train()
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(each.requires_grad for each in parameters):
                module.eval()  # what is frozen keeps the statistics of its batch norms, too

    def training_step(self, batch: PatchMaskBatch, _: int) -> None:
        settings = self.settings
        begin_at(settings.seed * _SPREAD + self.step, self.device)  # dropout is then a function of the step
        tokens, logits = final_tokens_and_logits(self.adapter, batch.images)
        answers = self._answers(batch)
        classification = F.cross_entropy(logits, answers, label_smoothing=settings.label_smoothing)
        masked = self._mask_loss(tokens[-len(batch.masks) :], batch)
        loss = classification + settings.mask_weight * masked
        self._check("loss", loss)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * settings.share_of_rate(self.step)
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        self._check("gradient", nn.utils.clip_grad_norm_(self.parameters(), settings.gradient_clip))
        optimizer.step()
        self.step += 1
        self._recent.append((classification.item(), masked.item()))
        if self.step % settings.log_every == 0 or self.step == settings.steps:
            self._log()
        if self.step % settings.save_every == 0 or self.step == settings.steps:
            self._save(optimizer)

    def _check(self, what: str, value: Tensor) -> None:
        """Stops training before NaN reaches the weights, and with them the file that an earlier training wrote."""
        if not value.isfinite():
            raise VitExplainError(
                f"training gave no {what} that is a number at step {self.step + 1}, but {value.item()}; no weights "
                "were written. Lower learning_rate, head_rate or mask_weight, and start anew without resume"
            )

    def _answers(self, batch: PatchMaskBatch) -> Tensor:
        """What the image's class should be: the labels (B,), or the probabilities (B, C) from before the training."""
        if self.before is None:
            return batch.classes
        with torch.no_grad():
            return self.before.logits(batch.images).float().softmax(1)

    def _mask_loss(self, tokens: Tensor, batch: PatchMaskBatch) -> Tensor:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        layout = self.adapter.layouts(self.adapter.grid(size))[-1]
        if tokens.shape[1] != layout.count:
            raise UnsupportedModelError(dropped_patches(self.model, tokens.shape[1], layout.count))
        scores = self.token_head.token_logits(tokens[:, layout.prefix :]).float()
        cover, counts = patch_cover(batch.masks, layout.grid, self.adapter.extent(size, layout.grid))
        return mask_loss(self.settings.loss, scores, batch.classes[-len(batch.masks) :], cover, counts).mean()

    def _log(self) -> None:
        classification, masked = (sum(each) / len(self._recent) for each in zip(*self._recent, strict=True))
        figures = {"classification_loss": classification, "mask_loss": masked}
        self._recent.clear()
        self.history.append({"step": self.step, **figures})
        self.log_dict(figures, prog_bar=True, logger=False)
        for logger in self.loggers:
            logger.log_metrics(figures, step=self.step)

    def _save(self, optimizer: Any) -> None:
        kept = {
            "model": self.model.state_dict(),
            "optimizer": optimizer.optimizer.state_dict(),
            "history": self.history,
            "recent": self._recent,
            "step": self.step,
        }
        write_training_state(self.state, self.identity, kept)


def final_tokens_and_logits(adapter: ModelAdapter, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final tokens (B, N, D) as they leave the last block, and logits (B, C), both on one graph."""
    kept: list[Tensor] = []
    last = adapter.blocks[-1]

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(to_tokens(output[0] if isinstance(output, tuple) else output, last.arrangement))

    handle = last.block.register_forward_hook(keep)
    try:
        logits = adapter.logits(images)
    finally:
        handle.remove()
    return kept[0], logits


def parameter_groups(adapter: ModelAdapter, head: TokenHead, settings: PatchMaskSettings) -> list[dict[str, Any]]:
    """Parameters by highest learning rate and weight decay; freezes those below the trained blocks.

    The classifier has `head_rate`; what lies between the blocks and it, and the last block, `learning_rate`, each block
    below `layer_decay` times that of the one above it, and everything else once more.
    """
    names = {id(parameter): name for name, parameter in adapter.model.named_parameters()}
    spared = undecayed(adapter.model)
    places: list[tuple[int, list[nn.Module]]] = [(-1, list(head.heads)), (0, list(head.below))]
    places += [(depth, [each.block]) for depth, each in enumerate(reversed(adapter.blocks))]
    places += [(len(adapter.blocks), [adapter.model])]
    frozen_from = settings.trained_blocks or len(adapter.blocks) + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for depth, modules in places:
        for parameter in (each for module in modules for each in module.parameters()):
            name = names.pop(id(parameter), None)
            if name is None:  # it belongs to a place before
                continue
            parameter.requires_grad_(depth < frozen_from)
            rate = settings.head_rate if depth < 0 else settings.learning_rate * settings.layer_decay**depth
            decay = 0.0 if name in spared else settings.weight_decay
            if parameter.requires_grad:
                groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "rate": rate, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
