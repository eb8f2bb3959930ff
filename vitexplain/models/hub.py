"""The hub and its local cache: whether it can be reached, and the pretrained weights of timm's architectures."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

from ..errors import CheckpointError
from .weights import first_line

OFFLINE = "once they are cached, HF_HUB_OFFLINE=1"
"""The remedy that is always there."""

_ALTERNATIVES = (
    "Offline alternatives: the embedded model (scenes); weights in a file (checkpoint=FILE.safetensors, --checkpoint "
    f"on the command line); or, {OFFLINE}"
)
_PROBE_SECONDS = 5.0
_logger = logging.getLogger(__name__)


def fetch_pretrained(architecture: str) -> tuple[nn.Module, str]:
    """A timm model with its pretrained weights, and where these came from.

    The hub's own client tries for most of a minute before it gives up, so where nothing is cached the connection is
    tried first. ``HF_HUB_OFFLINE=1`` in the environment keeps to the cache.

    Args:
        architecture: a name that timm knows, with or without a tag.

    Raises:
        CheckpointError: there are no pretrained weights, or they cannot be fetched.
    """
    import timm

    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.has_weights:
        raise CheckpointError(
            f"there are no pretrained weights of timm:{architecture}; give your own (checkpoint=FILE.safetensors, "
            "--checkpoint on the command line)"
        )
    repository = config.hf_hub_id
    if repository and not is_cached(repository):
        cause = offline_cause()
        if cause:
            raise _unreachable(architecture, cause)
        _logger.info("fetching the pretrained weights of timm:%s from the hub", architecture)
    try:
        with quiet("huggingface_hub"):
            model: nn.Module = timm.create_model(architecture, pretrained=True)
    except Exception as error:  # the hub client raises many kinds, none of them ours
        raise _unreachable(architecture, first_line(error)) from error
    return model, f"hub:{repository}" if repository else "hub"


def _unreachable(architecture: str, cause: str) -> CheckpointError:
    return CheckpointError(
        f"the pretrained weights of timm:{architecture} could not be fetched ({cause}). {_ALTERNATIVES}"
    )


def is_cached(repository: str) -> bool:
    """Whether a repository of the hub is in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, local_files_only=True)
    except Exception:  # "not cached" has another class from version to version
        return False
    return True


def offline_cause() -> str:
    """Why the hub cannot be reached, or "" where it probably can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and they are not in the local cache"
    if any(getproxies().get(scheme) for scheme in ("http", "https", "all")):
        return ""  # only the client knows the way through a proxy
    address: Any = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        return f"no connection to {address.hostname}: {error.strerror or error}; they are not in the local cache either"
    return ""


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keeps a library's retry messages off the screen: the error that follows says it in one line."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
