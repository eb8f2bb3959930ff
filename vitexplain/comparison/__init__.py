"""Side by side: methods, classes and models on the same images, as a picture, a table and a report."""

from .comparison import Case, Comparison
from .run import compare

__all__ = ["Case", "Comparison", "compare"]
