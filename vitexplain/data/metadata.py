"""Metadata files of data sets: every error names the file, the line or record, and what was expected there."""

from __future__ import annotations

import csv
import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

from ..errors import InputError
from .entries import Box

_TOO_DEEP = (ValueError, RecursionError)  # JSON and text decoding raise children of ValueError


@dataclass(frozen=True)
class Record:
    """One record of a metadata file, which knows where it stands.

    Attributes:
        file: the metadata file.
        place: where in it, e.g. ``"line 3"``; empty for the whole file.
        content: its fields; in text files all are text.
    """

    file: Path
    place: str
    content: Mapping[str, Any]

    def fault(self, found: str, expected: str) -> InputError:
        """An error about this record."""
        place = f", {self.place}" if self.place else ""
        return InputError(f"{str(self.file)!r}{place}: found {found}, expected {expected}")

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.content.get(key) is not None

    def value(self, key: str, expected: str) -> Any:
        """The value of a field that must be there."""
        if key not in self.content:
            known = ", ".join(map(str, list(self.content)[:8])) or "nothing"
            raise self.fault(f"no {key!r} (but {known})", expected)
        return self.content[key]

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.value(key, "text")
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(key, "text")
        return value.strip()

    def whole(self, key: str, minimum: int | None = None, maximum: int | None = None) -> int:
        """A whole number, or text that is one."""
        limits = [f"{sign} {limit}" for sign, limit in ((">=", minimum), ("<=", maximum)) if limit is not None]
        expected = " ".join(["a whole number", " and ".join(limits)]).rstrip()
        value = self.value(key, expected)
        try:
            number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None or (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
            raise self._wrong(key, expected)
        return number

    def flag(self, key: str) -> bool:
        """0 or 1."""
        return bool(self.whole(key, 0, 1))

    def number(self, key: str) -> float:
        """A finite number, or text that is one."""
        return _number(self.value(key, "a number"), lambda: self._wrong(key, "a number"))

    def sequence(self, key: str) -> list[Any]:
        """A list."""
        value = self.value(key, "a list")
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def records(self, key: str) -> list[Record]:
        """A list of objects."""
        return _records(self.file, f"{self.place} {key}".strip(), self.sequence(key))

    def path(self, key: str, folder: Path) -> Path:
        """A file below a folder; whatever would lead out of it is refused."""
        name = self.text(key)
        try:
            return inside(folder, name)
        except ValueError as error:
            raise self._wrong(key, f"a path inside {str(folder)!r}: not absolute, without '..'") from error

    def box(self, values: object, width_and_height: bool = False) -> Box:
        """A box from four numbers: two corners, or one corner with width and height."""
        expected = "x, y, width, height" if width_and_height else "x0, y0, x1, y1 with x0 < x1 and y0 < y1"

        def wrong() -> InputError:
            return self.fault(f"the box {reprlib.repr(values)}", f"four numbers {expected}, width and height above 0")

        if not isinstance(values, list | tuple) or len(values) != 4:
            raise wrong()
        x0, y0, x1, y1 = (_number(value, wrong) for value in values)
        if width_and_height:
            x1, y1 = x0 + x1, y0 + y1
        if x0 >= x1 or y0 >= y1:
            raise wrong()
        return x0, y0, x1, y1

    def _wrong(self, key: str, expected: str) -> InputError:
        return self.fault(f"{key}={reprlib.repr(self.content[key])}", expected)


def inside(folder: Path, name: str) -> Path:
    """The file that metadata names, below a folder. Links that lie there are followed: the folder's owner made them.

    Raises:
        ValueError: the name is absolute, has a drive or climbs up.
    """
    name = name.replace("\\", "/")  # metadata is written on Windows, too
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or PureWindowsPath(name).drive:
        raise ValueError(f"{name!r} leads out of the folder")
    return folder / path


def read_columns(file: Path, columns: Sequence[str], separator: str | None = None) -> list[Record]:
    """The lines of a text file with so many fields each; empty lines and lines that begin with ``#`` are skipped.

    Args:
        file: the file.
        columns: names of the fields.
        separator: what stands between them; None for white space.

    Raises:
        InputError: the file cannot be read, or a line has another number of fields.
    """
    return [
        _row(file, number, columns, [field.strip() for field in line.split(separator)])
        for number, line in enumerate(_text(file).splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]


def read_csv(file: Path, columns: Sequence[str]) -> list[Record]:
    """The rows of a CSV file with a header that names at least these columns.

    Raises:
        InputError: the file cannot be read, has another header, or a row has another number of fields.
    """
    try:
        rows = [(number, row) for number, row in _csv_rows(file) if row]
    except csv.Error as error:
        raise InputError(f"{str(file)!r} is no CSV ({error}); expected the columns {','.join(columns)}") from error
    header = [field.strip() for field in rows[0][1]] if rows else []
    if not set(columns) <= set(header):
        raise InputError(
            f"{str(file)!r}, line 1: found the columns {','.join(header) or 'none'}, expected {','.join(columns)}"
        )
    return [_row(file, number, header, row) for number, row in rows[1:]]


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(_text(file))
    except _TOO_DEEP as error:
        raise InputError(f"{str(file)!r} is no JSON ({error}); expected a complete file, get a fresh copy") from error


def read_object(file: Path) -> Record:
    """A JSON file that holds one object.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{str(file)!r}: found a JSON {type(content).__name__}, expected an object")
    return Record(file, "", content)


def read_records(file: Path) -> list[Record]:
    """A JSON file that holds a list of objects.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    content = read_json(file)
    if not isinstance(content, list):
        raise InputError(f"{str(file)!r}: found a JSON {type(content).__name__}, expected a list of objects")
    return _records(file, "", content)


def read_xml(file: Path) -> ElementTree.Element:
    """The root of an XML file without entity definitions.

    Raises:
        InputError: it cannot be read, or defines entities.
    """
    text = _text(file)
    if "<!" in text.replace("<!--", "").replace("<![CDATA[", ""):  # entities can be made to grow without end
        raise InputError(f"{str(file)!r}: found a document type declaration, expected plain XML; remove it")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"{str(file)!r} is no XML ({error}); expected a complete file, get a fresh copy") from error


def _records(file: Path, prefix: str, entries: Sequence[Any]) -> list[Record]:
    records = []
    for index, entry in enumerate(entries):
        place = f"{prefix}[{index}]" if prefix else f"record {index}"
        if not isinstance(entry, dict):
            raise Record(file, place, {}).fault(reprlib.repr(entry), "an object")
        records.append(Record(file, place, entry))
    return records


def _row(file: Path, number: int, columns: Sequence[str], fields: Sequence[str]) -> Record:
    if len(fields) != len(columns):
        raise Record(file, f"line {number}", {}).fault(
            f"{len(fields)} fields ({reprlib.repr(' '.join(fields))})", f"{len(columns)}: {', '.join(columns)}"
        )
    return Record(file, f"line {number}", dict(zip(columns, fields, strict=True)))


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_text(file).splitlines(), strict=True)
    for row in reader:
        yield reader.line_num, row


def _number(value: object, wrong: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise wrong()
    return number


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(file)!r} cannot be read ({reason}); expected a metadata file in UTF-8 there") from error
