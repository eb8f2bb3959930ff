"""Adapter of last resort: the last feature map of a pyramid or ConvNet, for methods that need no attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..borrowing import borrowed, unmarked
from ..errors import InputError, UnsupportedModelError
from ..layout import Arrangement, to_tokens
from .adapter import BlockModules
from .limited import LimitedAdapter
from .token_order import bottom_left_changed

if TYPE_CHECKING:
    from ..needs import Needs


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What one module puts out, as tokens on a grid.

    Attributes:
        module: its output is the map.
        arrangement: the axes of the output.
        grid: (h, w).
    """

    module: nn.Module
    arrangement: Arrangement
    grid: tuple[int, int]


class FeatureAdapter(LimitedAdapter):
    """A model known by its last feature map alone: one block, whose state ``attention_input`` is that map.

    The map is the last tensor that a module puts out whose axes are known to be places and channels, and through which
    all that the score knows of the image has to go. Places of a (B, N, D) tensor are known if the model shows as many,
    or the same, as a grid; no root is drawn of a token count. Maps of class scores and of attention are none, and so
    is what comes out in the first third of the model.

    Args:
        model: called with images (B, C, H, W); returns logits (B, C), or an object that has `logits`.
        image_size: pixels (H, W) to probe with; by default what the model's configuration says, or 224×224.
        reason: why nothing more is known of it.

    Raises:
        UnsupportedModelError: the model cannot be run on such images, or has no such map.
    """

    def __init__(
        self, model: nn.Module, image_size: tuple[int, int] | None = None, *, reason: str = "its blocks are not known"
    ) -> None:
        super().__init__(model, image_size)
        self._reason = reason
        found = self._find(self._probe_size)
        self._module = found.module
        self._grids = {tuple(self._probe_size): found.grid}
        self.blocks = (BlockModules(found.module, found.module, found.module, arrangement=found.arrangement),)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) of the map; for another image size than before, found by running the model on one."""
        size = (int(image_size[0]), int(image_size[1]))
        if size not in self._grids:
            expected = f"found images of {size[0]}×{size[1]} pixels, expected a size that the model takes, such as"
            try:
                found = self._find(size)
            except UnsupportedModelError as error:
                raise InputError(f"{expected} {self._probe_size[0]}×{self._probe_size[1]}") from error
            if found.module is not self._module:
                raise InputError(f"{expected} {self._probe_size[0]}×{self._probe_size[1]}: its last map is another")
            self._grids[size] = found.grid
        return self._grids[size]

    def reads_more(self, needs: Needs) -> bool:
        """Whether attention or other token states than the map are asked for."""
        return needs.any_attention or bool(needs.seen_states - {"attention_input"})

    def refusal(self, working: str) -> str:
        """What works instead, and why no more."""
        return (
            f"a {type(self.model).__name__} is supported by its last feature map only; methods that work on it: "
            f"{working}. Attention cannot be followed because {self._reason}"
        )

    def _find(self, size: tuple[int, int]) -> FeatureMap:
        with torch.inference_mode(False):
            images = self.noise(size).requires_grad_(True)
        ended, logits = self._ended(images)
        for found, state in self._candidates(ended, images):
            if to_tokens(state, found.arrangement).shape[2] != logits.shape[1] and _parts(logits, state, images):
                if state.ndim == 3 and not self._in_order(ended, state, images.detach(), found.grid):
                    raise UnsupportedModelError(
                        f"the tokens of a {type(self.model).__name__} are not its patches row by row, so where they "
                        "are is not known; another order needs a ModelAdapter"
                    )
                return found
        raise UnsupportedModelError(
            f"a {type(self.model).__name__} has no feature map that all its score goes through and whose axes are known"
        )

    def _ended(self, images: Tensor) -> tuple[list[tuple[nn.Module, Tensor]], Tensor]:
        """What each module put out for images, in order, and the logits."""
        outputs: list[tuple[nn.Module, Tensor, int]] = []

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor):
                outputs.append((module, output, output._version))

        with torch.inference_mode(False), torch.set_grad_enabled(images.requires_grad), ExitStack() as stack:
            stack.enter_context(borrowed(self.model))
            stack.enter_context(self.prepared())
            for module in self.model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_hook(keep).remove)
            logits = self.run(images)
        # what was changed in place since is not what the module put out
        return [(module, output) for module, output, version in outputs if output._version == version], logits

    def _in_order(
        self, ended: list[tuple[nn.Module, Tensor]], state: Tensor, images: Tensor, grid: tuple[int, int]
    ) -> bool:
        """Whether another patch at the bottom left moves a token of that quarter most, where tokens first appear.

        Stages before them may have mixed places, so the very token is not asked for.
        """
        (h, w), tokens = grid, state.shape[:2]
        if images.is_meta or min(grid) < 2:
            return True
        again, _ = self._ended(bottom_left_changed(images, grid, None))
        before, after = (
            [each for _, each in some if each.ndim == 3 and each.shape[:2] == tokens] for some in (ended, again)
        )
        for one, other in zip(before, after, strict=False):
            moved = (one - other).abs().amax((0, 2))
            if moved.any():  # an embedding of positions does not
                first = int(moved.argmax())
                return first // w >= h // 2 and first % w < -(-w // 2)
        return True

    def _candidates(self, ended: list[tuple[nn.Module, Tensor]], images: Tensor) -> Iterator[tuple[FeatureMap, Tensor]]:
        """What may be feature maps behind the first third of the forward, last first."""
        modules, size = [module for module, _ in ended], (images.shape[-2], images.shape[-1])
        widths = [each.in_features for each in modules if isinstance(each, nn.Linear)]
        own = self._own_maps(images.detach())
        for index in range(len(ended) - 1, len(ended) // 3 - 1, -1):
            module, state = ended[index]
            if not state.requires_grad or len(state) != 1 or modules.count(module) > 1:
                continue
            if state.ndim == 4 and (axes := _axes(state, size, widths[-1:])) is not None:
                yield FeatureMap(module, axes, _places(state, axes)), state
            elif state.ndim == 3 and (grid := _shown_grid(state, [each for _, each in ended[:index]], own, size)):
                yield FeatureMap(module, "BND", grid), state

    def _own_maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps (1, D, h, w) that timm's and Hugging Face's models hand out themselves, where they do."""
        # where Hugging Face's models collect hidden states by hooks, they leave those on
        with torch.no_grad(), borrowed(self.model), self.prepared(), unmarked(self.model):
            try:
                if hasattr(self.model, "forward_intermediates"):
                    maps = self.model.forward_intermediates(  # type: ignore[operator]
                        images, indices=1, output_fmt="NCHW", intermediates_only=True
                    )
                elif self._keyword is not None:
                    output = self.model(**{self._keyword: images}, output_hidden_states=True)
                    maps = getattr(output, "reshaped_hidden_states", None)
                else:
                    maps = None
            except Exception:  # it is no loss where a model cannot: it has shown nothing then
                return []
        return [each for each in maps or () if isinstance(each, Tensor) and each.ndim == 4]


def _shown_grid(
    tokens: Tensor, before: list[Tensor], own: list[Tensor], size: tuple[int, int]
) -> tuple[int, int] | None:
    """The grid of (1, N, D) tokens: of the model's own map of the same tokens, or of as many before; None without."""
    for each in own:
        same = to_tokens(each, "BDHW")
        if same.shape == tokens.shape and _same(same, tokens, unknown=True):
            return _places(each, "BDHW")
    for each in reversed(before):
        axes = _axes(each, size, [tokens.shape[-1]]) if each.ndim == 4 and len(each) == 1 else None
        if axes is not None and to_tokens(each, axes).shape[1] == tokens.shape[1]:
            return _places(each, axes)
    return None


def _parts(score: Tensor, state: Tensor, images: Tensor) -> bool:
    """Whether every path of the graph from the score to the images goes through the state."""
    seen = {state.grad_fn}
    waiting = [score.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is images:
            return False
        waiting += [each for each, _ in node.next_functions]
    return True


def _axes(state: Tensor, size: tuple[int, int], widths: list[int]) -> Arrangement | None:
    """Which axes of a 4-D state are places: those in the proportions of the image, and more than one place.

    Where both readings fit, the one with a known number of channels; None where that does not tell either.
    """
    if _same(state.abs().sum(-1), torch.ones_like(state[..., 0]), unknown=False):
        return None  # attention
    readings: list[Arrangement] = ["BDHW", "BHWD"]
    fitting = [each for each in readings if _in_proportion(_places(state, each), size)]
    if len(fitting) > 1:
        fitting = [each for each in fitting if to_tokens(state, each).shape[-1] in widths]
    return fitting[0] if len(fitting) == 1 else None


def _places(state: Tensor, arrangement: Arrangement) -> tuple[int, int]:
    h, w = state.shape[2:] if arrangement == "BDHW" else state.shape[1:3]
    return int(h), int(w)


def _same(a: Tensor, b: Tensor, *, unknown: bool) -> bool:
    """Whether two tensors hold the same numbers; `unknown` for those without any, of a model that is only outlined."""
    return unknown if a.is_meta else torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)


def _in_proportion(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a whole stride, the same in both axes, makes such a grid, give or take what padding does."""
    (h, w), (height, width) = grid, size
    steps = range(2, max(size) + 1)
    return h * w > 1 and any(abs(h * step - height) < step and abs(w * step - width) < step for step in steps)
