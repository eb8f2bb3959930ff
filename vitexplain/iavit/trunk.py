"""What an interpreter reads of a model: its normalised patch tokens, its logits, and the attention patches receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention import AttentionOperands, RowTile, propagate
from ..capture import Capture
from ..errors import UnsupportedModelError
from ..layout import TokenLayout, to_tokens
from ..models.adapter import ModelAdapter
from ..models.token_head import final_tokens
from ..needs import Needs
from ..tap import SDPA_SIGNATURE

_EPSILON = 1e-6

STATE_NEEDS = Needs(states=frozenset({"out"}), from_block=-1)
"""What an interpreter needs of a capture."""


class TrunkReading(NamedTuple):
    """What an interpreter learns from, for B images.

    Attributes:
        tokens: H (B, P, D), the patch tokens behind the last block, each normalised to mean 0 and variance 1.
        logits: o (B, C), the model's answer.
        received: e (B, P), the attention that patches receive from patches: mean over heads and over the patches'
            queries, summed over blocks, so that a row sums to at most L; zeros where it was not asked for.
    """

    tokens: Tensor
    logits: Tensor
    received: Tensor


def normalised(tokens: Tensor) -> Tensor:
    """Tokens (…, D) as an interpreter takes them.

    The paper's interpreter reads them behind the model's final norm. The scale and shift of that norm are left to the
    interpreter's own linear maps, which can express them, so that models without such a norm are read alike.
    """
    return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPSILON)


def patch_tokens(capture: Capture) -> Tensor:
    """H (B, P, D) of a captured model.

    Raises:
        UnsupportedModelError: the last block puts out no tokens of patches.
    """
    return normalised(final_tokens(capture)[:, capture.layouts[-1].prefix :])


def read_frozen(adapter: ModelAdapter, images: Tensor, *, attention: bool = True) -> TrunkReading:
    """Reads a borrowed model, which stays as it is; no graph is recorded.

    Args:
        adapter: the model.
        images: (B, channels, H, W), normalised.
        attention: whether `TrunkReading.received` is read.

    Raises:
        InputError: the images do not fit the model.
        UnsupportedModelError: no tokens of patches, or attention that does not go over the same patches in all blocks.
    """
    needs = Needs(attention=attention, states=STATE_NEEDS.states, from_block=0 if attention else -1)
    adapter.check_needs(needs)
    with Capture(adapter, needs) as capture:
        logits = capture.forward(images)
        tokens = patch_tokens(capture)
        received = tokens.new_zeros(tokens.shape[:2])
        if attention:
            _check_layouts(adapter, capture.layouts)
            row = _patch_queries(tokens, capture.layouts[-1])
            parts = [block.propagate(row, _mean_of_heads) for block in capture.blocks]
            received = torch.stack(parts).sum(0)[:, capture.layouts[-1].prefix :]
    return TrunkReading(tokens, logits, received)


def read_on_graph(adapter: ModelAdapter, images: Tensor, *, attention: bool = True) -> TrunkReading:
    """Reads a model that is being trained: in its own mode, all on one graph.

    Args:
        adapter: the model.
        images: (B, channels, H, W), normalised.
        attention: whether `TrunkReading.received` is read.

    Raises:
        UnsupportedModelError: as for `read_frozen`; or attention that is not one call of
            `scaled_dot_product_attention` a block, on the graph; or patches are dropped.
    """
    last, kept = adapter.blocks[-1], list[Tensor]()

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(to_tokens(output[0] if isinstance(output, tuple) else output, last.arrangement))

    layouts = adapter.layouts(adapter.grid((images.shape[-2], images.shape[-1])))
    if attention:
        _check_layouts(adapter, layouts)
    with ExitStack() as stack:
        stack.enter_context(adapter.prepared())
        stack.callback(last.block.register_forward_hook(keep).remove)
        calls = stack.enter_context(_attention_on_graph(adapter)) if attention else []
        logits = adapter.logits(images)
    layout = layouts[-1]
    if adapter.model.training and len(kept) == 1 and kept[0].shape[1] < layout.count:
        raise UnsupportedModelError(dropped_patches(adapter.model, kept[0].shape[1], layout.count))
    if len(kept) != 1 or kept[0].shape[1] != layout.count:
        raise UnsupportedModelError(
            f"the last block of this {type(adapter.model).__name__} puts out no tokens of {layout.count} patches and "
            "prefixes; IA-ViT reads patch tokens, use a plain Vision Transformer"
        )
    tokens = normalised(kept[0][:, layout.prefix :])
    received = tokens.new_zeros(tokens.shape[:2])
    if attention:
        row = _patch_queries(tokens, layout)
        parts = [
            propagate(row, operands, _mean_of_heads)
            for operands in _one_a_block(adapter, calls, on_graph=tokens.requires_grad)
        ]
        received = torch.stack(parts).sum(0)[:, layout.prefix :]
    return TrunkReading(tokens, logits, received)


def dropped_patches(model: nn.Module, found: int, expected: int) -> str:
    """What to tell the user of a model that leaves patches out while it is trained, so that none has a place."""
    return (
        f"found {found} of {expected} tokens behind the last block of this {type(model).__name__} while it trains: it "
        "drops patches, and those left no longer say where they are. Turn that off (of timm's models: patch_drop_rate "
        "is 0 when they are built, or model.patch_drop = torch.nn.Identity())"
    )


def _mean_of_heads(tile: RowTile) -> Tensor:
    return tile.attention.mean(1)


def _patch_queries(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """The row (B, N) that averages over the patches' queries."""
    row = tokens.new_zeros(len(tokens), layout.count)
    row[:, layout.prefix :] = 1 / (layout.count - layout.prefix)
    return row


def _check_layouts(adapter: ModelAdapter, layouts: Sequence[TokenLayout]) -> None:
    if len(set(layouts)) > 1 or any(each.windows is not None for each in adapter.blocks):
        raise UnsupportedModelError(
            f"the blocks of this {type(adapter.model).__name__} do not all attend over the same patches, so there is "
            "no attention to hold the interpreter's to: train with reg='none', or use a plain Vision Transformer"
        )


def _one_a_block(
    adapter: ModelAdapter, calls: Sequence[Sequence[AttentionOperands]], *, on_graph: bool
) -> Iterator[AttentionOperands]:
    for index, found in enumerate(calls):
        if len(found) != 1:
            raise UnsupportedModelError(
                f"block {index} of this {type(adapter.model).__name__} called scaled_dot_product_attention "
                f"{len(found)} times, expected once: its attention cannot be trained with. Train the interpreter "
                "alone, on the model as it is, or with reg='none'"
            )
        if on_graph and not found[0].q.requires_grad:  # the regulariser would not move it
            raise UnsupportedModelError(
                f"block {index} of this {type(adapter.model).__name__} computes its attention without a graph, as "
                "gradient checkpointing of the reentrant kind does: turn it off, or choose use_reentrant=False. Or "
                "train with reg='none'"
            )
        yield found[0]


class _SeenCalls(TorchFunctionMode):
    """Keeps what attention is computed from, with its graph, which an `AttentionTap` cuts off.

    Attributes:
        inside: the list that calls are added to; None outside the attention modules.
    """

    inside: list[AttentionOperands] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside is not None:
            self.inside.append(_operands(*args, **named))
        return func(*args, **named)


def _operands(*args: Any, **kwargs: Any) -> AttentionOperands:
    """What a call of `scaled_dot_product_attention` is given, on its graph; dropout is left out of the attention."""
    bound = SDPA_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    query, scale = call["query"], call["scale"]
    if call["is_causal"] or call["enable_gqa"] or query.ndim != 4:
        raise UnsupportedModelError(
            "attention with is_causal or enable_gqa, or on tensors of other than four axes, cannot be trained with. "
            "Train the interpreter alone, on the model as it is, or with reg='none'"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionOperands(query, call["key"], call["value"], scale, call["attn_mask"])


@contextmanager
def _attention_on_graph(adapter: ModelAdapter) -> Iterator[list[list[AttentionOperands]]]:
    """A list a block, which fills as the model runs."""
    calls: list[list[AttentionOperands]] = [[] for _ in adapter.blocks]
    mode = _SeenCalls()

    def entering(found: list[AttentionOperands]) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            mode.inside = found

        return enter

    def leave(*_: Any) -> None:
        mode.inside = None

    with ExitStack() as stack:
        for block, found in zip(adapter.blocks, calls, strict=True):
            stack.callback(block.attention.register_forward_pre_hook(entering(found)).remove)
            stack.callback(block.attention.register_forward_hook(leave).remove)
        stack.enter_context(mode)
        yield calls
