"""Randomness that belongs to what is computed, not to when it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

DRAWN: Mapping[str, Any] = {"device": "cpu", "dtype": torch.float32}
"""How torch draws numbers from generators of the CPU: the same, whatever its default device and precision are."""


def normal_draws(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers for some copies of an image, the same whatever number of copies is asked for at a time.

    Args:
        count: n.
        like: (1, channels, H, W), with the device and the precision that are wanted.
        generator: of the CPU; n draws further afterwards.

    Returns:
        (n, channels, H, W).
    """
    # one call a copy: a generator may give other numbers where more are asked of it together
    return torch.stack([torch.randn(like.shape[1:], generator=generator, **DRAWN) for _ in range(count)]).to(like)


def begin_at(seed: int, device: torch.device) -> None:
    """The global generators of the CPU and of one device begin at a seed; `torch.manual_seed` sets those of all GPUs.

    Args:
        seed: 0 to 2⁶³-1.
        device: whose generator is set, besides the CPU's.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of torch and NumPy begin at a seed inside, and are as they were outside.

    Args:
        seed: 0 to 2⁶³-1.
        device: whose generator is set, besides the CPU's.
    """
    before = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)
