"""The images of a benchmark: which ones, in which chunks, and how a chunk is read for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from ..data.batches import ExampleBatch, load_examples
from ..data.entries import ExampleSequence
from ..errors import InputError
from ..keys import digest, example_digest
from ..preprocessing import Preprocessing
from .entries import SELECTIONS, DataEntry


@dataclass(frozen=True)
class Chunk:
    """Consecutive images that are computed and stored together.

    Attributes:
        places: where they are among the selected examples.
        names: theirs, in the same order.
        key: digest of their content and annotations.
    """

    places: range
    names: tuple[str, ...]
    key: str


class ImageSet:
    """The selected examples of a data set, with digests of their content.

    Every example is read once to know its content: a changed picture, mask or class makes other chunks.

    Args:
        examples: the data set.
        entry: what is selected of it.

    Attributes:
        examples: those selected.
        somewhere: which of ``labels``, ``masks``, ``boxes`` any of them has.
        labelled: whether all of them have classes.

    Raises:
        InputError: nothing is selected.
    """

    def __init__(self, examples: ExampleSequence, entry: DataEntry) -> None:
        places = range(len(examples))[SELECTIONS[entry.select]][: entry.limit]
        if not places:
            raise InputError(
                f"found {len(examples)} examples in {entry.format} and none selected, expected at least one"
            )
        self.examples = examples.select(places)
        self.labelled, somewhere = True, set()
        self._digests: list[str] = []
        for index in tqdm(range(len(places)), desc="reading", unit="image", disable=None, leave=False):
            try:
                example = self.examples[index]
            except InputError as error:  # reported when it is its turn
                self._digests.append(digest(self.examples.names[index], str(error)))
                continue
            self._digests.append(example_digest(example))
            found = {
                "labels": bool(example.labels),
                "masks": example.mask is not None,
                "boxes": example.boxes is not None,
            }
            somewhere |= {part for part, there in found.items() if there}
            self.labelled &= found["labels"]
        self.somewhere = frozenset(somewhere)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def key(self) -> str:
        """Digest of everything selected."""
        return digest(self._digests)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All images, `size` at a time."""
        for start in range(0, len(self), size):
            places = range(start, min(start + size, len(self)))
            own = slice(start, places.stop)
            yield Chunk(places, self.examples.names[own], digest(self._digests[own]))

    def load(self, chunk: Chunk, preprocessing: Preprocessing) -> tuple[ExampleBatch | None, Mapping[str, str]]:
        """The images of a chunk that can be read (None if there is none), and of the others why not, by name."""
        try:
            (batch,) = load_examples(self.examples.select(chunk.places), preprocessing, batch_size=len(chunk.places))
        except InputError:
            return None, {
                name: self._failure(place, preprocessing) or "it could not be read, but can be now; run again"
                for place, name in zip(chunk.places, chunk.names, strict=True)
            }
        return batch, {each.name: each.reason for each in batch.unreadable}

    def can_be_read(self, place: int, preprocessing: Preprocessing) -> bool:
        """Whether the image at a place can be read now."""
        return not self._failure(place, preprocessing)

    def _failure(self, place: int, preprocessing: Preprocessing) -> str:
        """Why an image cannot be read; empty if it can."""
        try:
            list(load_examples(self.examples.select([place]), preprocessing))
        except InputError as error:
            return str(error)
        return ""
