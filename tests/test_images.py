import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vitexplain.errors import InputError
from vitexplain.images import MAX_PIXELS, find_images, load_image


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def gradient(height: int = 5, width: int = 7) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 40, columns * 30, (rows + columns) * 20], axis=-1).astype(np.uint8)


def pixels(source: object, **options: int) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    assert not image.info
    return np.asarray(image)


class TestSources:
    def test_every_kind_of_source_gives_the_same_picture(self, tmp_path: Path) -> None:
        wanted = gradient()
        content = encoded(Image.fromarray(wanted), "PNG")
        path = tmp_path / "picture.png"
        path.write_bytes(content)
        sources = [path, str(path), content, bytearray(content), memoryview(content), wanted, Image.fromarray(wanted)]
        for source in [*sources, Image.open(io.BytesIO(content))]:
            np.testing.assert_array_equal(pixels(source), wanted)

    def test_arrays_of_grey_and_of_four_channels(self) -> None:
        grey = gradient()[..., 0]
        np.testing.assert_array_equal(pixels(grey), np.repeat(grey[..., None], 3, axis=-1))
        transparent = np.concatenate([gradient(), np.zeros((5, 7, 1), np.uint8)], axis=-1)
        assert (pixels(transparent) == 255).all()
        np.testing.assert_array_equal(pixels(gradient()[:, ::-1]), gradient()[:, ::-1])

    def test_the_source_stays_as_it_is(self) -> None:
        image = Image.fromarray(gradient())
        image.info["note"] = "mine"
        load_image(image).paste((0, 0, 0), (0, 0, 7, 5))
        assert image.info == {"note": "mine"}
        np.testing.assert_array_equal(np.asarray(image), gradient())

    @pytest.mark.parametrize(
        "array",
        [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(3)],
    )
    def test_other_arrays_are_refused_with_their_shape(self, array: np.ndarray) -> None:
        with pytest.raises(InputError, match=r"found an array of shape .*expected uint8"):
            load_image(array)

    def test_other_types_are_refused_by_name(self) -> None:
        with pytest.raises(InputError, match=r"builtins\.int"):
            load_image(3)  # type: ignore[arg-type]


class TestRefusals:
    def refused(self, source: object, *words: str, **options: int) -> None:
        with pytest.raises(InputError) as caught:
            load_image(source, **options)
        for word in words:
            assert word in str(caught.value)

    def test_files_that_are_no_pictures(self, tmp_path: Path) -> None:
        for content, found in [
            (b"%PDF-1.7 ...", "a PDF document"),
            (b"<!DOCTYPE html><p>404", "a web page"),
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            (b"just some words", "text starting"),
            (b"\0\1\2\3\4\5\6\7\x08", "data starting"),
            (b"\0\0\0\x18ftypheic\0\0\0\0", "pillow-heif"),
        ]:
            path = tmp_path / "holiday.jpg"
            path.write_bytes(content)
            self.refused(path, "holiday.jpg", found, "expected", "Convert it")
            self.refused(content, found)

    def test_missing_empty_folder_pipe_address_and_impossible_paths(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "missing.png", "missing.png", "check the path")
        self.refused(tmp_path, "is a folder", "find_images")
        (tmp_path / "empty.png").touch()
        self.refused(tmp_path / "empty.png", "empty.png", "0 bytes")
        self.refused(b"", "0 bytes")
        self.refused("https://example.org/cat.jpg", "web address", "Download")
        self.refused("a\0b.png", "cannot be opened")
        self.refused("x" * 5000, "cannot be opened")
        self.refused("", "cannot be opened")
        if hasattr(os, "mkfifo"):
            os.mkfifo(tmp_path / "pipe")
            self.refused(tmp_path / "pipe", "device or pipe")

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"])
    def test_truncated_files(self, file_format: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        try:
            content = encoded(Image.fromarray(noise), file_format)
        except (KeyError, OSError):
            pytest.skip(f"this Pillow does not write {file_format}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in (0.3, 0.6, 0.9):
                self.refused(content[: int(len(content) * part)], "xpected")

    def test_limit_is_checked_before_decoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        content = encoded(Image.new("RGB", (30, 20)), "PNG")
        assert load_image(content, max_pixels=600).size == (30, 20)

        def decode(*_: object) -> None:
            pytest.fail("decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
        self.refused(content, "30 x 20 = 600 pixels", "at most 599", max_pixels=599)

    @pytest.mark.parametrize("sides", [(20_000, 20_000), (12_000, 12_000)])
    def test_decompression_bombs(self, sides: tuple[int, int]) -> None:
        # a PNG header that promises far more than the file holds
        content = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
        content[16:24] = struct.pack(">II", *sides)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.refused(bytes(content), "too large")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.refused(bytes(content), "xpected", max_pixels=MAX_PIXELS)
        assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)

    def test_no_pixels(self) -> None:
        self.refused(Image.new("RGB", (0, 3)), "no pixels")

    def test_a_closed_image(self) -> None:
        image = Image.open(io.BytesIO(encoded(Image.new("RGB", (8, 8)), "PNG")))
        image.close()
        self.refused(image, "the image")


Image.init()
NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
SEEDS = [
    *(encoded(NOISE, name) for name in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "JPEG2000")),
    encoded(NOISE, "TIFF", compression="tiff_lzw"),
    encoded(NOISE.convert("CMYK"), "TIFF"),
    encoded(NOISE.convert("P"), "PNG", transparency=0),
    encoded(Image.fromarray(np.asarray(NOISE)[..., 0].astype(np.uint16) * 200), "PNG"),
    *(encoded(NOISE, name) for name in ("AVIF", "QOI") if name in Image.SAVE),
]


class TestFuzzing:
    """Whatever bytes come in: a picture or an `InputError`, never anything else."""

    def accept_or_refuse(self, content: bytes) -> None:
        with warnings.catch_warnings(), contextlib.suppress(InputError):
            warnings.simplefilter("ignore")
            assert load_image(content, max_pixels=1_000_000).mode == "RGB"

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=200))
    def test_random_bytes(self, content: bytes) -> None:
        self.accept_or_refuse(content)

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from([seed[:length] for seed in SEEDS for length in (2, 8, 12, 26)]), st.binary(max_size=300))
    def test_a_true_beginning_with_a_random_rest(self, start: bytes, rest: bytes) -> None:
        self.accept_or_refuse(start + rest)

    @settings(max_examples=300, deadline=None)
    @given(
        st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=8), st.floats(0, 1)
    )
    def test_flipped_bits_and_cuts(self, content: bytes, flips: list[tuple[float, int]], cut: float) -> None:
        damaged = bytearray(content)
        for place, mask in flips:
            # squared: most of what can go wrong is in the header
            damaged[int(place**2 * (len(damaged) - 1))] ^= mask
        self.accept_or_refuse(bytes(damaged))
        self.accept_or_refuse(bytes(damaged[: int(cut * len(damaged))]))


class TestFindImages:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        pictures = ("b.png", "a.JPG", ".hidden.png", ".cache/e.png", "sub/c.webp", "sub/deep/d.tif")
        for name in (*pictures, "notes.txt", "scan.dat"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "none").mkdir()
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def names(self, inputs: object) -> list[str]:
        return [path.as_posix() for path in find_images(inputs)]

    def test_folders_are_searched_in_order(self, folder: Path) -> None:
        assert self.names(["."]) == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tif"]
        assert find_images(folder)[0] == folder / "a.JPG"

    def test_links_to_folders_elsewhere_are_followed_and_circles_are_not(self, folder: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
        (elsewhere / "more").mkdir(parents=True)
        (elsewhere / "more" / "e.png").touch()
        for link, target in (("sub/linked", elsewhere), ("twice", elsewhere), ("self", folder), ("sub/up", tmp_path)):
            (folder / link).symlink_to(target)
        (elsewhere / "back").symlink_to(folder / "sub")
        (folder / "gone").symlink_to(folder / "nowhere")
        expected = ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tif", "sub/linked/more/e.png"]
        assert self.names(".") == expected

    def test_named_files_stay_whatever_their_suffix(self, folder: Path) -> None:
        assert self.names(["scan.dat", Path("b.png")]) == ["scan.dat", "b.png"]

    def test_patterns(self, folder: Path) -> None:
        assert self.names("*") == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tif"]
        assert self.names(["*.dat"]) == ["scan.dat"]
        assert self.names(["**/*.tif", "[ab].*"]) == ["sub/deep/d.tif", "a.JPG", "b.png"]

    def test_order_is_kept_and_duplicates_go(self, folder: Path) -> None:
        assert self.names(["sub", "b.png", ".", str(folder / "b.png")])[:3] == ["sub/c.webp", "sub/deep/d.tif", "b.png"]
        assert len(find_images(["sub", "b.png", ".", "./b.png"])) == 4

    def test_brackets_in_a_name_are_no_pattern(self, folder: Path) -> None:
        (folder / "x[1].png").touch()
        assert self.names(["x[1].png"]) == ["x[1].png"]

    @pytest.mark.parametrize("nothing", ["missing.png", "none", "*.gif"])
    def test_nothing_found_names_the_input(self, folder: Path, nothing: str) -> None:
        with pytest.raises(InputError, match="no images at") as caught:
            find_images(["b.png", nothing])
        assert repr(nothing) in str(caught.value)

    def test_results_are_left_out_unless_they_are_named(self, folder: Path) -> None:
        everything = find_images(folder)
        result = everything[0]
        for searched in (folder, folder / "**" / "*"):
            assert set(find_images(searched, leave_out=lambda file: file == result)) == {*everything[1:]}
        assert find_images([result, folder], leave_out=lambda file: file == result) == everything
        with pytest.raises(InputError, match="what is there are results of earlier runs, which are left out"):
            find_images(folder, leave_out=lambda _: True)

    def test_no_inputs(self) -> None:
        with pytest.raises(InputError, match="no images given"):
            find_images([])
