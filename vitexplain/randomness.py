"""Randomness that belongs to what is computed, not to when it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
