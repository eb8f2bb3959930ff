"""The randomisation check: does a map change when the model forgets what it learned?"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..borrowing import borrowed
from ..errors import OptionError, UnsupportedModelError, is_out_of_memory
from ..method import Method
from ..models import adapt
from ..models.adapter import ModelAdapter
from ..models.unknown import UnknownModelAdapter
from ..randomness import DRAWN
from ..registry import create_method
from ..subject import Subject
from ..targets import Target
from .batches import explain_quietly, one_class
from .correlation import spearman
from .statistics import Estimate, Sample, estimate_figures

if TYPE_CHECKING:
    from ..models.loading import LoadedModel
    from ..subject import Images

Order = Literal["cascading", "independent"]


@dataclass(frozen=True, eq=False)
class RandomisationCheck:
    """How alike maps of the trained model are to maps of the model with random weights.

    Attributes:
        method: the configured method.
        order: ``"cascading"`` or ``"independent"``.
        correlations: by stage, from the head down: (n,) rank correlation in [-1, 1] of the two maps of each image, NaN
            where one of them is constant or not finite.
        scores: (n, h, w) of the trained model, raw.
    """

    method: Method
    order: Order
    correlations: Mapping[str, npt.NDArray[np.float64]]
    scores: Tensor

    def estimates(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        """The mean correlation of each stage with its interval, over the images that have one there.

        Arguments as for `statistics.estimates`.
        """
        sample = Sample.of(self.correlations, lambda means: means)
        return estimate_figures(sample, confidence=confidence, resamples=resamples, seed=seed)

    def to_markdown(self) -> str:
        """A table of `estimates`, one row a stage."""
        lines = [f"| {stage} | {each} | {each.n} |" for stage, each in self.estimates().items()]
        return "\n".join(["| random weights | rank correlation | images |", "|---|---|---|", *lines])

    _repr_markdown_ = to_markdown


def randomisation_check(
    method: Method | str,
    model: nn.Module | ModelAdapter | Subject | LoadedModel | str,
    images: Images,
    targets: Target = None,
    *,
    order: Order = "cascading",
    batch_size: int | None = None,
    seed: int = 0,
) -> RandomisationCheck:
    """Compares maps of the trained model with maps of the model whose weights are made random, stage by stage.

    After Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, section 3: a map that stays the same when the
    weights are lost does not explain the model. Stages go from the head through the blocks to what comes before them;
    of a model that is known by its feature map alone there are three. A random weight is drawn from the normal
    distribution with the mean and the standard deviation of its trained tensor, so that activations keep their size
    whatever the family; tensors of equal numbers, and buffers, stay. It all happens on a copy of the model. The class
    explained is that of the trained model throughout.

    Args:
        method: a configured method, or its name.
        model: a supported model, or its name; an adapter of the user's own must allow to be deep-copied.
        images: normalised input (n, 3, H, W), or pictures where the preprocessing is known.
        targets: None for the predicted class, a class, or n classes; indices or names.
        order: ``"cascading"``: a stage is random together with all above it; ``"independent"``: alone.
        batch_size: images at a time; as many as pay by default.
        seed: number that other weights belong to; those of a stage are the same in both orders.

    Raises:
        OptionError: another order.
        TargetError: a contrast, a function, or several classes an image.
        UnsupportedModelError: the model, or the method on this model, is not supported, or the model cannot be copied.
    """
    return randomisation_checks([method], model, images, targets, order=order, batch_size=batch_size, seed=seed)[0]


def randomisation_checks(
    methods: Sequence[Method | str],
    model: nn.Module | ModelAdapter | Subject | LoadedModel | str,
    images: Images,
    targets: Target = None,
    *,
    order: Order = "cascading",
    stages: Collection[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[RandomisationCheck]:
    """The same for several methods, which share the captures of each stage.

    Args:
        methods: configured methods, or names.
        model: as for `randomisation_check`, like all that is not named here.
        images: normalised input (n, 3, H, W), or pictures where the preprocessing is known.
        targets: None for the predicted class, a class, or n classes; indices or names.
        order: ``"cascading"`` or ``"independent"``.
        stages: those that maps are made at; None for all. Weights become random stage by stage in any case.
        batch_size: images at a time; as many as pay by default.
        seed: number that other weights belong to.

    Returns:
        One check a method, in their order.

    Raises:
        OptionError: another order, or a stage that the model does not have.
        TargetError: a contrast, a function, or several classes an image.
        UnsupportedModelError: the model, or a method on this model, is not supported, or the model cannot be copied.
    """
    if order not in get_args(Order):
        raise OptionError(f"found order={order!r}, expected {' or '.join(map(repr, get_args(Order)))}")
    configured = [create_method(each) if isinstance(each, str) else each for each in methods]
    subject = Subject.of(model)
    inputs = subject.prepare(images)
    copy = Subject(_copied(subject.adapter, (inputs.shape[-2], inputs.shape[-1])))
    there = _stages(copy.adapter, inputs[:1])
    asked = _asked(stages, [stage for stage, _ in there])
    trained = explain_quietly(configured, subject, inputs, one_class(targets, len(inputs)), batch_size)
    correlations: list[dict[str, npt.NDArray[np.float64]]] = [{} for _ in configured]
    generator = torch.Generator().manual_seed(seed)
    for stage, parameters in there:
        before = [parameter.detach().clone() for parameter in parameters]
        _randomise(parameters, generator)
        if stage in asked:
            found = explain_quietly(configured, copy, inputs, trained[0].targets, batch_size)
            for of_method, ours, theirs in zip(correlations, trained, found, strict=True):
                of_method[stage] = _rank_correlation(ours.scores, theirs.scores)
        if order == "independent":
            with torch.no_grad():
                for parameter, weights in zip(parameters, before, strict=True):
                    parameter.copy_(weights)
    return [
        RandomisationCheck(method, order, found, ours.scores)
        for method, found, ours in zip(configured, correlations, trained, strict=True)
    ]


def _asked(stages: Collection[str] | None, there: Sequence[str]) -> Collection[str]:
    missing = [] if stages is None else [stage for stage in stages if stage not in there]
    if missing:
        raise OptionError(f"found the stages {', '.join(missing)}, expected some of {', '.join(there)}")
    return there if stages is None else stages


def _copied(adapter: ModelAdapter, image_size: tuple[int, int]) -> ModelAdapter:
    """The same kind of adapter on a copy of the model.

    Raises:
        UnsupportedModelError: something on the model does not allow to be copied.
    """
    try:
        model = deepcopy(adapter.model)
    except Exception as error:  # whatever is on the model says in its own way that it is one of a kind
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"a {type(adapter.model).__name__} cannot be copied ({type(error).__name__}: {error}), and weights become "
            "random in a copy; expected a model that copy.deepcopy takes. Take off it what stands in the way, such as "
            "locks, open files and torch.nn.utils.weight_norm, and check again"
        ) from error
    if isinstance(adapter, UnknownModelAdapter):
        return type(adapter)(model, image_size)
    fresh = adapt(model)
    return fresh if type(fresh) is type(adapter) else deepcopy(adapter)


def _stages(adapter: ModelAdapter, images: Tensor) -> list[tuple[str, list[nn.Parameter]]]:
    """Parameters by stage, each once, from the head down: behind the blocks, each block, before the blocks.

    Where a parameter outside the blocks belongs is told by when the module that owns it runs; what runs between two
    blocks belongs to the first of them.
    """
    started = _started(adapter, images)
    starts = [started[each.block] for each in adapter.blocks]
    within = {module: index + 1 for index, each in enumerate(adapter.blocks) for module in each.block.modules()}
    places: dict[nn.Parameter, int] = {}

    def visit(module: nn.Module, place: int) -> None:
        if module in within:
            place = within[module]
        elif module in started:
            before = bisect(starts, started[module])
            place = before + (before == len(starts))
        for parameter in module.parameters(recurse=False):
            places[parameter] = max(place, places.get(parameter, 0))  # shared ones are lost with the higher stage
        for child in module.children():
            visit(child, place)

    visit(adapter.model, 0)
    names = ["stem", *(f"block {index}" for index in range(len(starts))), "head"]
    stages = [
        (name, [parameter for parameter, place in places.items() if place == index and parameter.is_floating_point()])
        for index, name in enumerate(names)
    ]
    return [(name, parameters) for name, parameters in reversed(stages) if parameters]


def _started(adapter: ModelAdapter, images: Tensor) -> dict[nn.Module, int]:
    """The modules in the order in which they first run."""
    started: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: object) -> None:
        started.setdefault(module, len(started))

    with ExitStack() as stack, torch.no_grad(), borrowed(adapter.model):
        for module in adapter.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(note).remove)
        adapter.logits(adapter.check_images(images))
    return started


def _randomise(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in parameters:
            trained = parameter.float()
            noise = torch.randn(parameter.shape, generator=generator, **DRAWN).to(trained)
            parameter.copy_(trained.mean() + trained.std(correction=0) * noise)


def _rank_correlation(first: Tensor, second: Tensor) -> npt.NDArray[np.float64]:
    """Of maps (n, h, w), (n,)."""
    first, second = first.flatten(1), second.flatten(1)
    broken = ~(first.isfinite() & second.isfinite()).all(1)
    return spearman(first, second).masked_fill(broken, torch.nan).cpu().numpy()
