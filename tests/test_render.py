import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch.nn import functional

from vitexplain.colormaps import SIGNED_COLORMAP, UNSIGNED_COLORMAP, color_table
from vitexplain.device_painting import paint, paint_over
from vitexplain.errors import ExportError, InputError, OptionError, UnknownNameError
from vitexplain.render import COLORMAPS, colourise, contours, normalise, overlay, save_png, upsample

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)
MAPS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    elements=st.one_of(ANY_FLOAT, st.floats(-10, 10, width=32)),
)


def photographs(count: int = 2, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


class TestUpsample:
    @pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
    def test_equals_interpolate(self, mode: Any) -> None:
        scores = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
        options = {} if mode == "nearest" else {"align_corners": False}
        wanted = functional.interpolate(scores[None, None], size=(4, 4), mode=mode, **options)[0, 0]
        assert torch.equal(upsample(scores, (4, 4), mode), wanted)

    def test_known_bilinear_row(self) -> None:
        enlarged = upsample(torch.tensor([[0, 4]]), (1, 4))
        assert enlarged.tolist() == [[0.0, 1.0, 3.0, 4.0]]

    def test_nearest_patches_are_centred(self) -> None:
        assert upsample(torch.tensor([[1.0, 2.0, 3.0]]), (1, 5), "nearest").tolist() == [[1, 1, 2, 3, 3]]

    @pytest.mark.parametrize("leading", [(), (2,), (2, 3), (0,)])
    def test_leading_axes_and_types(self, leading: tuple[int, ...]) -> None:
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
            enlarged = upsample(torch.zeros(*leading, 3, 5, dtype=dtype), (12, 10))
            assert enlarged.shape == (*leading, 12, 10)
            assert enlarged.dtype == torch.float32

    def test_refusals(self) -> None:
        with pytest.raises(OptionError, match="'cubic', expected"):
            upsample(torch.zeros(2, 2), (4, 4), "cubic")  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="size"):
            upsample(torch.zeros(2, 2), (0, 4))
        for shape in ((4,), (2, 0, 3)):
            with pytest.raises(InputError, match="expected"):
                upsample(torch.zeros(*shape), (4, 4))


class TestNormalise:
    @settings(deadline=None)
    @given(MAPS, st.booleans(), st.sampled_from(["map", "shared", (-1.0, 2.0)]), st.sampled_from([100, 99, 60]))
    def test_always_within_zero_and_one(self, maps: np.ndarray, signed: bool, scale: Any, percentile: float) -> None:
        scaled = normalise(torch.from_numpy(maps), signed, scale, percentile)
        assert scaled.shape == maps.shape
        assert scaled.dtype == torch.float32
        assert torch.isfinite(scaled).all()
        assert scaled.min() >= 0
        assert scaled.max() <= 1

    @settings(deadline=None)
    @given(MAPS)
    def test_order_is_kept(self, maps: np.ndarray) -> None:
        for signed in (False, True):
            scaled = normalise(torch.from_numpy(maps), signed).numpy()
            for before, after in zip(np.nan_to_num(maps.clip(-8e37, 8e37)), scaled, strict=True):
                ranked = after.ravel()[np.argsort(before, axis=None)]
                assert (np.diff(ranked) >= 0).all()

    @settings(deadline=None)
    @given(MAPS)
    def test_each_map_is_scaled_alone_unless_shared(self, maps: np.ndarray) -> None:
        batch = torch.from_numpy(maps)
        assert torch.equal(normalise(batch), torch.cat([normalise(one[None]) for one in batch]))
        tall = normalise(batch.reshape(1, -1, batch.shape[-1]))
        assert torch.equal(normalise(batch, scale="shared").flatten(), tall.flatten())

    def test_unsigned_ends_at_zero_and_one(self) -> None:
        assert normalise(torch.tensor([[2.0, 3.0, 6.0]])).tolist() == [[0.0, 0.25, 1.0]]

    def test_signed_zero_is_the_middle(self) -> None:
        assert normalise(torch.tensor([[-1.0, 0.0, 4.0]]), signed=True).tolist() == [[0.375, 0.5, 1.0]]

    @pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e30, 1e-40, float("nan"), float("inf")])
    def test_constant_maps(self, value: float) -> None:
        constant = torch.full((2, 3, 4), value)
        assert (normalise(constant) == 0).all()
        assert (normalise(constant, signed=True) == 0.5).all()

    def test_rounding_noise_is_no_contrast(self) -> None:
        almost = torch.full((1, 2, 2), 0.1)
        almost[0, 0, 0] = torch.nextafter(almost[0, 0, 0], torch.tensor(1.0))
        assert (normalise(almost) == 0).all()

    def test_nan_does_not_spread(self) -> None:
        maps = torch.tensor([[float("nan"), 0.0, 1.0, 2.0]])
        assert normalise(maps).tolist() == [[0.0, 0.0, 0.5, 1.0]]

    def test_given_range_and_percentile(self) -> None:
        ramp = torch.arange(101.0)[None]
        assert normalise(ramp, scale=(0, 50))[0, [0, 25, 50, 100]].tolist() == [0, 0.5, 1, 1]
        assert normalise(ramp, signed=True, scale=(-200, 50))[0, [0, 100]].tolist() == [0.5, 0.75]
        outlier = ramp.clone()
        outlier[0, -1] = 1e6
        assert normalise(outlier, percentile=99)[0, 50] == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(normalise(ramp, percentile=97.5), ((ramp - 2.5) / 95).clamp(0, 1), rtol=0, atol=1e-6)

    def test_an_empty_batch(self) -> None:
        assert normalise(torch.zeros(0, 3, 4)).shape == (0, 3, 4)

    @pytest.mark.parametrize(
        "options",
        [{"percentile": 50}, {"percentile": 101}, {"scale": "batch"}, {"scale": (1, 1)}, {"scale": (0, np.nan)}],
    )
    def test_refusals(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match="expected"):
            normalise(torch.zeros(1, 2, 2), **options)


class TestColourise:
    @pytest.mark.parametrize("name", COLORMAPS)
    def test_ends_of_every_table(self, name: str) -> None:
        painted = colourise(torch.tensor([[[0.0, 1.0]]]), name)
        assert painted.shape == (1, 1, 2, 3)
        assert painted.dtype == np.uint8
        np.testing.assert_array_equal(painted[0, 0], color_table(name)[[0, 255]])

    def test_inferno_is_rgb(self) -> None:
        red, _, blue = color_table("inferno")[160].astype(int)
        assert red > 2 * blue

    @pytest.mark.parametrize("name", ["inferno", "magma", "viridis", "cividis", "plasma", "grey"])
    def test_lightness_rises(self, name: str) -> None:
        grey = color_table(name).astype(float) @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(np.convolve(grey, np.ones(16) / 16, "valid")) > 0).all()

    @pytest.mark.parametrize(("name", "middle"), [("blue_white_red", (200, 256)), ("blue_black_red", (0, 60))])
    def test_diverging_tables_are_neutral_in_the_middle(self, name: str, middle: tuple[int, int]) -> None:
        center = colourise(np.full((1, 1), 0.5), name)[0, 0].astype(int)
        assert np.ptp(center) <= 3
        assert middle[0] <= center[0] < middle[1]
        blue, red = color_table(name)[[0, 255]].astype(int)
        assert blue[2] > blue[0] + 60
        assert red[0] > red[2] + 60

    def test_values_outside_and_nan(self) -> None:
        painted = colourise(np.array([[-3.0, np.nan, np.inf]]), "grey")
        assert painted[0, :, 0].tolist() == [0, 0, 255]

    def test_arrays_that_torch_cannot_share(self) -> None:
        ramp = np.linspace(0, 1, 256)[None]
        ramp.setflags(write=False)
        np.testing.assert_array_equal(colourise(ramp)[0], color_table("inferno"))
        np.testing.assert_array_equal(colourise(ramp[:, ::-1])[0], color_table("inferno")[::-1])

    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownNameError, match=r"did you mean 'viridis'.*inferno"):
            colourise(np.zeros((2, 2)), "virdis")

    def test_tables_cannot_be_changed(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            color_table("jet")[0] = 0


class TestOverlay:
    @pytest.mark.parametrize("mode", ["weighted", "blend"])
    @pytest.mark.parametrize("signed", [False, True])
    def test_alpha_zero_is_the_photograph(self, mode: Any, signed: bool) -> None:
        pictures = photographs()
        heat = torch.rand(2, 6, 9)
        np.testing.assert_array_equal(overlay(pictures, heat, alpha=0, mode=mode, signed=signed), pictures)

    def test_alpha_one_is_the_heatmap(self) -> None:
        heat = torch.rand(2, 6, 9)
        np.testing.assert_array_equal(overlay(photographs(), heat, alpha=1, mode="blend"), colourise(heat))

    def test_weighted_leaves_what_does_not_matter(self) -> None:
        pictures = photographs()
        np.testing.assert_array_equal(overlay(pictures, torch.zeros(2, 6, 9), alpha=1), pictures)
        np.testing.assert_array_equal(overlay(pictures, torch.ones(2, 6, 9), alpha=1), colourise(torch.ones(2, 6, 9)))
        neutral = overlay(pictures, torch.full((2, 6, 9), 0.5), signed=True)
        assert np.abs(neutral.astype(int) - pictures).max() <= 3

    @pytest.mark.parametrize("mode", ["weighted", "blend"])
    def test_equals_the_formula(self, mode: Any) -> None:
        pictures, heat = photographs(), np.random.default_rng(1).random((2, 6, 9))
        strength = np.rint(heat * 255)[..., None] / 255
        opacity = 0.6 * (strength * (2 - strength) if mode == "weighted" else np.ones_like(strength))
        wanted = pictures * (1 - opacity) + colourise(heat, "viridis") * opacity
        made = overlay(pictures, heat, colormap="viridis", alpha=0.6, mode=mode)
        np.testing.assert_allclose(made, wanted, atol=0.51)

    def test_any_leading_axes(self) -> None:
        pictures, heat = photographs(), torch.rand(2, 6, 9)
        one = overlay(pictures[0], heat[0])
        np.testing.assert_array_equal(one, overlay(pictures, heat)[0])
        assert overlay(pictures[:0], heat[:0]).shape == (0, 6, 9, 3)
        np.testing.assert_array_equal(overlay(pictures[:, :, ::-1], heat.flip(-1))[:, :, ::-1], overlay(pictures, heat))

    def test_refusals(self) -> None:
        for alpha in (-0.1, 1.1, np.nan):
            with pytest.raises(OptionError, match="alpha"):
                overlay(photographs(), torch.zeros(2, 6, 9), alpha=alpha)
        with pytest.raises(OptionError, match="'mix', expected"):
            overlay(photographs(), torch.zeros(2, 6, 9), mode="mix")  # type: ignore[arg-type]
        for pictures, shape in [(photographs(), (2, 6, 8)), (photographs() / 255, (2, 6, 9)), (photographs(), (6, 9))]:
            with pytest.raises(InputError, match="expected uint8"):
                overlay(pictures, torch.zeros(*shape))


class TestContours:
    def test_outlines_the_warm_region_only(self) -> None:
        pictures = np.full((1, 40, 40, 3), 100, np.uint8)
        heat = torch.zeros(1, 40, 40)
        heat[:, 10:30, 10:30] = 1
        drawn = contours(pictures, heat, thickness=1)
        assert (pictures == 100).all()
        assert (drawn[0, 20, 20] == 100).all()
        assert (drawn[0, 2, 2] == 100).all()
        assert (drawn[0, 10, 20] > 200).all()

    def test_nothing_reached_draws_nothing(self) -> None:
        pictures = photographs()
        np.testing.assert_array_equal(contours(pictures, torch.zeros(2, 6, 9)), pictures)


class TestSavePng:
    def test_makes_folders_and_replaces(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "deeper" / "map.png"
        assert save_png(np.zeros((2, 3, 3), np.uint8), target) == target
        save_png(Image.new("RGB", (5, 4), "red"), str(target))
        with Image.open(target) as image:
            assert image.size == (5, 4)
        assert [path.name for path in target.parent.iterdir()] == ["map.png"]
        if os.name == "posix":
            umask = os.umask(0)
            os.umask(umask)
            assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask

    def test_failing_leaves_the_old_file_and_no_rest(self, tmp_path: Path) -> None:
        target = tmp_path / "map.png"
        save_png(np.zeros((2, 3, 3), np.uint8), target)
        before = target.read_bytes()
        with pytest.raises(ExportError, match="cannot write"):
            save_png(np.zeros((2, 3, 7), np.float32), target)  # type: ignore[arg-type]
        assert target.read_bytes() == before
        assert list(tmp_path.iterdir()) == [target]

    def test_refusals_name_path_and_cause(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ExportError, match=r"map\.png.*(NotADirectory|FileExists|FileNotFound)Error"):
            save_png(np.zeros((2, 2), np.uint8), tmp_path / "file" / "map.png")
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(ExportError, match=r"folder\.png"):
            save_png(np.zeros((2, 2), np.uint8), tmp_path / "folder.png")
        with pytest.raises(ExportError, match=r"found suffix '\.jpg', expected '\.png'"):
            save_png(np.zeros((2, 2), np.uint8), tmp_path / "map.jpg")


class TestDevicePainting:
    """What a GPU runs, run on the CPU."""

    def test_paints_as_the_cpu_does(self) -> None:
        indices = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
        painted = paint(indices, color_table(UNSIGNED_COLORMAP))
        assert np.array_equal(painted, colourise(indices.float() / 255))

    @pytest.mark.parametrize("mode", ["weighted", "blend"])
    @pytest.mark.parametrize("signed", [False, True])
    def test_lays_over_as_the_cpu_does(self, signed: bool, mode: Any) -> None:
        pictures = photographs(2, 8, 16)
        indices = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
        heat = np.linspace(0, 1, 256)
        strength = np.abs(2 * heat - 1) if signed else heat
        opacity = 0.75 * (strength * (2 - strength) if mode == "weighted" else np.ones(256))
        table = color_table(SIGNED_COLORMAP if signed else UNSIGNED_COLORMAP)
        found = paint_over(pictures, indices, table, opacity).numpy().astype(int)
        expected = overlay(pictures, indices.float() / 255, signed=signed, mode=mode)
        weights = opacity.reshape(2, 8, 16, 1)
        exact = weights * table[indices.numpy()] + (1 - weights) * pictures
        for painted in (found, expected):  # which differ where the exact value is half way
            assert np.abs(painted - exact).max() <= 0.504
