"""What the repeated options of ``vitexplain train …`` mean, and the data that they tell of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, UnknownNameError

if TYPE_CHECKING:
    from ..data.example import Example
    from ..models.loading import LoadedModel


def read_values(option: str, texts: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a mapping, each value of the type of its default.

    Raises:
        UnknownNameError: a name that has no default.
        OptionError: a text without ``=``, or a value of another type.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"{option}: found {text!r}, expected NAME=VALUE")
        if name not in defaults:
            raise UnknownNameError.listing(f"name for {option}", name, defaults)
        kind = type(defaults[name])
        known = {"true": True, "false": False}
        try:
            values[name] = known[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise OptionError(f"{option}: found {text!r}, expected a value like {defaults[name]!r}") from None
    return values


def training_options(
    data: str, texts: Sequence[str], *, count: int | None, name: str = "--data-option"
) -> dict[str, Any]:
    """The options by which the reader of a data set gives what to train on.

    Args:
        data: ``NAME:PATH``, or ``NAME`` alone.
        texts: ``NAME=VALUE`` each; without one for ``split``, the training split is read.
        count: how many, of data sets that can be asked for a number and where `texts` do not; None: the reader's own.
        name: what these options are called on the command line.

    Raises:
        UnknownNameError: there is no such data set, or its reader has no such option.
        OptionError: a text without ``=``, or a value of another type.
    """
    from ..data import dataset_info

    info = dataset_info(data.partition(":")[0])
    known = {each.name: each.default for each in info.options}
    wanted = {"split": info.training_split, **({} if count is None else {"count": count})}
    return {each: value for each, value in wanted.items() if each in known} | read_values(name, texts, known)


def open_training_data(
    data: str, texts: Sequence[str], loaded: LoadedModel, *, count: int | None, name: str = "--data-option"
) -> Sequence[Example]:
    """The examples of a data set; procedural ones are painted once, since painting costs more than a training step.

    Args:
        data: ``NAME:PATH``, or ``NAME`` alone.
        texts: ``NAME=VALUE`` each, for its reader.
        loaded: the model whose classes the labels are.
        count: see `training_options`.
        name: see `training_options`.
    """
    from ..data import dataset_info, open_dataset

    examples = open_dataset(data, labels=loaded.labels, **training_options(data, texts, count=count, name=name))
    return list(examples) if dataset_info(data.partition(":")[0]).root == "nothing" else examples
