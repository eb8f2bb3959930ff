"""The report of a comparison: one HTML page that needs nothing else, works from a file and reaches for no network."""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..bench.formatting import show_seconds
from ..colormaps import SIGNED_COLORMAP, UNSIGNED_COLORMAP, color_table
from ..errors import VitExplainError
from ..metrics.catalogue import metric_info
from ..models.fingerprint import weights_digest
from ..showing import png_address
from .charts import HEIGHT, MARGIN, WIDTH
from .picture import heading, shared_ranges
from .scene import Scenes
from .table import NO_PROBABILITY, make_table

if TYPE_CHECKING:
    from .comparison import Comparison

_PACKAGES = ("torch", "timm", "numpy", "pillow")


def render_report(
    comparison: Comparison,
    *,
    title: str = "Side by side",
    faithfulness: bool = True,
    cost: bool = True,
    attention: bool = True,
    share_scale: bool = False,
) -> str:
    """The report as the text of an HTML page.

    Args:
        comparison: what to report.
        title: heading of the page.
        faithfulness: measure deletion, insertion and SaCo; some seventy forward passes a map.
        cost: time each method alone.
        attention: write in what every token attends to, which a click on a patch shows; left out where it would take
            more than 24 MiB.
        share_scale: one range for all maps of a method, as in `picture.draw`.

    Raises:
        VitExplainError: Jinja is missing.
        InputError: how the images were normalised is not known.
    """
    environment = _environment()
    table = make_table(comparison, faithfulness=faithfulness, cost=cost)
    scenes = Scenes(comparison, table, shared_ranges(comparison) if share_scale else {}, attention)
    described = scenes.describe()
    script = _source(environment, "report.js")
    style = "\n".join([_source(environment, "report.css"), *_painted(described)])
    page: str = environment.get_template("report.html.j2").render(
        title=title,
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        chart={"width": WIDTH, "height": HEIGHT, "margin": MARGIN},
        methods=[_method(comparison, label) for label in comparison.methods],
        several_models=len(comparison.subjects) > 1,
        scenes=described,
        data={"maps": scenes.maps, "attention": scenes.attention, "colours": _colours()},
        no_probability=f"A dash: {NO_PROBABILITY}",
        attention_left_out=scenes.attention_left_out,
        metrics=[(metric_info(name).figures[0].title, higher) for name, higher in table.better.items()],
        refusals=[(*key, reason) for key, reason in comparison.refusals.items()],
        costs=_costs(comparison) if cost else [],
        models=[_model(comparison, label) for label in comparison.subjects],
        versions=_versions(),
        share_scale=share_scale,
    )
    return page


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise VitExplainError("a report needs jinja2; install it with: pip install 'vitexplain[compare]'") from error
    return Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(environment: Any, name: str) -> str:
    text: str = environment.loader.get_source(environment, name)[0]
    return text


def _painted(scenes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Style rules with the pictures, so that each stands in the page once, and with the colour bars."""
    for scene in scenes:
        height, width = scene["size"]
        yield f".p{scene['number']}-size, .p{scene['number']} {{ aspect-ratio: {width} / {height}; }}"
        yield f".p{scene['number']} {{ background-image: url({scene['picture']}); }}"
    for name, colormap in (("signed", SIGNED_COLORMAP), ("unsigned", UNSIGNED_COLORMAP)):
        bar = Image.fromarray(color_table(colormap)[None])
        yield f".scale .{name} {{ background-image: url({png_address(bar)}); }}"


def _colours() -> str:
    return base64.b64encode(color_table(UNSIGNED_COLORMAP).tobytes()).decode("ascii")


def _digest(text: str) -> str:
    """How a content security policy names the one script, or style, that may be used."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _method(comparison: Comparison, label: str) -> dict[str, Any]:
    method = comparison.methods[label]
    return {
        "label": label,
        "heading": heading(comparison, label).replace("\n", ", "),
        "paper": method.info.paper,
        "class_specific": method.info.class_specific,
        "passes": method.info.passes,
        "options": ", ".join(f"{name}={value}" for name, value in method.options.items()) or "none",
    }


def _model(comparison: Comparison, label: str) -> dict[str, Any]:
    subject = comparison.subjects[label]
    prepared = subject.preprocessing
    return {
        "label": label,
        "name": comparison.model_names[label],
        "kind": type(subject.adapter.model).__name__,
        "sha256": weights_digest(subject.adapter.model),
        "approximate": subject.adapter.approximate,
        "preprocessing": "" if prepared is None else ", ".join(f"{k} {v}" for k, v in prepared.to_dict().items()),
    }


def _costs(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    return [
        (model, method, show_seconds(cost["seconds"]), f"{cost['seconds'] / cost['forward_seconds']:.2f}")
        for (model, method), cost in comparison.costs.items()
    ]


def _versions() -> dict[str, str]:
    from .. import __version__

    packages = {name: version(name) for name in _PACKAGES}
    return {"vitexplain": __version__, "Python": platform.python_version(), **packages}
