"""Makes a source checkout importable without installing it.

`methods/` and `benchmarks/` sit at the top of the repository, where a newcomer finds them. A built wheel holds them
inside the package (`package_dir` in setup.cfg); a checkout does not, so there a finder looks next door.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
NEIGHBOURS = frozenset({"vitexplain.methods", "vitexplain.benchmarks"})


class _NeighbourFinder:
    """Finds exactly the packages in `NEIGHBOURS`, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in NEIGHBOURS else None


def link_neighbours() -> None:
    """Adds the finder if this file is in a checkout; does nothing in an installed wheel.

    It goes to the front: behind the finder of an editable install of another checkout, the core of one tree would
    load the methods of the other.
    """
    in_checkout = (ROOT / "setup.cfg").is_file() and (ROOT / "methods").is_dir()
    if in_checkout and _NeighbourFinder not in sys.meta_path:
        sys.meta_path.insert(0, _NeighbourFinder)
