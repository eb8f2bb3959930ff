"""The method that is taken where nobody names one."""

from __future__ import annotations

from .errors import UnsupportedModelError
from .explainer import Explainer
from .method import Method
from .registry import create_method
from .subject import Subject

NAME = "auto"
"""Stands for `automatic` where a model is known; elsewhere it is another name of `contributions`."""


def automatic(subject: Subject) -> Method:
    """The best method at one forward and one backward that explains this model.

    That is `contributions`; for models without attention over all tokens, such as pyramids, it is `gradcam`.

    Raises:
        UnsupportedModelError: neither explains the model.
    """
    first, second = create_method("contributions"), create_method("gradcam")
    try:
        return Explainer(first, subject).method
    except UnsupportedModelError:
        return Explainer(second, subject).method
