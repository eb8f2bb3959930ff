"""Attention flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitexplain.attention import widen
from vitexplain.capture import Capture
from vitexplain.errors import UnsupportedModelError
from vitexplain.method import AttentionMethod
from vitexplain.options import option
from vitexplain.record import BlockRecord
from vitexplain.registry import register_method

_UNIT = 2**30
"""Whole units that stand for a flow of 1; the solver counts in 32 bits."""


@register_method(
    "attention_flow",
    title="Attention flow",
    paper="Abnar & Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, sec. 3",
    class_specific=False,
    passes="1F",
    aliases=("max_flow",),
)
@dataclass(frozen=True)
class AttentionFlow(AttentionMethod):
    r"""The largest flow from the head to each input token, through a network with attention as its capacities.

    Tokens of all blocks are nodes; an edge from token i behind block l to token j before it lets through

    .. math:: \hat A_l = \tfrac12 (I + \mathrm{E}_h A_{l,h}), \qquad m_j = \mathrm{maxflow}(\text{head} \to j)

    where the head feeds the final tokens by the seed row. Scores (B, N) in [0, 1], exact to about 1e-9 an edge.

    It is no product: N flow problems over L N² edges, one after the other, on one CPU core. With 12 blocks an image of
    197 tokens takes 7 s and one of 401 tokens 90 s, about as the fourth power of N; therefore `max_tokens`. Patches to
    which all that the head feeds can flow tie at 1: every tenth to fifth of 196, on two tiny ImageNet models.
    """

    max_tokens: int = option(200, "most tokens an image may have; time grows about as their fourth power", minimum=1)

    def attribute(self, capture: Capture) -> Tensor:
        """Flows (B, N).

        Raises:
            UnsupportedModelError: too many tokens, or attention that is no distribution over all tokens.
        """
        blocks, seed = self.blocks(capture), capture.seed_row()
        self._check(capture, blocks)
        capacities = torch.stack([_capacities(block) for block in blocks], 1).cpu()  # (B, L, N, N)
        flows = [_flows(*each) for each in zip(capacities, seed.double().cpu(), strict=True)]
        return torch.stack(flows).to(widen(capture.images))

    def _check(self, capture: Capture, blocks: list[BlockRecord]) -> None:
        count = capture.num_tokens
        if count > self.max_tokens:
            edges = len(blocks) * count**2
            raise UnsupportedModelError(
                f"found {count} tokens in {len(blocks)} blocks, expected at most {self.max_tokens}: flow solves "
                f"{count} flow problems over {edges:,} edges an image, minutes from 400 tokens on. Raise max_tokens to "
                "wait for it, or use rollout or generic_attention, which follow the same attention in milliseconds"
            )
        odd = [block.index for block in blocks if block.windows is not None or not block.operands.stochastic]
        if odd or len(set(capture.layouts)) > 1:
            raise UnsupportedModelError(
                f"the attention of blocks {odd or 'of this model'} is no distribution over one set of tokens, so its "
                "weights are no capacities; use rollout or generic_attention"
            )


def _capacities(block: BlockRecord) -> Tensor:
    """Â (B, N, N) in float64."""
    fused = torch.cat([tile.attention.mean(1) for tile in block.tiles()], 1).double()
    return (fused + torch.eye(fused.shape[1], dtype=fused.dtype, device=fused.device)) / 2


def _flows(capacities: Tensor, seed: Tensor) -> Tensor:
    """Largest flow (N,) to each input token, from capacities (L, N, N) and the seed row (N,), by Dinic's algorithm."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    layers, count, _ = capacities.shape
    source = (layers + 1) * count  # nodes: tokens of layer 0 (the input) to L, then the source
    layer, above, below = (capacities > 0).nonzero().numpy().T
    heads = seed.nonzero()[:, 0].numpy()
    starts = np.concatenate([(layer + 1) * count + above, np.full(len(heads), source)])
    ends = np.concatenate([layer * count + below, layers * count + heads])
    limits = np.concatenate([capacities.numpy()[layer, above, below], seed.numpy()[heads]])
    network = coo_array(((limits * _UNIT).round().astype(np.int32), (starts, ends)), shape=(source + 1, source + 1))
    graph = network.tocsr()
    flows = [maximum_flow(graph, source, sink).flow_value for sink in range(count)]
    return torch.tensor(flows, dtype=torch.float64) / _UNIT
