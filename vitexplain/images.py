"""Reading pictures: one function that shows a model what a person would see in a viewer.

Every source ends as an 8-bit RGB `PIL.Image.Image`: rotated as its EXIF tag says, transparency over white, deep
greyscale brought down to 8 bits instead of being clipped. Whatever is wrong with a file comes out as one `InputError`.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from vitexplain.errors import InputError
from vitexplain.image_modes import to_rgb

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "ImageSource", "find_images", "load_image"]

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]"
"""Everything `load_image` reads."""

MAX_PIXELS = 178_956_970
"""Largest picture read unless asked otherwise: where Pillow, too, stops by default (about 13,000 x 13,000)."""

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp"}
)
"""Suffixes by which `find_images` recognises pictures in folders (lower case)."""

# Raster formats with a reliable signature. Pillow knows more, among them some that it accepts without any signature and
# one (EPS) for which it starts another program. HEIF is there once the user has registered a plug-in for it.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI", "ICO", "HEIF")

_SIGNATURES = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer (fetch the file itself with 'git lfs pull')"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x93numpy", "a NumPy array file"),
)


def load_image(source: ImageSource, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Reads one picture as 8-bit RGB.

    EXIF rotation is applied; transparency is laid over white; 16-bit greyscale is divided by 257; floating point is
    read as [0, 1] or [0, 255] where it lies within, and stretched from its minimum to its maximum otherwise; CMYK goes
    through its embedded colour profile where it has a usable one. Profiles of RGB pictures are left aside, as training
    pipelines do. Of an animation the first frame is taken.

    Args:
        source: a path, the bytes of a file, a Pillow image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
        max_pixels: largest width x height accepted, checked from the header before decoding; None for no limit but
            Pillow's own.

    Returns:
        A new image in mode RGB that carries no metadata.

    Raises:
        InputError: the source is missing, no picture, broken, cut short or too large.
    """
    name = _name(source)
    with contextlib.ExitStack() as stack:
        try:
            image = _open(source, name, stack)
            _check_size(image.size, name, max_pixels)
            image.load()
            _check_size(image.size, name, max_pixels)
            return to_rgb(image)
        except InputError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(
                f"{name} is too large: {error} Expected a picture within Pillow's limit (PIL.Image.MAX_IMAGE_PIXELS); "
                f"scale it down first."
            ) from error
        except UnidentifiedImageError as error:
            raise InputError(
                f"{name} is not a picture that can be read: found {_sniff(source)}, expected one of "
                f"{', '.join(_readable())}. Convert it to PNG or JPEG."
            ) from error
        except MemoryError as error:
            raise InputError(f"{name} does not fit into memory when decoded. Scale the picture down first.") from error
        except Exception as error:  # decoders raise nearly anything on broken content
            raise InputError(
                f"{name} is broken or cut short: {type(error).__name__}: {error}. Expected a complete picture; get a "
                f"fresh copy of the file or save it anew."
            ) from error


def find_images(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    leave_out: Callable[[Path], bool] | None = None,
) -> list[Path]:
    """Lists the picture files that a user means by files, folders and glob patterns.

    Files that are named stay whatever their suffix; folders are searched recursively for `IMAGE_SUFFIXES`, in sorted
    order and without what is hidden, links to folders elsewhere too; a pattern keeps pictures, or what its own suffix
    says (``"scans/*.dat"``).

    Args:
        inputs: one or several files, folders or patterns (``*``, ``?``, ``[...]``, ``**``).
        leave_out: which of the files found in folders and by patterns are results, not images; None for none of them.
            Files that are named stay.

    Returns:
        The files in the order of the inputs, each once.

    Raises:
        InputError: no inputs, or one of them matches nothing.
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    if not inputs:
        raise InputError("no images given: expected at least one file, folder or pattern such as 'photos/*.jpg'.")
    found: dict[str, Path] = {}
    for entry in inputs:
        text = os.path.expanduser(os.fsdecode(entry))
        everything = list(_expand(text))
        named = leave_out is None or os.path.isfile(text)
        matches = everything if named else list(filterfalse(leave_out, everything))
        if not matches:
            if everything:
                reason = "what is there are results of earlier runs, which are left out"
            elif os.path.isdir(text):
                reason = "the folder holds none"
            else:
                reason = "nothing matches the pattern" if glob.has_magic(text) else "no such file or folder"
            raise InputError(
                f"no images at {text!r}: {reason}. Expected a file, a folder with pictures "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) or a matching pattern; check the spelling (current folder: "
                f"{os.getcwd()})."
            )
        for match in matches:
            found.setdefault(os.path.normcase(os.path.abspath(match)), match)
    return list(found.values())


def _expand(text: str) -> Iterator[Path]:
    if os.path.isdir(text):
        yield from _walk(text)
    elif os.path.exists(text):
        yield Path(text)
    elif glob.has_magic(text):
        spelled = os.path.splitext(text)[1]
        any_suffix = bool(spelled) and not glob.has_magic(spelled)
        for match in sorted(glob.glob(text, recursive=True)):
            if os.path.isdir(match):
                yield from _walk(match)
            elif any_suffix or Path(match).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(match)


def _walk(folder: str) -> Iterator[Path]:
    yield from sorted(_files_below(folder, []))


def _files_below(folder: str, searched: list[str]) -> Iterator[Path]:
    """The pictures in a folder and below, also behind links that lead out of what was searched, each such once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename!r} cannot be searched: {error.strerror}.") from error

    searched.append(os.path.realpath(folder))
    links: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # where it goes next
        links += filter(os.path.islink, (os.path.join(parent, name) for name in folders))
        visible = (name for name in names if not name.startswith("."))
        yield from (Path(parent, name) for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    for link in sorted(links):
        place = os.path.join(os.path.realpath(link), "")
        known = [os.path.join(each, "") for each in searched]
        if not any(place.startswith(each) or each.startswith(place) for each in known):  # nor in a circle
            yield from _files_below(link, searched)


def _name(source: Any) -> str:
    if isinstance(source, Image.Image):
        return f"the image {getattr(source, 'filename', '')!r}" if getattr(source, "filename", "") else "the image"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the data ({len(source)} bytes)"
    return repr(os.fsdecode(source)) if isinstance(source, (str, os.PathLike)) else "the array"


def _open(source: Any, name: str, stack: contextlib.ExitStack) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        if not content:
            raise InputError("the data is empty (0 bytes): expected the content of a picture file.")
        return _identify(io.BytesIO(content), stack)
    if isinstance(source, (str, os.PathLike)):
        handle = stack.enter_context(_open_file(os.path.expanduser(os.fsdecode(source)), name))
        return _identify(handle, stack)
    raise InputError(
        f"cannot read a picture from {type(source).__module__}.{type(source).__qualname__}: expected a path, bytes, a "
        f"Pillow image or a uint8 array (H, W, 3)."
    )


def _identify(handle: IO[bytes], stack: contextlib.ExitStack) -> Image.Image:
    image = Image.open(handle, formats=_readable())
    stack.callback(image.close)
    return image


def _open_file(path: str, name: str) -> io.BufferedReader:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{name} is a folder, expected a picture file. List its pictures with find_images().")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{name} is a device or pipe, expected a picture file. Pass its content as bytes.")
        if not status.st_size:
            raise InputError(f"{name} is empty (0 bytes), expected a picture. Copy or download the file again.")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if "://" in path:
            raise InputError(f"{name} is a web address, expected a file. Download it first.") from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name} cannot be opened: {reason}. Expected a picture file; check the path (current folder: "
            f"{os.getcwd()})."
        ) from error


def _readable() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _sniff(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        with open(os.path.expanduser(os.fsdecode(source)), "rb") as handle:
            start = handle.read(512)
    else:
        start = bytes(source)[:512]
    lowered = start.lstrip().lower()
    for signature, description in _SIGNATURES:
        if lowered.startswith(signature.lower()):
            return description
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheif"):
        return "an HEIF photo (pip install pillow-heif and call pillow_heif.register_heif_opener())"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        return f"text starting {start[:24]!r}"
    return f"data starting {start[:8]!r}"


def _check_size(size: tuple[int, int], name: str, max_pixels: int | None) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels ({width} x {height}), expected at least 1 x 1.")
    if max_pixels is not None and width * height > max_pixels:
        raise InputError(
            f"{name} has {width} x {height} = {width * height:,} pixels, expected at most {max_pixels:,}. Scale it "
            f"down first, or raise max_pixels if you trust the file."
        )


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        raise InputError(
            f"found an array of shape {array.shape} and type {array.dtype}, expected uint8 (H, W), (H, W, 3) or "
            f"(H, W, 4), at least one pixel. Move channels last; multiply values in [0, 1] by 255 and cast."
        )
    return Image.fromarray(np.ascontiguousarray(array))
