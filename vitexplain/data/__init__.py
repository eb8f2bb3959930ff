"""Data sets with classes, masks and boxes."""

from .batches import ExampleBatch, ExampleView, Unreadable, load_examples, view_example
from .catalogue import DatasetInfo, dataset_info, list_datasets, open_dataset, register_dataset
from .entries import Examples, ExampleSequence
from .example import Example
from .selection import coverage, covering_less_than, every_other, first, shuffled

__all__ = [
    "DatasetInfo",
    "Example",
    "ExampleBatch",
    "ExampleSequence",
    "ExampleView",
    "Examples",
    "Unreadable",
    "coverage",
    "covering_less_than",
    "dataset_info",
    "every_other",
    "first",
    "list_datasets",
    "load_examples",
    "open_dataset",
    "register_dataset",
    "shuffled",
    "view_example",
]
