"""What a training knows its data by, so that it is not resumed with other data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..data.entries import ExampleSequence
from ..data.example import Example


def examples_digest(*parts: Sequence[Example]) -> str:
    """SHA-256 of what is known of sequences of examples without opening a file.

    Of readers' examples that is the names; of lists and tuples the names, the labels, and the masks and boxes. Of other
    sequences, which may open files for every example, it is the number.
    """
    digest = hashlib.sha256()
    for examples in parts:
        listed = examples if isinstance(examples, list | tuple) else ()
        names = examples.names if isinstance(examples, ExampleSequence) else (str(len(examples)),)
        lines = (str(len(names)), *names, *(f"{each.name} {each.labels}" for each in listed))
        digest.update("\n".join(lines).encode("utf-8", "backslashreplace"))
        for each in listed:
            for array in (each.mask, each.boxes):
                if array is not None:
                    digest.update(f"{array.dtype} {array.shape}".encode())
                    digest.update(array.tobytes())
    return digest.hexdigest()
