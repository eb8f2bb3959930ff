"""What benchmarks need beyond the core, asked for in time and by name."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import VitExplainError

MODULES = {
    "pyarrow": "pyarrow",
    "yaml": "pyyaml",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "jinja2": "jinja2",
    "filelock": "filelock",
}
"""Modules of the extra ``bench``, with the names under which they are installed."""


def require(*modules: str) -> None:
    """Checks that modules can be imported.

    Args:
        modules: keys of `MODULES`; all of them if none is given.

    Raises:
        VitExplainError: some are missing; the message names them and how to install them.
    """
    missing = [MODULES[module] for module in modules or MODULES if find_spec(module) is None]
    if missing:
        raise VitExplainError(
            f"benchmarks need {', '.join(missing)}, which cannot be imported; install with: "
            "pip install 'vitexplain[bench]'"
        )
