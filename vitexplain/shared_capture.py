"""Methods that share a capture: those whose backward passes go by the same rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from operator import or_

import torch
from torch import Tensor

from .attention import widen
from .batch_parts import even_part, images_that_pay
from .borrowing import autocast_is_on, without_autocast
from .capture import Capture
from .errors import CaptureError
from .method import Method
from .models.adapter import ModelAdapter, first_weight
from .modified_backward import BackwardRules
from .needs import Needs
from .targets import ExplainedScore, ResolvedTarget, Target, is_function, resolve_target, select_target


@dataclass(frozen=True, eq=False)
class Attributed:
    """One batch, and what methods make of it.

    Attributes:
        images: (B, channels, H, W) as the model took them.
        logits: (B, C), detached.
        target: K targets an image.
        maps: of each method, scores (B, K, h, w) and the share (B, K) of absolute relevance that prefix tokens took.
    """

    images: Tensor
    logits: Tensor
    target: ResolvedTarget
    maps: list[tuple[Tensor, Tensor]]

    @staticmethod
    def concatenate(parts: Sequence[Attributed], images: Tensor) -> Attributed:
        """One batch of several, none of whose targets is a function; its images are those of the parts."""
        maps = zip(*(part.maps for part in parts), strict=True)
        return Attributed(
            images,
            torch.cat([part.logits for part in parts]),
            ResolvedTarget.concatenate([part.target for part in parts]),
            [(torch.cat(scores), torch.cat(shares)) for scores, shares in (zip(*each, strict=True) for each in maps)],
        )


def attribute_together(
    methods: Sequence[Method], adapter: ModelAdapter, images: Tensor, target: Target, *, at_once: bool = False
) -> Attributed:
    """Scores of one batch by all methods.

    Of each part of the batch, one forward for each kind of backward rules among the methods, the derivative first, and
    for each target one backward of each, or two where rules take what speaks for and against apart. The graph of one is
    gone before the next is made. Targets are read off the first forward that is in the model's own precision, or as
    good as that.

    Args:
        methods: at least one.
        adapter: of the borrowed model.
        images: (B, channels, H, W).
        target: of the batch, as a user passes it.
        at_once: the batch is one part, but for methods whose rules hold much of each image; else it has as many as pay.

    Raises:
        VitExplainError: in one of its kinds; see `Explainer.__call__`.
    """
    groups = _by_backward(methods)
    parts: list[Attributed] = []
    rules = methods[groups[0][0]].needs.backward
    if rules is not None and rules.widens and _in_half_precision(adapter, images):
        groups = [[], *groups]  # what the model itself says comes first
    for places in groups:
        known: Target | ResolvedTarget = parts[0].target if parts else target
        given = parts[0].images if parts else images
        own = [methods[place] for place in places]
        part = _attribute_in_turn(own, adapter, given, known, at_once) if own else _answered(adapter, images, target)
        parts.append(part)
    maps = dict(zip(chain(*groups), chain(*(part.maps for part in parts)), strict=True))
    return replace(parts[0], maps=[maps[place] for place in range(len(methods))])


def _in_half_precision(adapter: ModelAdapter, images: Tensor) -> bool:
    weight = first_weight(adapter.model)
    half = weight is not None and weight.dtype in (torch.float16, torch.bfloat16)
    return half or autocast_is_on(images.device.type)


def _answered(adapter: ModelAdapter, images: Tensor, target: Target) -> Attributed:
    """What the model itself says of one batch, and the targets by that; no maps."""
    with torch.no_grad(), Capture(adapter, Needs()) as capture:
        capture.forward(images)
    return Attributed(capture.images, capture.logits, resolve_target(target, capture.logits), [])


def _by_backward(methods: Sequence[Method]) -> list[list[int]]:
    """The numbers of the methods that follow the same rules, those that follow none first."""
    groups: dict[BackwardRules | None, list[int]] = {None: []}
    for place, method in enumerate(methods):
        groups.setdefault(method.needs.backward, []).append(place)
    return [places for places in groups.values() if places]


def _attribute_in_turn(
    methods: Sequence[Method],
    adapter: ModelAdapter,
    images: Tensor,
    target: Target | ResolvedTarget,
    at_once: bool,
) -> Attributed:
    """Scores of one batch by methods with the same rules, a part after the other."""
    step = _images_at_a_time(methods[0].needs.backward, adapter, images, at_once)
    # a function of the logits may treat the images of its batch differently, and is shown all of them
    if step >= len(images) or is_function(target):
        return _attribute(methods, adapter, images, target)
    images, parts = adapter.check_images(images.clone() if images.is_inference() else images), []
    for start in range(0, len(images), step):
        rows = slice(start, min(start + step, len(images)))
        theirs = target.of_images(rows) if isinstance(target, ResolvedTarget) else select_target(target, rows)
        parts.append(_attribute(methods, adapter, images[rows], theirs))
    return Attributed.concatenate(parts, images)


def _images_at_a_time(rules: BackwardRules | None, adapter: ModelAdapter, images: Tensor, at_once: bool) -> int:
    """How many images go into one capture: no more than rules take and, on the CPU, than pay."""
    count = len(images)
    if images.ndim != 4 or count < 2:
        return count
    weight = first_weight(adapter.model)
    device = images.device if weight is None else weight.device
    limits = [count, None if rules is None else rules.images_at_a_time(device)]
    if device.type == "cpu" and not at_once and adapter.batch is None:
        limits.append(even_part(count, images_that_pay(images)))
    return min(limit for limit in limits if limit is not None)


def _attribute(
    methods: Sequence[Method], adapter: ModelAdapter, images: Tensor, target: Target | ResolvedTarget
) -> Attributed:
    """Scores of one batch by methods with the same rules, from one capture of all that they need."""
    needs = reduce(
        or_, (replace(each.needs, from_block=adapter.check_block(each.needs.from_block)) for each in methods)
    )
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in methods]
    with Capture(adapter, needs) as capture:
        logits = capture.forward(images)
        resolved = target if isinstance(target, ResolvedTarget) else resolve_target(target, logits)
        for index in range(resolved.count):
            capture.explained = ExplainedScore(resolved, index)
            score = resolved.score(logits, index)
            if needs.gradient:
                capture.backward(score.sum(), retain_graph=index + 1 < resolved.count)
            for method, maps in zip(methods, found, strict=True):
                same = maps and not method.info.class_specific
                maps.append(maps[0] if same else _scores(method, capture))
    stacked = [
        (torch.stack(scores, 1), torch.stack(shares, 1))
        for scores, shares in (zip(*maps, strict=True) for maps in found)
    ]
    return Attributed(capture.images, capture.logits, resolved, stacked)


def _scores(method: Method, capture: Capture) -> tuple[Tensor, Tensor]:
    """Patch scores (B, h, w), and the share (B,) of absolute relevance that the prefix tokens took."""
    # a caller's autocast must not take the attribution to half precision
    with torch.no_grad(), without_autocast(capture.images.device.type):
        return _on_grid(method, method.attribute(capture), capture)


def _on_grid(method: Method, relevance: Tensor, capture: Capture) -> tuple[Tensor, Tensor]:
    if not isinstance(relevance, Tensor):
        raise CaptureError(f"{method.info.name} returned {type(relevance).__name__}, expected scores as a torch.Tensor")
    relevance = widen(relevance.detach() if relevance.is_floating_point() else relevance.float())
    batch = len(capture.images)
    share = relevance.new_zeros(batch)
    for layout in dict.fromkeys(capture.layouts):
        if relevance.shape == (batch, layout.count):
            magnitude = relevance.abs()
            share = magnitude[:, : layout.prefix].sum(1) / magnitude.sum(1).clamp(min=torch.finfo(relevance.dtype).tiny)
            return relevance[:, layout.prefix :].reshape(batch, *layout.grid), share
        if relevance.shape == (batch, *layout.grid):
            return relevance, share
    expected = " or ".join(
        f"({batch}, {layout.count}) tokens or ({batch}, {layout.grid[0]}, {layout.grid[1]}) patches"
        for layout in dict.fromkeys(capture.layouts)
    )
    raise CaptureError(f"{method.info.name} returned scores of shape {tuple(relevance.shape)}, expected {expected}")
