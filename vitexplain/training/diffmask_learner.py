"""What is learnt, and how well it went: gates, multipliers, their objective; free of any training framework."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..diffmask.calibration import calibrated_offset, fresh_gates, set_offsets
from ..diffmask.constraint import divergence
from ..diffmask.evaluation import Evaluation, evaluate
from ..diffmask.gates import Gates, GateShape, sampled_mask
from ..diffmask.hard_concrete import log_survival
from ..diffmask.masking import MaskedModel, PatchStates, amortised_log_kept, class_features, class_token, hard_mask
from .diffmask_settings import DiffMaskSettings
from .trained_model import check_classes

_AGREEMENT_AT_START = 0.9
_FEWEST_HALVINGS = 3
_LONG_AT_LIMIT = 200
_HARDLY_MORE = 1.05


@dataclass(frozen=True, eq=False)
class Objective:
    """One draw of the objective.

    Attributes:
        loss: to be minimised over gates and replacement, ().
        violation: mean divergence minus the margin, detached, ().
        depth: k, the last gate that took part.
        kept: mean of the soft mask, ().
    """

    loss: Tensor
    violation: Tensor
    depth: int
    kept: Tensor


class DiffMaskLearner(nn.Module):
    """Gates and Lagrange multipliers of one model, and the best gates so far.

    Args:
        masked: the model, frozen.
        images: (B, channels, H, W) by which the gates' offset is chosen.
        settings: the recipe.

    Raises:
        UnsupportedModelError: the model has one output.

    Attributes:
        gates: what is trained.
        num_classes: C, the model's outputs.
        multipliers: λ, one a depth or one for all; changed by `ascend` alone.
        best: evaluation, step and weights of the best gates, and the fewest patches that any kept which met the
            constraint; None before the first evaluation.
        restarts: how often gates were replaced by fresh ones.
        masked_at_start: share that the first gates were asked to mask, after halving.
        steps_at_limit: how many steps in a row, the last ones, left a multiplier at its upper limit and the constraint
            violated.
    """

    def __init__(self, masked: MaskedModel, images: Tensor, settings: DiffMaskSettings) -> None:
        super().__init__()
        self.masked, self.settings, self._images = masked, settings, images
        found = masked.read(images)
        width, self.num_classes = found.states[0].shape[2], found.logits.shape[1]
        check_classes(masked.adapter.model, self.num_classes)
        self._features = class_features(masked.adapter, self.num_classes) if settings.class_specific else None
        self._token = class_token(masked.adapter) if settings.count_class_token else None
        self.shape = GateShape(
            width=width,
            depths=len(found.states),
            hidden=max(1, width // 4),
            stretch=settings.stretch,
            normalise_inputs=settings.normalise_inputs,
            class_width=0 if self._features is None else self._features.shape[1],
        )
        self.masked_at_start = settings.masked_at_start
        self.gates = self._started(settings.seed)
        self._average: AveragedModel | None = None
        if settings.averaging:
            decayed = get_ema_multi_avg_fn(settings.averaging)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(self.gates, multi_avg_fn=decayed)
            self._average.requires_grad_(False)
        count = 1 if settings.shared_multiplier else self.shape.depths
        start = torch.full((), settings.multiplier_start)
        # no gradient of the loss: DistributedDataParallel must not wait for any
        self.multipliers = nn.ParameterList(nn.Parameter(start.clone(), requires_grad=False) for _ in range(count))
        self.best: dict[str, Any] | None = None
        self.restarts = 0
        self.steps_at_limit = 0

    def draw_depth(self, step: int, draw: int = 0) -> int:
        """k of a step, uniform over the depths that take part; the same on every device."""
        shallowest = round(self.settings.shallowest_depth * (self.shape.depths - 1))
        return int(np.random.default_rng((self.settings.seed, step, draw)).integers(shallowest, self.shape.depths))

    def objective(self, found: PatchStates, step: int, *, draw: int = 0, rank: int = 0) -> Objective:
        """mean(λ_k (divergence - m) + mean over patches of log P(kept up to depth k)), with fresh noise.

        Args:
            found: the batch.
            step: number of the step; with `draw`, `rank` and the seed it decides depth and noise.
            draw: which draw of the step.
            rank: which of several devices.
        """
        generator = self._generator(found.logits.device, step, draw, rank)
        depth = self.draw_depth(step, draw)
        classes = self._told(found.logits, generator)
        states = found.states if self._token is None else found.with_class_token(self._token)
        logits = self.gates(states[: depth + 1], self._features_of(classes))
        sparsity = log_survival(logits).sum(1).mean()
        kept = sampled_mask(logits[..., logits.shape[-1] - found.states[0].shape[1] :], generator)
        answer = self.masked.logits(found.images, kept, self.gates.replacement)
        violation = divergence(self.settings.constraint, found.logits, answer, classes).mean() - self.settings.margin
        loss = self.multiplier(depth).detach() * violation + sparsity
        return Objective(loss, violation.detach(), depth, kept.detach().mean())

    def multiplier(self, depth: int) -> nn.Parameter:
        """λ of a depth."""
        multiplier = self.multipliers[0 if self.settings.shared_multiplier else depth]
        assert isinstance(multiplier, nn.Parameter)
        return multiplier

    def multiplier_optimizer(self) -> torch.optim.Adam:
        """What moves the multipliers: upwards where the constraint is violated, if the settings ascend."""
        ascends = self.settings.multiplier_ascends
        return torch.optim.Adam(self.multipliers.parameters(), lr=self.settings.multiplier_rate, maximize=ascends)

    @torch.no_grad()
    def ascend(self, optimizer: torch.optim.Adam, depth: int, violation: Tensor) -> None:
        """One step of one multiplier along its gradient, which is the violation; then clamped."""
        low, high = self.settings.multiplier_limits
        multiplier = self.multiplier(depth)
        optimizer.zero_grad(set_to_none=True)
        multiplier.grad = violation.to(multiplier)
        optimizer.step()
        multiplier.clamp_(low, high)
        self.steps_at_limit = self.steps_at_limit + 1 if multiplier.item() >= high and violation > 0 else 0

    def stepped(self) -> None:
        """Takes the gates, as a step of theirs left them, into their average."""
        if self._average is not None:
            self._average.update_parameters(self.gates)

    def evaluate(self, batches: Sequence[Tensor]) -> Evaluation:
        """Measures the gates, or their average, with hard masks."""
        features = None if self._features is None else self._features.to(self.gates.replacement)
        return evaluate(self.masked, self._result, batches, self.settings.constraint, features)

    def offer(self, evaluation: Evaluation, step: int) -> bool:
        """Keeps the gates if they are the best so far (or the last count); whether they are.

        Gates that meet the constraint are better than gates that do not. Of those, the ones that keep the fewest
        patches are; but gates that keep hardly more and change the answer less are better still: where a few patches
        carry the answer, dropping one of them on some images saves little and ruins those.
        """
        fewest = math.inf if self.best is None else self.best["fewest"]
        fewest = min(fewest, evaluation.kept) if self.meets(evaluation) else fewest
        better = self.best is None or self._rank(evaluation, fewest) < self._rank(self._best_evaluation, fewest)
        if better or not self.settings.keep_best:
            weights = {name: each.detach().cpu().clone() for name, each in self._result.state_dict().items()}
            self.best = {"evaluation": dataclasses.asdict(evaluation), "step": step, "weights": weights}
        assert self.best is not None
        self.best["fewest"] = fewest
        return better

    def meets(self, evaluation: Evaluation) -> bool:
        """Whether the constraint holds."""
        return evaluation.meets(self.settings.margin, self.settings.agreement)

    def collapsed(self, evaluation: Evaluation) -> bool:
        """Whether training has gone where it does not come back from.

        A patch that is never kept gives its gates no gradient, so gates that mask everything stay as they are; a
        multiplier that does not leave its upper limit can do no more.
        """
        masks_all = not self.meets(evaluation) and evaluation.kept < self.settings.collapsed_below
        return masks_all or self.steps_at_limit >= _LONG_AT_LIMIT

    def restart(self) -> None:
        """Fresh gates from another seed, masking half as much; multipliers at their start."""
        self.restarts += 1
        self.masked_at_start /= 2
        self.gates.load_state_dict(self._started(self.settings.seed + self.restarts).state_dict())
        if self._average is not None:
            self._average.n_averaged.zero_()  # begins anew
        with torch.no_grad():
            for multiplier in self.multipliers.parameters():
                multiplier.fill_(self.settings.multiplier_start)
        self.steps_at_limit = 0

    def best_gates(self) -> Any:
        """The best gates, on the CPU."""
        gates = copy.deepcopy(self._result).cpu()
        if self.best is not None:
            gates.load_state_dict(self.best["weights"])
        return gates.eval()

    def _started(self, seed: int) -> Any:
        found, settings = self.masked.read(self._images), self.settings
        embeddings = found.states[0].float()
        for _ in range(_FEWEST_HALVINGS + 1):
            gates = fresh_gates(self.shape, embeddings, seed=seed, replacement=settings.replacement_start)
            if not settings.masked_at_start:
                set_offsets(gates, settings.offset)
                break
            classes = found.logits.argmax(1)
            features = self._features_of(classes)
            set_offsets(gates, calibrated_offset(gates, found.states, features, self.masked_at_start))
            with torch.no_grad():
                mask = hard_mask(amortised_log_kept(gates, found, features))
                answer = self.masked.logits(found.images, mask, gates.replacement)
            if (answer.argmax(1) == classes).float().mean() >= _AGREEMENT_AT_START:
                break
            self.masked_at_start /= 2
        return gates

    @property
    def _result(self) -> Gates:
        """What is evaluated and written."""
        gates = self.gates if self._average is None else self._average.module
        assert isinstance(gates, Gates)
        return gates

    @property
    def _best_evaluation(self) -> Evaluation:
        assert self.best is not None
        return Evaluation(**self.best["evaluation"])

    def _rank(self, evaluation: Evaluation, fewest: float) -> tuple[bool, float, float]:
        if not self.meets(evaluation):
            return True, 0.0, evaluation.divergence
        few = evaluation.kept <= _HARDLY_MORE * fewest
        return False, 0.0 if few else evaluation.kept, evaluation.divergence

    def _told(self, logits: Tensor, generator: torch.Generator) -> Tensor | None:
        if not self.settings.class_specific:
            return None
        likely = logits.topk(min(self.settings.top_classes, logits.shape[1]), dim=1).indices
        drawn = torch.randint(likely.shape[1], (len(likely), 1), generator=generator, device=likely.device)
        return likely.gather(1, drawn)[:, 0]

    def _features_of(self, classes: Tensor | None) -> Tensor | None:
        if self._features is None or classes is None:
            return None
        return self._features.to(classes.device)[classes]

    def _generator(self, device: torch.device, step: int, draw: int, rank: int) -> torch.Generator:
        sequence = np.random.SeedSequence((self.settings.seed, step, draw, rank))
        return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
