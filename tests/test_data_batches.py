"""From examples to batches, and parts of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain.data import (
    Example,
    Examples,
    coverage,
    covering_less_than,
    every_other,
    first,
    load_examples,
    open_dataset,
    shuffled,
    view_example,
)
from vitexplain.data.entries import FileEntry
from vitexplain.data.selection import held_out, one_a_picture, united_area
from vitexplain.errors import InputError
from vitexplain.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)
SEEN = Preprocessing((24, 32), HALF, HALF, "nearest", 0.9)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Seven pictures of different sizes with masks and boxes; number 2 is cut short, 5 has a mask of another size."""
    boxes = []
    for index in range(7):
        generator = np.random.default_rng(index)
        sides = (30 + 3 * index, 50 - 4 * index)
        picture = tmp_path / "images" / f"{index}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(picture)
        mask = (generator.random(sides if index != 5 else sides[::-1]) < 0.1 * (index + 1)).astype(np.uint8)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
        boxes.append(f"{index}.png,{index},1,{index + 9},12.5")
    (tmp_path / "boxes.csv").write_text("\n".join(["file,x0,y0,x1,y1", *boxes]))
    cut = tmp_path / "images" / "2.png"
    cut.write_bytes(cut.read_bytes()[:900])
    return tmp_path


@pytest.fixture
def examples(root: Path) -> Examples:
    return open_dataset(f"folder:{root}", label="zebra")


class TestLoading:
    def test_batches_hold_what_single_examples_give(self, examples: Examples) -> None:
        batches = list(load_examples(examples, SEEN, batch_size=3))
        assert [batch.names for batch in batches] == [("0.png", "1.png"), ("3.png", "4.png"), ("6.png",)]
        for batch in batches:
            assert batch.inputs.shape == (len(batch), 3, 24, 32)
            assert batch.labels == ((340,),) * len(batch)
            assert batch.masks is not None
            assert batch.boxes is not None
            assert batch.masks.dtype == torch.int8
            for place, name in enumerate(batch.names):
                example = examples[examples.names.index(name)]
                alone = view_example(example, SEEN)
                assert torch.equal(batch.inputs[place], SEEN(example.image))
                assert torch.equal(batch.inputs[place], alone.inputs)
                assert example.mask is not None
                np.testing.assert_array_equal(batch.masks[place], SEEN.view_mask(example.mask))
                wanted = SEEN.view_boxes(example.boxes, example.mask.shape)
                np.testing.assert_array_equal(batch.boxes[place], wanted)

    def test_unreadable_examples_are_reported_and_do_not_end_the_run(self, examples: Examples) -> None:
        reports = [batch.unreadable for batch in load_examples(examples, SEEN, batch_size=3)]
        assert [[each.name for each in report] for report in reports] == [["2.png"], ["5.png"], []]
        assert "cut short" in reports[0][0].reason
        assert "the mask of '5.png' is 30 x 45 (height x width), the upright picture 45 x 30" in reports[1][0].reason
        assert "fits the picture as stored" in reports[1][0].reason

    def test_no_report_is_lost_with_empty_batches(self, examples: Examples) -> None:
        reports = {
            batch.names: batch.unreadable for batch in load_examples(examples.select([2, 1, 5]), SEEN, batch_size=1)
        }
        assert {names: [each.name for each in report] for names, report in reports.items()} == {
            ("1.png",): ["2.png", "5.png"]
        }
        with pytest.raises(InputError, match=r"none of the 2 examples can be read: 2.png: .*; 5.png: "):
            list(load_examples(examples.select([2, 5]), SEEN))

    def test_broken_masks_are_reported_too(self, examples: Examples, root: Path) -> None:
        (root / "masks" / "1.png").write_bytes(b"no picture")
        (batch,) = load_examples(first(examples, 2), SEEN)
        assert batch.names == ("0.png",)
        assert [each.name for each in batch.unreadable] == ["1.png"]
        assert "1.png' cannot be read" in batch.unreadable[0].reason

    def test_sizes_of_the_annotation_are_checked(self) -> None:
        picture = Image.new("RGB", (30, 20))
        assert view_example(Example("a", picture, size=(20, 30)), SEEN).mask is None
        with pytest.raises(
            InputError, match=r"the size of 'a' is 40 x 60 \(height x width\), the upright picture 20 x 30"
        ):
            view_example(Example("a", picture, size=(40, 60)), SEEN)

    def test_some_without_annotation(self) -> None:
        picture = Image.new("RGB", (32, 24))
        plain = Example("plain", picture)
        masked = Example("masked", picture, (3,), np.ones((24, 32), np.int8))
        boxed = Example("boxed", picture, (1, 2), None, np.array([[0.0, 0, 32, 24]]))
        chosen = SEEN.replace(crop_fraction=1.0)
        (batch,) = load_examples([plain, masked, boxed], chosen)
        assert batch.labels == ((), (3,), (1, 2))
        assert batch.masks is not None
        assert [torch.unique(mask).tolist() for mask in batch.masks] == [[-1], [1], [-1]]
        assert batch.boxes is not None
        assert [boxes.tolist() for boxes in batch.boxes] == [[], [], [[0, 0, 32, 24]]]
        assert batch.boxes[0].shape == (0, 4)
        (batch,) = load_examples([plain], chosen)
        assert batch.masks is None
        assert batch.boxes is None

    @pytest.mark.slow
    def test_other_processes_give_the_same(self, examples: Examples) -> None:
        here = list(load_examples(examples, SEEN, batch_size=2))
        there = list(load_examples(examples, SEEN, batch_size=2, workers=2))
        assert len(here) == len(there)
        for ours, theirs in zip(here, there, strict=True):
            assert ours.names == theirs.names
            assert ours.unreadable == theirs.unreadable
            assert torch.equal(ours.inputs, theirs.inputs)
            assert ours.masks is not None
            assert theirs.masks is not None
            assert torch.equal(ours.masks, theirs.masks)
            assert ours.boxes is not None
            assert theirs.boxes is not None
            assert all(map(torch.equal, ours.boxes, theirs.boxes))

    def test_the_users_random_state_is_left_alone(self, examples: Examples) -> None:
        before = torch.random.get_rng_state()
        list(load_examples(first(examples, 2), SEEN))
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("count", "settings", "words"),
        [(0, {}, "no examples"), (1, {"batch_size": 0}, "batch_size=0"), (1, {"workers": -1}, "workers=-1")],
    )
    def test_wrong_arguments_are_named_at_once(self, count: int, settings: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            load_examples([Example("a", Image.new("RGB", (9, 9)))] * count, SEEN, **settings)


class TestParts:
    @pytest.mark.parametrize("listed", [False, True])
    def test_no_picture_is_both_measured_and_trained_on(self, tmp_path: Path, listed: bool) -> None:
        names = ["a.png#cat", "b.png#cat", "c.png", "a.png#dog", "b.png#dog", "d#1.png"]
        entries = Examples([FileEntry(name, tmp_path / "x.png") for name in names])
        examples = list(entries) if listed else entries
        kept, others = held_out(examples, [3, 5, 2, 4, 0, 1], 2)
        assert [each.name for each in kept] == ["a.png#dog", "d#1.png", "a.png#cat"]
        assert [each.name for each in others] == ["c.png", "b.png#dog", "b.png#cat"]

    def test_a_picture_with_several_objects_is_taken_once(self, tmp_path: Path) -> None:
        files = {"a.png#cat": "a.png", "d#1.png": "d#1.png", "a.png#dog": "a.png", "d#2.png": "d#2.png"}
        entries = Examples([FileEntry(name, tmp_path / file) for name, file in files.items()])
        assert one_a_picture(entries).names == ("a.png#cat", "d#1.png", "d#2.png")

    def test_first_and_every_other(self, examples: Examples) -> None:
        assert first(examples, 2).names == ("0.png", "1.png")
        assert first(examples, 99).names == examples.names
        even, odd = every_other(examples), every_other(examples, 1)
        assert even.names == ("0.png", "2.png", "4.png", "6.png")
        assert sorted(even.names + odd.names) == sorted(examples.names)
        for wrong in (lambda: first(examples, 0), lambda: every_other(examples, 2)):
            with pytest.raises(InputError, match=r"found (count=0|start=2)"):
                wrong()

    def test_shuffled_by_seed(self, examples: Examples) -> None:
        one, again, other = (shuffled(examples, seed).names for seed in (1, 1, 2))
        assert one == again
        assert one != other
        assert sorted(one) == sorted(examples.names)
        assert one != examples.names

    def test_small_objects(self, examples: Examples) -> None:
        # the mask of number i covers about (i + 1) / 10; what cannot be read is left for loading to report
        assert covering_less_than(examples, 0.35).names == ("0.png", "1.png", "2.png")
        assert coverage(examples[3]) == pytest.approx(0.4, abs=0.05)
        with pytest.raises(InputError, match="found share=0"):
            covering_less_than(examples, 0)

    def test_broken_masks_stay(self, examples: Examples, root: Path) -> None:
        (root / "masks" / "6.png").write_bytes(b"no picture")
        assert covering_less_than(examples, 0.15).names == ("0.png", "6.png")

    def test_boxes_count_once_where_they_overlap(self) -> None:
        picture = Image.new("RGB", (20, 10))
        boxes = np.array([[0.0, 0, 10, 5], [5, 0, 15, 5], [-9, 0, 2, 5], [14.5, 5, 15, 6]])
        assert coverage(Example("a", picture, boxes=boxes)) == pytest.approx((75 + 0.5) / 200)
        assert coverage(Example("a", picture, boxes=np.zeros((0, 4)))) == 0
        with pytest.raises(InputError, match="neither mask nor boxes"):
            coverage(Example("a", picture))

    def test_united_area_against_counting_pixels(self) -> None:
        generator = np.random.default_rng(0)
        for count in range(1, 9):
            corners = np.sort(generator.integers(0, 40, (count, 2, 2)), axis=1)
            boxes = np.concatenate([corners[:, 0], corners[:, 1]], 1)
            canvas = np.zeros((40, 40), bool)
            for x0, y0, x1, y1 in boxes:
                canvas[y0:y1, x0:x1] = True
            assert united_area(boxes.astype(float)) == canvas.sum()
