"""What a training knows its data by, so that it is not resumed with other data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import Tensor

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


def images_digest(batches: Iterable[Tensor]) -> str:
    """SHA-256 of the images of some batches (B, channels, H, W), in whatever order they come."""
    images = (image.detach().cpu().float().contiguous() for batch in batches for image in batch)
    each = sorted(
        hashlib.sha256(f"{tuple(image.shape)}".encode() + image.numpy().tobytes()).digest() for image in images
    )
    return hashlib.sha256(b"".join(each)).hexdigest()
