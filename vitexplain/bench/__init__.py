"""Benchmarks: models × methods × metrics on a data set, resumable, with intervals and a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from .configuration import BenchConfiguration
    from .results import BenchResults

__all__ = ["open_results", "read_configuration", "run_bench"]


def read_configuration(path: str | os.PathLike[str]) -> BenchConfiguration:
    """The configuration in a YAML file; see `vitexplain.bench.configuration.BenchConfiguration`.

    Raises:
        InputError: the file cannot be read, or is no YAML.
        UnknownNameError: a key, method, metric or option that does not exist; the message names the line.
        OptionError: a value that cannot be taken.
    """
    from .configuration import BenchConfiguration
    from .configuration_file import read_mapping

    return BenchConfiguration.from_mapping(read_mapping(path))


def run_bench(
    configuration: BenchConfiguration, output: str | os.PathLike[str], *, recompute: bool = False
) -> BenchResults:
    """Measures what is missing in a folder, and writes its tables and report; see `vitexplain.bench.run.run_bench`."""
    from . import run

    return run.run_bench(configuration, output, recompute=recompute)


def open_results(folder: str | os.PathLike[str]) -> BenchResults:
    """The results that a run left in a folder.

    Raises:
        InputError: the folder holds no finished results, or they cannot be read.
    """
    from .results import BenchResults

    return BenchResults.open(folder)
