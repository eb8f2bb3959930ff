"""The results that a run leaves in a folder, and how they are written and read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..errors import InputError
from ..files import write_whole
from ..metrics.tally import Rows, own_statistics
from .extra import require
from .figures import FigureRow
from .store import Columns

if TYPE_CHECKING:
    import pyarrow as pa

RUN = "run.json"
_ROWS = "results.parquet"
_FIGURES = "figures.parquet"


@dataclass(frozen=True, eq=False)
class BenchResults:
    """Results of a benchmark.

    ::

        results = open_results("imagenet-bench")
        results.table(metric="deletion")  # figures with intervals and ranks
        results.rows(method="tokentm", statistic="energy")  # each image

    Attributes:
        folder: where they are.
        run: what was run: configuration, versions, digests, counts, costs, what was left out.
    """

    folder: Path
    run: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> BenchResults:
        """The results in a folder.

        Raises:
            InputError: there are none, or they cannot be read.
        """
        require("pyarrow")
        place = Path(folder)
        try:
            run = json.loads((place / RUN).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"found no finished results in {str(place)!r} ({RUN} missing); let a benchmark run into it to the end"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {str(place / RUN)!r}: {type(error).__name__}: {error}") from error
        return cls(place, run)

    def table(self, **columns: str) -> Any:
        """Figures: one row a model, metric, method and figure; columns as `FigureRow`.

        Args:
            **columns: values that columns must have, e.g. ``method="tokentm"``.

        Returns:
            A pandas frame where pandas is installed, else a list of mappings.
        """
        return _frame(self._read(_FIGURES, columns))

    def rows(self, **columns: str) -> Any:
        """Statistics of each image: one row a model, method, metric, image and statistic.

        Columns: ``model``, ``method``, ``metric``, ``image``, ``statistic``; ``value``, or for a statistic of several
        numbers ``values``; ``target``, the class explained, and ``target_probability``; ``prediction`` and
        ``probability``; ``label`` (-1 where unknown); of the map: ``broken``, ``constant``, ``tied``.

        Args:
            **columns: values that columns must have, e.g. ``statistic="energy"``.

        Returns:
            A pandas frame where pandas is installed, else a list of mappings.
        """
        return _frame(self._read(_ROWS, columns))

    def figures(self) -> list[FigureRow]:
        """The figures as objects, in the order of the configuration."""
        return [FigureRow(**row) for row in self._read(_FIGURES, {}).to_pylist()]

    def statistics(self, model: str, method: str, metric: str) -> Rows:
        """Statistics of each image by name, (n,) or (n, S), NaN where an image allowed none."""
        found = self._read(_ROWS, {"model": model, "method": method, "metric": metric})
        rows: Rows = {}
        for name in dict.fromkeys(found["statistic"].to_pylist()):
            import pyarrow.compute as pc

            part = found.filter(pc.equal(found["statistic"], name))
            single = part["values"].null_count == len(part)
            rows[name] = part["value"].to_numpy(zero_copy_only=False) if single else np.stack(part["values"].to_numpy())
        return rows

    def _read(self, name: str, columns: dict[str, str]) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        filters = [(column, "==", value) for column, value in columns.items()]
        try:
            return pq.read_table(self.folder / name, filters=filters or None, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {str(self.folder / name)!r}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, eq=False)
class Measured:
    """Statistics of one model, method and metric, with what is known of the images.

    Attributes:
        model: label.
        method: label.
        metric: label.
        images: ``image``, ``target``, … of the images that took part; see `predict`.
        rows: of `measure`.
    """

    model: str
    method: str
    metric: str
    images: Columns
    rows: Rows


def write_rows(folder: Path, measured: Iterator[Measured]) -> None:
    """Writes the statistics of each image.

    Raises:
        ExportError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, _rows_schema(), compression="zstd", write_page_checksum=True) as writer:
            for each in measured:
                for name, values in own_statistics(each.rows).items():
                    writer.write_table(_rows_table(each, name, values))

    write_whole(folder / _ROWS, write)


def write_figures(folder: Path, figures: Sequence[FigureRow]) -> None:
    """Writes the figures.

    Raises:
        ExportError: the file cannot be written.
    """
    import pyarrow as pa

    from ..files import write_parquet

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    schema = pa.schema(
        [(each.name, kinds[str(each.type).removesuffix(" | None")]) for each in dataclasses.fields(FigureRow)]
    )
    write_parquet(pa.Table.from_pylist([dataclasses.asdict(row) for row in figures], schema), folder / _FIGURES)


def _rows_schema() -> pa.Schema:
    import pyarrow as pa

    texts, integers = ("model", "method", "metric", "image", "statistic"), ("target", "prediction", "label")
    return pa.schema(
        [
            *((name, pa.string()) for name in texts),
            ("value", pa.float64()),
            ("values", pa.list_(pa.float64())),
            *((name, pa.int64()) for name in integers),
            ("target_probability", pa.float64()),
            ("probability", pa.float64()),
            ("broken", pa.bool_()),
            ("constant", pa.bool_()),
            ("tied", pa.float64()),
        ]
    )


def _rows_table(measured: Measured, statistic: str, values: Any) -> pa.Table:
    import pyarrow as pa

    count, schema = len(values), _rows_schema()
    same = {"model": measured.model, "method": measured.method, "metric": measured.metric, "statistic": statistic}
    columns: dict[str, Any] = {name: pa.array([text] * count, pa.string()) for name, text in same.items()}
    columns["value"] = values if values.ndim == 1 else pa.nulls(count, pa.float64())
    columns["values"] = (
        pa.array(list(values), pa.list_(pa.float64()))
        if values.ndim > 1
        else pa.nulls(count, schema.field("values").type)
    )
    columns |= {name: measured.images[name] for name in measured.images if name in schema.names}
    columns |= {name: measured.rows[name].astype(bool) for name in ("broken", "constant")}
    columns["tied"] = measured.rows["tied"]
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _frame(table: pa.Table) -> Any:
    return table.to_pandas() if find_spec("pandas") is not None else table.to_pylist()
