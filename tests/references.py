"""Each method again: slow, dense, in float64, by the model's own unfused attention and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Reference = Callable[..., Tensor]
REFERENCES: dict[str, Reference] = {}


def reference(name: str) -> Callable[[Reference], Reference]:
    """Marks the reference of a method; the tests ask for one by name for every registered method."""

    def keep(function: Reference) -> Reference:
        REFERENCES[name] = function
        return function

    return keep


class Trace:
    """One image through an unfused model: everything a method could want, as plain tensors.

    Attributes:
        attention: (H, N, N) a block.
        gradient: its derivative by the target's logit, from autograd.
        states: "in", "attention_input", "mid", "mlp", "out" of each block, (N, D).
        state_gradient: gradient of "attention_input".
        values: (H, N, dh) a block.
        seed: (N,) how the head reads the final tokens.
        target: the class.
    """

    def __init__(self, model: nn.Module, image: Tensor, target: int, seed: Tensor) -> None:
        self.model, self.seed, self.target = model, seed.double(), target
        self.states: list[dict[str, Tensor]] = [{} for _ in model.blocks]
        attention: list[Tensor] = []
        values: list[Tensor] = []
        inputs: list[Tensor] = []
        handles = []
        for index, block in enumerate(model.blocks):
            block.attn.fused_attn = False
            keep = self.states[index]
            heads = block.attn.num_heads

            def qkv(_: Any, __: Any, out: Tensor, heads: int = heads) -> None:
                values.append(out[0].chunk(3, dim=-1)[2].unflatten(-1, (heads, -1)).transpose(0, 1))

            def first(_: Any, args: Any, out: Tensor, keep: dict[str, Tensor] = keep) -> None:
                keep["in"], keep["attention_input"] = args[0][0], out[0]
                inputs.append(out)

            def second(_: Any, args: Any, out: Tensor, keep: dict[str, Tensor] = keep) -> None:
                keep["mid"] = args[0][0]

            def mlp(_: Any, args: Any, out: Tensor, keep: dict[str, Tensor] = keep) -> None:
                keep["mlp"] = out[0]

            def done(_: Any, args: Any, out: Tensor, keep: dict[str, Tensor] = keep) -> None:
                keep["out"] = out[0]

            handles += [
                block.attn.attn_drop.register_forward_pre_hook(lambda _, args: attention.append(args[0])),
                block.attn.qkv.register_forward_hook(qkv),
                block.norm1.register_forward_hook(first),
                block.norm2.register_forward_hook(second),
                block.ls2.register_forward_hook(mlp),
                block.register_forward_hook(done),
            ]
        logit = model(image[None])[0, target]
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(logit, [*attention, *inputs])
        self.attention = [each[0].detach() for each in attention]
        self.gradient = [each[0] for each in gradients[: len(attention)]]
        self.state_gradient = [each[0] for each in gradients[len(attention) :]]
        self.values = [each.detach() for each in values]
        self.states = [{key: value.detach() for key, value in each.items()} for each in self.states]


@reference("raw_attention")
def raw_attention(trace: Trace, layer: int = -1) -> Tensor:
    """Seed row of one block's attention, averaged over heads."""
    return sum(trace.seed @ head for head in trace.attention[layer]) / len(trace.attention[layer])


@reference("rollout")
def rollout(
    trace: Trace,
    start_layer: int = 0,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    residual: float = 0.5,
    normalisation: str = "row",
) -> Tensor:
    """Product of normalised N×N matrices."""
    product = torch.eye(len(trace.seed), dtype=torch.float64)
    for attention in trace.attention[start_layer:]:
        if head_fusion == "mean":
            fused = attention.mean(0)
        else:
            fused = attention.max(0).values if head_fusion == "max" else attention.min(0).values
        flat = fused.flatten()
        for index in flat.argsort()[: int(len(flat) * discard_ratio)].tolist():
            if index != 0:
                flat[index] = 0.0
        mixed = (1 - residual) * flat.view_as(fused) + residual * torch.eye(len(fused), dtype=torch.float64)
        sums = mixed.sum(1)
        product = (mixed / (sums[:, None] if normalisation == "row" else sums[None, :])) @ product
    return trace.seed @ product


@reference("generic_attention")
def generic_attention(trace: Trace, start_layer: int = 0) -> Tensor:
    """R = R + E_h[(G∘A)+] R; the seed's own relevance is taken away at the end."""
    identity = torch.eye(len(trace.seed), dtype=torch.float64)
    relevance = identity
    for attention, gradient in list(zip(trace.attention, trace.gradient, strict=True))[start_layer:]:
        relevance = relevance + (attention * gradient).clamp(min=0).mean(0) @ relevance
    return trace.seed @ (relevance - identity)


@reference("gradcam")
def gradcam(trace: Trace, layer: int = -1, relu: bool = True) -> Tensor:
    """Token features times the mean gradient over patches."""
    prefix = trace.model.num_prefix_tokens
    weights = trace.state_gradient[layer][prefix:].mean(0)
    scores = trace.states[layer]["attention_input"] @ weights
    return scores.clamp(min=0) if relu else scores


@reference("tokentm")
def tokentm(
    trace: Trace,
    start_layer: int = 0,
    transformation: str = "value",
    necc_scale: float | str = 1.0,
    length: bool = True,
    direction: bool = True,
    initialisation: bool = True,
    feed_forward: bool = True,
) -> Tensor:
    """C = U_FFN U_MHSA C as N×N matrices, with every transformed token written out."""
    count = len(trace.seed)
    scale = count if necc_scale == "tokens" else necc_scale
    identity = torch.eye(count, dtype=torch.float64)

    def weight(before: Tensor, after: Tensor) -> Tensor:
        cosines = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        necc = torch.exp(cosines) / torch.exp(cosines).sum() * scale if direction else torch.ones(count)
        return necc * (after.norm(dim=-1) / before.norm(dim=-1) if length else 1)

    start = trace.states[start_layer]["in"].norm(dim=-1) if initialisation else torch.ones(count, dtype=torch.float64)
    everything, own = torch.diag(start), torch.diag(start)
    for index in range(start_layer, len(trace.attention)):
        block, states = trace.model.blocks[index], trace.states[index]
        attention, gradient = trace.attention[index], trace.gradient[index].clamp(min=0)
        heads = len(attention)
        gamma = getattr(block.ls1, "gamma", torch.ones(()))
        outputs = (gamma[..., None] * block.attn.proj.weight).detach().double().chunk(heads, dim=1)
        maps = block.attn.qkv.weight.detach().double().chunk(3)[2].chunk(heads)
        update = torch.zeros_like(identity)
        for head in range(heads):
            values = trace.values[index][head] if transformation == "value" else states["in"] @ maps[head].T
            update += gradient[head] * attention[head] * weight(states["in"], values @ outputs[head].T) / heads
        if transformation == "residual":
            update = gradient.mean(0) * attention.mean(0) * weight(states["in"], states["mid"])
        after = states["out"] if transformation == "residual" else states["mlp"]
        forward = torch.diag(1 + weight(states["mid"], after)) if feed_forward else identity
        everything, own = forward @ (identity + update) @ everything, forward @ own
    return trace.seed @ (everything - own)


@reference("pm")
def pm(trace: Trace, score: str = "probability") -> Tensor:
    """The head on one token at a time, as if it were the only one; probabilities written out in exponentials."""
    model, scores = trace.model, []
    for token in trace.states[-1]["out"]:
        read = model.fc_norm(model.norm(token)) if hasattr(model, "fc_norm") else model.norm(token)
        heads = [model.head, *([model.head_dist] if hasattr(model, "head_dist") else [])]
        scores.append(sum(head(read) for head in heads) / len(heads))
    logits = torch.stack(scores).detach()
    patches = logits[model.num_prefix_tokens :].exp()
    exponential = logits.exp()[:, trace.target]
    if score == "logit":
        return logits[:, trace.target]
    if score == "joint":
        return exponential / patches.sum()
    return exponential / (1 + (exponential if score == "probability" else logits.exp().sum(1)))
