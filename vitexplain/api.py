"""The doors: an explainer by name, a model by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .automatic import NAME, automatic
from .errors import UnknownNameError
from .explainer import Explainer
from .registry import create_method, squash
from .subject import Subject

if TYPE_CHECKING:
    from .models.loading import LoadedModel
    from .subject import Model


def get_explainer(name: str, model: Model, **options: Any) -> Explainer:
    """An explainer: one method, with its options, on one model.

    ::

        explainer = get_explainer("tokentm", model)
        explanation = explainer(images, target=281)

    Args:
        name: a method of `list_methods()`; hyphens, capitals and usual aliases are forgiven. ``"auto"`` is what this
            project takes to be the best at one forward and one backward: `contributions`, or `gradcam` for models
            without attention over all tokens.
        model: a supported `torch.nn.Module`, also under `torch.compile`, or one of `torch.export`; what `load_model`
            returned, or a name that it takes.
        **options: the method's options, see `method_info(name).options`.

    Raises:
        UnknownNameError: no such method, option or model.
        OptionError: an option's value is out of its range.
        UnsupportedModelError: the model, or the method on this model, is not supported.
    """
    if not isinstance(name, str):
        raise UnknownNameError(
            f"found a {type(name).__name__}, expected a method's name, and then the model: get_explainer('rollout', "
            "model). A configured method goes into vitexplain.Explainer(method, model)"
        )
    method = create_method(name, **options)
    subject = Subject.of(model)
    return Explainer(automatic(subject) if squash(name) == NAME and not options else method, subject)


def load_model(name: str = "scenes", **options: Any) -> LoadedModel:
    """A model with its preprocessing and labels; see `vitexplain.models.loading.load_model`."""
    from .models import loading

    return loading.load_model(name, **options)
