import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from vitexplain.images import load_image


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


class TestModes:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr", "HSV", "RGBX"])
    def test_plain_modes_follow_pillow(self, mode: str) -> None:
        image = Image.fromarray(gradient()).convert(mode)
        np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
    def test_transparency_shows_white(self, mode: str) -> None:
        image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
        image.putpixel((2, 0), (0, 0, 0, 51))
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
        np.testing.assert_array_equal(pixels(image)[0, :, 0], [0, 255, 204])

    def test_transparency_of_palette_with_alpha(self) -> None:
        image = Image.new("PA", (3, 1))
        for x, alpha in enumerate((255, 0, 51)):
            image.putpixel((x, 0), (0, alpha))
        np.testing.assert_array_equal(pixels(image)[0, :, 0], [0, 255, 204])

    @pytest.mark.parametrize("file_format", ["PNG", "GIF"])
    def test_transparent_palette_entry(self, file_format: str) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        content = encoded(image, file_format, transparency=0)
        np.testing.assert_array_equal(pixels(content)[0], [[255, 255, 255], [200, 100, 50]])

    def test_transparent_colour_of_grey_and_rgb_png(self) -> None:
        grey = Image.fromarray(np.array([[7, 9]], np.uint8))
        np.testing.assert_array_equal(pixels(encoded(grey, "PNG", transparency=7))[0, :, 0], [255, 9])
        color = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
        np.testing.assert_array_equal(pixels(encoded(color, "PNG", transparency=(1, 2, 3)))[0], [[255] * 3, [1, 2, 4]])

    @pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled_not_clipped(self, file_format: str) -> None:
        deep = np.array([[0, 257, 128 * 257, 40000, 65535]], np.uint16)
        content = encoded(Image.fromarray(deep), file_format)
        np.testing.assert_array_equal(pixels(content)[0, :, 0], np.rint(deep[0] / 257))

    def test_16_bit_grey_png_with_a_transparent_value(self) -> None:
        image = Image.fromarray(np.array([[1000, 1001]], np.uint16))
        image.info["transparency"] = 1000  # as Pillow reads it from the file; not every version can write it
        np.testing.assert_array_equal(pixels(image)[0, :, 0], [255, 4])

    def test_32_bit_integers(self) -> None:
        within_16_bits = Image.fromarray(np.array([[0, 65535, 257]], np.int32))
        np.testing.assert_array_equal(pixels(within_16_bits)[0, :, 0], [0, 255, 1])
        beyond = Image.fromarray(np.array([[-100_000, 0, 100_000]], np.int32))
        np.testing.assert_array_equal(pixels(beyond)[0, :, 0], [0, 128, 255])

    @pytest.mark.parametrize(
        ("values", "wanted"),
        [
            ([0.0, 0.5, 1.0], [0, 128, 255]),
            ([0.2, 0.2, 0.2], [51, 51, 51]),
            ([0.0, 100.4, 255.0], [0, 100, 255]),
            ([-1000.0, 0.0, 1000.0], [0, 128, 255]),
            ([-3.0, -3.0, -3.0], [0, 0, 0]),
            ([np.nan, 1.0, np.inf], [255, 255, 255]),
            ([np.nan, np.nan, np.nan], [0, 0, 0]),
            ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ],
    )
    def test_floating_point_tiff(self, values: list[float], wanted: list[int]) -> None:
        content = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
        np.testing.assert_array_equal(pixels(content)[0, :, 0], wanted)

    def test_cmyk_jpeg_is_not_inverted(self) -> None:
        content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
        red, green, blue = pixels(content)[8, 8].astype(int)
        assert red > 240
        assert green < 15
        assert blue < 15

    def test_cmyk_with_a_broken_profile_falls_back(self) -> None:
        image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
        for profile in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
            content = encoded(image, "TIFF", icc_profile=profile)
            np.testing.assert_array_equal(pixels(content), np.asarray(image.convert("RGB")))

    def test_a_usable_profile_is_applied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # no CMYK profile may be shipped here; what counts is that the conversion is asked for and its result taken
        def convert(image: Image.Image, *_: object, outputMode: str) -> Image.Image:  # noqa: N803
            assert image.mode == "CMYK"
            return Image.new(outputMode, image.size, (1, 2, 3))

        monkeypatch.setattr(ImageCms, "profileToProfile", convert)
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        content = encoded(Image.new("CMYK", (4, 4)), "TIFF", icc_profile=profile)
        assert (pixels(content) == [1, 2, 3]).all()

    def test_lab(self) -> None:
        white = Image.new("LAB", (2, 2), (255, 128, 128))
        assert (pixels(white) >= 250).all()

    @pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_first_frame_of_an_animation(self, file_format: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
        lossless = {"lossless": True} if file_format == "WEBP" else {}
        content = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **lossless)
        assert (pixels(content) == [255, 0, 0]).all()

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "ICO", "JPEG2000"])
    def test_lossless_formats(self, file_format: str) -> None:
        picture = np.repeat(np.repeat(gradient(4, 4), 8, axis=0), 8, axis=1)
        options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(32, 32)]}}.get(file_format, {})
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(picture), file_format, **options)), picture)


class TestRotation:
    # how the upright picture was turned before it was stored under each orientation
    STORED = {  # noqa: RUF012
        1: lambda upright: upright,
        2: lambda upright: upright[:, ::-1],
        3: lambda upright: upright[::-1, ::-1],
        4: lambda upright: upright[::-1],
        5: lambda upright: upright.transpose(1, 0, 2),
        6: lambda upright: np.rot90(upright, 1),
        7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
        8: lambda upright: np.rot90(upright, -1),
    }

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "JPEG"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_all_orientations(self, orientation: int, file_format: str) -> None:
        upright = np.repeat(np.repeat(gradient(2, 3), 16, axis=0), 16, axis=1)
        stored = Image.fromarray(np.ascontiguousarray(self.STORED[orientation](upright)))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(file_format, {})
        read = pixels(encoded(stored, file_format, exif=exif, **options))
        assert read.shape == upright.shape
        np.testing.assert_allclose(read.astype(int), upright, atol=3 if file_format == "JPEG" else 0)

    def test_reading_twice_rotates_once(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        once = load_image(encoded(Image.fromarray(gradient()), "PNG", exif=exif))
        assert once.size == (5, 7)
        np.testing.assert_array_equal(pixels(once), np.asarray(once))

    @pytest.mark.parametrize(
        "value", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0" + b"\xff" * 40]
    )
    def test_a_broken_exif_block_does_not_cost_the_picture(self, value: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(pixels(encoded(Image.fromarray(gradient()), "PNG", exif=value)), gradient())
