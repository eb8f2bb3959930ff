"""Adapters of models of which too little is known for attention: what they refuse, and how they say so."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UnsupportedModelError
from .unknown import UnknownModelAdapter

if TYPE_CHECKING:
    from ..needs import Needs


class LimitedAdapter(UnknownModelAdapter):
    """Base of adapters that refuse methods by what these need, and name those that work."""

    num_prefix_tokens = 0

    @abstractmethod
    def reads_more(self, needs: Needs) -> bool:
        """Whether more is asked for than is known of the model."""

    @abstractmethod
    def refusal(self, working: str) -> str:
        """What is said then, with the names of the methods that work."""

    def check_needs(self, needs: Needs) -> None:
        """Refuses what is not known.

        Raises:
            UnsupportedModelError: more is asked for than is known; names the methods that work.
        """
        super().check_needs(needs)
        if self.reads_more(needs):
            raise self._refused()

    def seed(self, num_tokens: int) -> Tensor:
        """Refused: how the head reads tokens is not known."""
        raise self._refused()

    def output_weight(self, block: int) -> Tensor:
        """Refused: no attention is known."""
        raise self._refused()

    value_weight = output_weight

    def _refused(self) -> UnsupportedModelError:
        from ..registry import create_method, list_methods

        working = [name for name in list_methods() if not self.reads_more(create_method(name).needs)]
        return UnsupportedModelError(self.refusal(", ".join(working)))
