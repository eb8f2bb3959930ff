"""One Lightning training as all recipes here run it: on the model's device, quiet, and checked before it starts."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, VitExplainError
from ..files import make_folder


def check_output(output: str | os.PathLike[str]) -> Path:
    """The file that a training is to write, where that can be.

    Raises:
        InputError: it does not end in ``.safetensors``, its folder does not exist, or it or the card beside it is a
            folder.
        ExportError: its folder is read-only.
        VitExplainError: Lightning is not installed.
    """
    path = Path(output)
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise InputError(f"found {path} to write to, expected a name ending in .safetensors in a folder that exists")
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise InputError(f"found the folder {file} where a file is to be written; choose another name")
    make_folder(path.parent)
    if importlib.util.find_spec("lightning") is None:
        raise VitExplainError("training needs Lightning; install it with: pip install 'vitexplain[train]'")
    return path


def interruption(steps: int, state: Path) -> str:
    """What to tell the user of a training that was interrupted.

    Args:
        steps: how many were made.
        state: file to go on from, which is there once something was saved.
    """
    if not state.is_file():
        return f"training stopped after {steps} steps, before anything was saved: start anew"
    return f"training stopped after {steps} steps; what was last saved is kept in {state}: go on with resume"


def csv_logger(folder: str | os.PathLike[str], logged: int) -> Any:
    """Lightning's logger of figures as ``metrics.csv``, written at once; it would delete what is there.

    Args:
        folder: where to.
        logged: the last step, of a training that goes on, whose figures are kept; 0 where it starts.
    """
    from lightning.pytorch.loggers import CSVLogger

    rows: list[dict[str, str]] = []
    earlier = Path(folder) / "metrics.csv"
    if logged and earlier.is_file():
        with earlier.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
    logger = CSVLogger(Path(folder), name="", version="", flush_logs_every_n_steps=1)
    for row in rows:
        with suppress(ValueError, TypeError):  # somebody else's table
            if (step := int(row.pop("step"))) > logged:
                break
            logger.log_metrics({name: float(value) for name, value in row.items() if value}, step=step)
    return logger


def trainer(device: torch.device, logs: str | os.PathLike[str] | None, *, progress: bool, logged: int = 0) -> Any:
    """A Lightning trainer for one pass over numbered batches on one device.

    Args:
        device: where the model is.
        logs: folder for the figures of the course as ``metrics.csv``; None keeps none.
        progress: whether to show a progress bar.
        logged: see `csv_logger`.
    """
    import lightning

    kinds = {"cuda": "gpu", "mps": "mps"}
    return lightning.Trainer(
        accelerator=kinds.get(device.type, "cpu"),
        devices=[device.index or 0] if device.type == "cuda" else 1,
        max_epochs=1,
        logger=False if logs is None else csv_logger(logs, logged),
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, training may seed, warn and be interrupted; outside, the caller's program goes on as it was.

    Random state, whether gradients are recorded, warnings, logging and Ctrl-C are put back. Lightning's own advice
    about workers and its use of deprecated parts of torch say nothing to our user; and where it is interrupted, it
    would end the whole program.
    """
    log = logging.getLogger("lightning.pytorch")
    level, on_interrupt = log.level, signal.getsignal(signal.SIGINT)
    devices = [device] if device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
        finally:
            log.setLevel(level)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)
