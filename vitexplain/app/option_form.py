"""Controls for the options of methods, made from what the registry knows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..method import Method
from ..registry import create_method, list_methods, method_info


@dataclass(frozen=True, eq=False)
class Control:
    """One option of one method.

    Attributes:
        method: registry name.
        option: name of the option.
        default: its default.
        kind: Gradio's component that asks for it: ``"Checkbox"``, ``"Number"`` or ``"Dropdown"``.
        settings: of that component.
    """

    method: str
    option: str
    default: Any
    kind: str = "Checkbox"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def read(self, given: Any) -> Any:
        """What a visitor's entry means; what does not fit is refused by the method itself."""
        if given is None or given == "":
            return self.default
        if isinstance(self.default, float) and isinstance(given, int | float):
            return float(given)
        if isinstance(self.default, int | float) and isinstance(given, str):
            try:
                return type(self.default)(given)
            except ValueError:
                return given
        return given


def offered_methods() -> list[str]:
    """Methods that explain at once: those that have to be trained first are left out."""
    return list_methods(trainable=False)


def controls_of(name: str) -> Iterator[Control]:
    """Controls for a method's options.

    An option that takes any text is left out: it may name a file of the server.
    """
    info = method_info(name)
    for each in dataclasses.fields(info.method):
        found = _component(each)
        if found is not None:
            yield Control(info.name, each.name, each.default, *found)


def configured(chosen: Sequence[str], controls: Sequence[Control], given: Sequence[Any]) -> list[Method]:
    """The chosen methods with the options that were given.

    Args:
        chosen: registry names.
        controls: of all methods.
        given: what each of them says.

    Raises:
        VitExplainError: a value that an option cannot take.
    """
    options: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for control, value in zip(controls, given, strict=True):
        if control.method in options:
            options[control.method][control.option] = control.read(value)
    return [create_method(name, **values) for name, values in options.items()]


def _component(each: dataclasses.Field[Any]) -> tuple[str, dict[str, Any]] | None:
    """Which of Gradio's components asks for an option, and its settings; None where any text would do."""
    about = {"label": each.name.replace("_", " "), "info": each.metadata["help"], "value": each.default}
    choices = list(each.metadata["choices"])
    if isinstance(each.default, bool):
        return "Checkbox", about
    if isinstance(each.default, int | float) and not choices:
        limits = {key: each.metadata[key] for key in ("minimum", "maximum")}
        return "Number", {**about, **limits, "precision": 0 if isinstance(each.default, int) else None}
    if isinstance(each.default, int | float):
        text = str(each.default)
        return "Dropdown", {**about, "value": text, "choices": [text, *choices], "allow_custom_value": True}
    return ("Dropdown", {**about, "choices": choices}) if choices else None
