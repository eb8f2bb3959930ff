"""What an export needs beyond the core, asked for in time and by name."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from ..errors import VitExplainError

_EXTRAS = {"zarr": "export", "pyarrow": "export", "filelock": "export", "h5py": "export", "ray": "ray"}


def require(*modules: str) -> None:
    """Checks that modules can be imported.

    Raises:
        VitExplainError: some are missing; the message names them and the extras that bring them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(sorted({_EXTRAS[module] for module in missing}))
        newer = " (Zarr 3 needs Python 3.11 or newer)" if "zarr" in missing and sys.version_info < (3, 11) else ""
        raise VitExplainError(
            f"this export needs {', '.join(missing)}, which cannot be imported; install with: "
            f"pip install 'vitexplain[{extras}]'{newer}"
        )
