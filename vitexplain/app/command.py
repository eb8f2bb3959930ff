"""The command ``vitexplain app``."""

from __future__ import annotations

import math
import time
import webbrowser
from typing import Annotated

import typer

from ..errors import OptionError
from .limits import Limits
from .serving import LOCAL, serve


def app_command(
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Port to listen at.  \\[default: the first free one from 7860]")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; this machine alone unless changed.")
    ] = LOCAL,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, …")] = "cpu",
    megabytes: Annotated[float, typer.Option(metavar="N", help="Largest picture file, in MB.")] = 20,
    megapixels: Annotated[float, typer.Option(metavar="N", help="Largest picture, in millions of pixels.")] = 40,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Starts the web app: a picture, a model, methods and classes, side by side. Ctrl-C stops it.

    Nothing leaves this machine, except that a model of timm is fetched from the hub when it is chosen and not cached.
    """
    limits = Limits(_millions("--megabytes", megabytes), _millions("--megapixels", megapixels))
    try:
        with serve(host=host, port=port, device=device, limits=limits) as address:
            typer.echo(f"Listening at {address} (Ctrl-C stops)")
            if browser:
                webbrowser.open(address)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the app has stopped, and its files are removed") from None


def _millions(option: str, number: float) -> int:
    if not 0 < number < math.inf:
        raise OptionError(f"{option} is {number}, expected a number above 0")
    return round(number * 1e6)
