"""Each method again: slow, dense, in float64, by the model's own unfused attention and plain autograd."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Reference = Callable[..., Tensor]
REFERENCES: dict[str, Reference] = {}


def reference(name: str) -> Callable[[Reference], Reference]:
    """Marks the reference of a method, which tests find by its name."""

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
        image: (3, H, W).
    """

    def __init__(self, model: nn.Module, image: Tensor, target: int, seed: Tensor) -> None:
        self.model, self.seed, self.target, self.image = model, seed.double(), target, image
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


@reference("attention_gradcam")
def attention_gradcam(trace: Trace, layer: int = -1, relu: bool = False) -> Tensor:
    """Each head's row of attention times one number, the mean of its row of gradients over the patches."""
    prefix, scores = trace.model.num_prefix_tokens, torch.zeros_like(trace.seed)
    heads = list(zip(trace.attention[layer], trace.gradient[layer], strict=True))
    for attention, gradient in heads:
        scores += (trace.seed @ gradient)[prefix:].mean() * (trace.seed @ attention) / len(heads)
    return scores.clamp(min=0) if relu else scores


@reference("attcat")
def attcat(trace: Trace, start_layer: int = 0) -> Tensor:
    """Input times gradient of every block's input, from a forward of its own, times the mean of A's columns."""
    inputs: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in trace.model.blocks]
    logit = trace.model(trace.image[None])[0, trace.target]
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logit, inputs)
    scores = torch.zeros_like(trace.seed)
    for index in range(start_layer, len(inputs)):
        for token in range(len(scores)):
            received = trace.attention[index][:, :, token].mean()
            scores[token] += received * (inputs[index][0, token] @ gradients[index][0, token]).detach()
    return scores


@reference("gmar")
def gmar(trace: Trace, start_layer: int = 0, norm: str = "l1") -> Tensor:
    """Dense rollout of one weighted sum of heads a block, less what the identity alone carries."""
    identity = torch.eye(len(trace.seed), dtype=torch.float64)
    product, own = identity, identity
    for attention, gradient in list(zip(trace.attention, trace.gradient, strict=True))[start_layer:]:
        norms = [float(each.abs().sum() if norm == "l1" else each.square().sum().sqrt()) for each in gradient]
        weighted = sum(size / sum(norms) * head for size, head in zip(norms, attention, strict=True))
        product, own = (identity + weighted) / 2 @ product, own / 2
    return trace.seed @ (product - own)


@reference("gradient_rollout")
def gradient_rollout(
    trace: Trace, start_layer: int = 0, discard_ratio: float = 0.9, normalisation: str = "row"
) -> Tensor:
    """Dense rollout of attention times gradient, entries discarded one by one, less what the identity alone carries."""
    identity = torch.eye(len(trace.seed), dtype=torch.float64)
    product, own = identity, identity
    for attention, gradient in list(zip(trace.attention, trace.gradient, strict=True))[start_layer:]:
        fused = (attention * gradient).mean(0).clamp(min=0)
        flat = fused.flatten()
        for index in flat.argsort()[: int(len(flat) * discard_ratio)].tolist():
            flat[index] = 0.0
        mixed = flat.view_as(fused) + identity
        sums = mixed.sum(1)
        product = (mixed / (sums[:, None] if normalisation == "row" else sums[None, :])) @ product
        own = torch.diag(1 / sums) @ own
    return trace.seed @ (product - own)


@reference("agcam")
def agcam(trace: Trace, start_layer: int = 0) -> Tensor:
    """Scores before the softmax from the projections themselves, token by token."""
    total = torch.zeros_like(trace.seed)
    for index in range(start_layer, len(trace.attention)):
        attention, state = trace.model.blocks[index].attn, trace.states[index]["attention_input"]
        q, k, _ = attention.qkv(state).detach().chunk(3, dim=-1)
        for head, gradient in enumerate(trace.gradient[index]):
            queries, keys = (each.unflatten(-1, (len(trace.gradient[index]), -1))[:, head] for each in (q, k))
            before = attention.q_norm(queries) @ attention.k_norm(keys).T / keys.shape[1] ** 0.5
            total += trace.seed @ (gradient.clamp(min=0) / (1 + torch.exp(-before.detach())))
    return total


def integrated_gradient(trace: Trace, points: int) -> Tensor:
    """(N, N): the positive part of the last attention's gradient, averaged over scaled images, then over heads."""
    scaled = [
        Trace(trace.model, trace.image * step / (points - 1), trace.target, trace.seed).gradient[-1]
        for step in range(points)
    ]
    return torch.stack(scaled).mean(0).clamp(min=0).mean(0)


@reference("beyond_intuition")
def beyond_intuition(trace: Trace, start_layer: int = 0, points: int = 20, variant: str = "token") -> Tensor:
    """The whole product of N×N matrices, gated entry by entry."""
    product = torch.eye(len(trace.seed), dtype=torch.float64)
    for index in range(start_layer, len(trace.attention)):
        block, attention, gradient = trace.model.blocks[index], trace.attention[index], trace.gradient[index]
        if variant == "head":
            sizes = torch.stack([(a.T @ g).abs().mean() for a, g in zip(attention, gradient, strict=True)])
            weighted = (attention * (sizes / sizes.sum())[:, None, None]).sum(0)
        else:
            gamma = getattr(block.ls1, "gamma", torch.ones(()))
            values = (
                torch.cat(list(trace.values[index]), dim=1) @ (gamma[..., None] * block.attn.proj.weight).detach().T
            )
            longer = values.norm(dim=1) / trace.states[index]["in"].norm(dim=1)
            weighted = attention.mean(0) @ torch.diag(longer)
        product = product + weighted @ product
    return trace.seed @ (integrated_gradient(trace, points) * product)


@reference("transition_attention")
def transition_attention(trace: Trace, start_layer: int = 0, points: int = 20) -> Tensor:
    """The chain as one product of matrices, from below."""
    *lower, last = [attention.mean(0) for attention in trace.attention[start_layer:]]
    product = torch.eye(len(trace.seed), dtype=torch.float64)
    for attention in lower:
        product = product + attention @ product
    return (trace.seed @ last @ product) * (trace.seed @ integrated_gradient(trace, points))


@reference("legrad")
def legrad(trace: Trace, layers: int = 2, pooling: str = "mean", normalised: bool = False) -> Tensor:
    """Each block alone: run again from its input, read by the model's own head, differentiated by its attention."""
    model, scores = trace.model, torch.zeros_like(trace.seed)
    heads = [model.head, *([model.head_dist] if hasattr(model, "head_dist") else [])]
    for index in range(len(model.blocks))[-layers:]:
        block, attention = model.blocks[index], []
        handle = block.attn.attn_drop.register_forward_pre_hook(lambda _, args, kept=attention: kept.append(args[0]))
        tokens = block(trace.states[index]["in"][None])
        handle.remove()
        if pooling == "head":
            logits = model.forward_head(model.norm(tokens))[0]
        else:
            mean = model.norm(tokens.mean(1)[0])
            mean = model.fc_norm(mean) if hasattr(model, "fc_norm") else mean
            logits = sum(head(mean) for head in heads) / len(heads)
        if normalised:
            logits = logits - sum(head.bias for head in heads) / len(heads)
            logits = logits / logits.square().sum().sqrt()
        (gradient,) = torch.autograd.grad(logits[trace.target], attention)
        scores += gradient[0].clamp(min=0).mean((0, 1))
    return scores


@reference("attention_flow")
def attention_flow(trace: Trace, start_layer: int = 0, max_tokens: int = 200) -> Tensor:
    """Every flow as a linear program: what leaves the head is what arrives, and nothing stays on the way."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    identity = torch.eye(len(trace.seed), dtype=torch.float64)
    capacities = [((identity + each.mean(0)) / 2).numpy() for each in trace.attention[start_layer:]]
    layers, count = len(capacities), len(trace.seed)
    edges, limits = [], []
    for token, share in enumerate(trace.seed.tolist()):
        edges.append((None, (layers, token)))
        limits.append(share)
    for layer, matrix in enumerate(capacities):
        for (above, below), limit in np.ndenumerate(matrix):
            edges.append(((layer + 1, above), (layer, below)))
            limits.append(limit)
    entering = np.array([end[0] * count + end[1] for _, end in edges])
    leaving = np.array([-1 if start is None else start[0] * count + start[1] for start, _ in edges])
    number, inner = np.arange(len(edges)), leaving >= 0
    balance = coo_array(
        (
            np.concatenate([np.ones(len(edges)), -np.ones(inner.sum())]),
            (np.concatenate([entering, leaving[inner]]), np.concatenate([number, number[inner]])),
        ),
        shape=((layers + 1) * count, len(edges)),
    ).tocsr()
    flows = []
    for sink in range(count):
        kept = np.delete(np.arange(balance.shape[0]), sink)
        found = linprog(
            -(entering == sink).astype(float),
            A_eq=balance[kept],
            b_eq=np.zeros(len(kept)),
            bounds=np.stack([np.zeros(len(limits)), limits], 1),
            method="highs",
        )
        flows.append(-found.fun)
    return torch.tensor(flows, dtype=torch.float64)


def _with_prefix(trace: Trace, scores: list[float]) -> Tensor:
    return torch.tensor([0.0] * trace.model.num_prefix_tokens + scores, dtype=torch.float64)


@reference("random_scores")
def random_scores(trace: Trace, seed: int = 0) -> Tensor:
    """As many uniform numbers as patches, from a generator that only the image and the seed determine."""
    digest = zlib.crc32(trace.image.bfloat16().float().numpy().tobytes(), seed)
    patches = len(trace.seed) - trace.model.num_prefix_tokens
    return _with_prefix(trace, torch.rand(patches, generator=torch.Generator().manual_seed(digest)).tolist())


@reference("centre_prior")
def centre_prior(trace: Trace, sigma: float = 0.25) -> Tensor:
    """A Gaussian of the distance to the middle, patch by patch."""
    h, w = (side // 8 for side in trace.image.shape[1:])
    places = [((row + 0.5) / h, (column + 0.5) / w) for row in range(h) for column in range(w)]
    return _with_prefix(trace, [float(np.exp(-((u - 0.5) ** 2 + (v - 0.5) ** 2) / (2 * sigma**2))) for u, v in places])
