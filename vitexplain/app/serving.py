"""Starting the app: on this machine alone, without telemetry, its files in a private folder that goes with it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import VitExplainError
from .limits import Limits

LOCAL = "127.0.0.1"
"""Where the app listens: this machine alone."""


@contextmanager
def serve(
    *, host: str = LOCAL, port: int | None = None, device: str = "cpu", limits: Limits | None = None
) -> Iterator[str]:
    """Runs the app in the background as long as the block lasts.

    ::

        with serve() as address:
            print(address)
            input("press Enter to stop")

    Args:
        host: address to listen at. Others than this machine can reach the app only where it is changed, and whoever
            can reach the app can use this machine's processor and memory.
        port: to listen at; by default the first free one from 7860 on.
        device: where models are put.
        limits: of uploads.

    Yields:
        The app's address, ``http://127.0.0.1:7860/``.

    Raises:
        VitExplainError: Gradio is missing, or the port is taken.
    """
    limits = limits or Limits()
    if port is not None:
        _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="vitexplain-app-") as folder, _quiet_surroundings(folder):
        try:
            import gradio as gr
        except ImportError as error:
            raise VitExplainError("the app needs gradio; install it with: pip install 'vitexplain[app]'") from error
        from .guard import OutsideRefused
        from .page import Page
        from .shelf import Shelf
        from .uploads import Uploads

        blocks = Page(Shelf(device), limits, Uploads(Path(folder))).build()
        blocks.queue(default_concurrency_limit=2)
        system: Any = ["system-ui", "sans-serif"]
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=False,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                run_history=False,
                footer_links=[],
                allowed_paths=[],
                max_file_size=limits.checkpoint_bytes,
                theme=gr.themes.Default(primary_hue="blue", font=system, font_mono=["ui-monospace", "monospace"]),
                css=resources.files(__package__ or "").joinpath("templates/app.css").read_text(encoding="utf-8"),
                app_kwargs={"middleware": [(OutsideRefused, (), {})]},  # class, arguments, named arguments
            )
        except OSError as error:
            raise _no_port(host, port, error) from error
        try:
            yield str(address)
        finally:
            blocks.close(verbose=False)


def _check_free(host: str, port: int) -> None:
    """Tries the port before seconds are spent on building the page."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
            trial.bind((host, port))
    except (OSError, OverflowError) as error:
        raise _no_port(host, port, error) from error


def _no_port(host: str, port: int | None, error: Exception) -> VitExplainError:
    return VitExplainError(f"the app cannot listen at {host}, port {port}: {error}; choose another port")


@contextmanager
def _quiet_surroundings(folder: str) -> Iterator[None]:
    """What Gradio reads from the environment, set inside and put back."""
    wanted = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
