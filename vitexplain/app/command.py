"""The command ``vitexplain app``."""

from __future__ import annotations

import time
import webbrowser
from typing import Annotated

import typer

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
    limits = Limits(image_bytes=round(megabytes * 1e6), image_pixels=round(megapixels * 1e6))
    try:
        with serve(host=host, port=port, device=device, limits=limits) as address:
            typer.echo(f"Listening at {address} (Ctrl-C stops)")
            if browser:
                webbrowser.open(address)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the app has stopped, and its files are removed") from None
