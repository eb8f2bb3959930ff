"""What the memory and speed drivers share: the models, the computations to compare with, verdicts, tables."""

from __future__ import annotations

import os
import platform
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitexplain import Explainer, ExplanationWarning, create_method, list_methods
from vitexplain.borrowing import attributes_set, borrowed

FORWARD = "forward"
FORWARD_BACKWARD = "forward + backward"
USUAL = "usual N×N"

Run = Callable[[], object]


def random_vit(name: str, image_size: int, **options: Any) -> nn.Module:
    """A timm Vision Transformer with random weights, the same ones at every call; in evaluation mode, float32."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, img_size=image_size, **options)
    return model.eval()


def load_vit(name: str, image_size: int, data: Path | None) -> tuple[nn.Module, str]:
    """A timm Vision Transformer, and whether its weights are "trained" or "random".

    Args:
        name: timm's name.
        image_size: side in pixels; position embeddings are resampled to it.
        data: folder of test data, in which weights may lie under the name; None for random ones.
    """
    model: Any = random_vit(name, image_size)
    path = None if data is None else data / f"{name}_in1k" / "model.safetensors"
    if path is None or not path.exists():
        return model, "random"
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    state = load_file(path)
    size = list(model.patch_embed.grid_size)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], size, num_prefix_tokens=model.num_prefix_tokens)
    model.load_state_dict(state)
    return model, "trained"


def random_images(batch: int, image_size: int) -> Tensor:
    """Images (B, 3, H, W) of noise, the same ones at every call."""
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


@contextmanager
def graph_from_first_block(model: nn.Module) -> Iterator[list[Tensor]]:
    """Weights frozen, the graph recorded from the first block on; the list receives the tokens (B, N, D) there."""
    entered: list[Tensor] = []

    def cut(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        entered.append(arguments[0].detach().requires_grad_(True))
        return entered[-1], *arguments[1:]

    blocks: Any = model.blocks
    handle = blocks[0].register_forward_pre_hook(cut)
    try:
        with borrowed(model), torch.enable_grad():
            yield entered
    finally:
        handle.remove()


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """The plain forward pass, without a graph: logits (B, C)."""
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits


def forward_backward(model: nn.Module, images: Tensor, target: int = 0) -> Tensor:
    """The plain forward and backward pass, weights frozen: gradient (B, N, D) at the first block's input."""
    with graph_from_first_block(model) as entered:
        score = model(images)[:, target].sum()
        return torch.autograd.grad(score, entered)[0]


def kept_attention(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Softmax (B, H, N, N) of every block, kept in a forward without fused attention; and the logits (B, C)."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output)

    blocks: Any = model.blocks
    attentions = [block.attn for block in blocks]
    handles = [attention.attn_drop.register_forward_hook(keep) for attention in attentions]
    try:
        with attributes_set(attentions, "fused_attn", False):
            logits: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept, logits


def usual_generic_attention(model: nn.Module, images: Tensor, target: int = 0) -> Tensor:
    """Generic attention as it is usually written: scores (B, P) of a CLS model with one prefix token.

    Attention is materialised and kept for all blocks, autograd gives the gradient of each, and N×N matrices are
    multiplied. Weights are frozen and the batch is explained at once, both to the advantage of this implementation.
    """
    with graph_from_first_block(model):
        kept, logits = kept_attention(model, images)
        gradients = torch.autograd.grad(logits[:, target].sum(), kept)
    with torch.no_grad():
        relevance = torch.eye(kept[0].shape[-1], device=images.device)
        for attention, gradient in zip(kept, gradients, strict=True):
            relevance = relevance + (gradient * attention).clamp(min=0).mean(1) @ relevance
    return relevance[:, 0, 1:]


def candidate(name: str, model: nn.Module, images: Tensor, **options: Any) -> Run:
    """A computation by name, ready to run: a method of the registry, or one of the three to compare with.

    Args:
        name: a method, `FORWARD`, `FORWARD_BACKWARD` or `USUAL`.
        model: a timm Vision Transformer.
        images: (B, 3, H, W).
        **options: of the method.
    """
    plain = {FORWARD: forward, FORWARD_BACKWARD: forward_backward, USUAL: usual_generic_attention}
    if name in plain:
        return lambda: plain[name](model, images)
    explainer = Explainer(create_method(name, **options), model)

    def explain() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExplanationWarning)  # a constant map: the weights are random
            return explainer(images, 0)

    return explain


def known_methods(names: Sequence[str]) -> list[str]:
    """The names, checked against the registry before anything is measured."""
    unknown = sorted(set(names) - set(list_methods(trainable=False)))
    if unknown:
        raise SystemExit(f"unknown methods {unknown}; there are {', '.join(list_methods(trainable=False))}")
    return list(names)


def verdict(claim: str, ratios: Mapping[str, float | None], limit: float) -> str:
    """One sentence: whether every ratio is within the limit. What could not be measured is not met.

    Args:
        claim: what is asked, without a full stop.
        ratios: where measured → ratio; None where there is no figure.
        limit: largest ratio allowed.
    """
    missing = [place for place, ratio in ratios.items() if ratio is None]
    if missing or not ratios:
        return f"{claim}: **not met**, no figure for {', '.join(missing) or 'any case'}."
    place, worst = max(((place, ratio) for place, ratio in ratios.items() if ratio is not None), key=lambda e: e[1])
    return f"{claim}: **{'met' if worst <= limit else 'not met'}**, largest ratio {worst:.3f}× ({place})."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine_facts(module: str, arguments: Sequence[str], threads: str) -> str:
    """The command, and what the figures depend on besides the code; two lines of Markdown."""
    import timm

    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"Command: `{shlex.join(['python', '-m', module, *arguments])}`\n\n"
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()} ({capability}), {os.cpu_count()} logical CPUs, {threads}."
    )
