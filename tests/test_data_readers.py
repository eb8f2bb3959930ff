"""The catalogue of data sets, and the readers of the project's own layouts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitexplain.data import dataset_info, list_datasets, open_dataset
from vitexplain.data.classes import ModelClasses
from vitexplain.data.metadata import inside
from vitexplain.data.scenes import SPLITS, make_scene
from vitexplain.errors import InputError, OptionError, UnknownNameError

LABELS = ("cat", "golden retriever, retriever", "crane", "crane")


def picture(file: Path, height: int = 20, width: int = 30) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(file)
    return file


def mask(file: Path, values: Any) -> np.ndarray[Any, Any]:
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(values, np.uint8)
    Image.fromarray(array).save(file)
    return array


def striped(*values: int, height: int = 20, width: int = 30) -> np.ndarray[Any, Any]:
    """A mask of rows of these values, height / len(values) each."""
    return np.repeat(np.array(values, np.uint8), height // len(values))[:, None].repeat(width, 1)


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


class TestCatalogue:
    def test_every_reader_says_what_it_expects(self) -> None:
        assert {"annotated", "coco", "folder", "scenes", "voc"} <= set(list_datasets())
        for name in list_datasets():
            info = dataset_info(name.upper().replace("_", "-"))
            assert info.name == name
            assert info.gives
            assert info.title
            assert len(info.layout) > 100, f"{name} has no layout"
            assert all(each.help for each in info.options)

    def test_names_and_paths(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNameError, match=r"no data set called 'cocoa' \(did you mean 'coco'"):
            open_dataset("cocoa:somewhere")
        with pytest.raises(UnknownNameError, match=r"option of voc"):
            open_dataset(f"voc:{tmp_path}", year=2012)
        with pytest.raises(OptionError, match=r"task='panoptic', expected 'segmentation' or 'detection'"):
            open_dataset(f"voc:{tmp_path}", task="panoptic")
        with pytest.raises(InputError, match=r"write 'voc:PATH'"):
            open_dataset("voc")
        with pytest.raises(InputError, match=r"(?s)no such folder; expected there:.*JPEGImages") as caught:
            open_dataset(f"voc:{tmp_path / 'nowhere'}")
        assert "nowhere" in str(caught.value)
        with pytest.raises(InputError, match=r"is no file"):
            open_dataset(f"imagenet_segmentation:{tmp_path}")
        with pytest.raises(InputError, match=r"needs none; write 'scenes'"):
            open_dataset("scenes:here")


class TestPaths:
    @pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "..", "", ".", "a\0b", "C:/a", "..\\a", "\\a"])
    def test_ways_out_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"leads out"):
            inside(Path("root"), name)

    def test_others_are_not(self) -> None:
        assert inside(Path("root"), "a..b/.c/d e.png") == Path("root/a..b/.c/d e.png")
        assert inside(Path("root"), "a\\b.png") == Path("root/a/b.png")


class TestModelClasses:
    def test_names_indices_and_wordnet_ids(self) -> None:
        imagenet, own = ModelClasses(), ModelClasses(LABELS)
        assert [imagenet.find(each) for each in ("n02123045", "golden_retriever", "zebra", "999")] == [
            281,
            207,
            340,
            999,
        ]
        assert [own.find(each) for each in ("Cat", "golden_retriever", "retriever", "3")] == [0, 1, 1, 3]
        assert ModelClasses(("n02123045", "x")).find("n02123045") == 0
        for wrong in ("crane", "dog"):
            with pytest.raises(UnknownNameError, match=r"ambiguous|no class called"):
                own.find(wrong)

    def test_wordnet_ids_need_imagenet_s_order(self) -> None:
        names = list(ModelClasses().names)
        assert ModelClasses(tuple(each.split(",")[0] for each in names)).find("n02123045") == 281
        with pytest.raises(UnknownNameError, match=r"not ImageNet's, or in another order"):
            ModelClasses(tuple(reversed(names))).find("n02123045")
        with pytest.raises(UnknownNameError, match=r"in another order"):
            ModelClasses(LABELS).find("n02123045")
        with pytest.raises(UnknownNameError, match=r"none of the 1000 classes"):
            ModelClasses().find("n00000001")


class TestImageFolder:
    def test_names_ids_and_indices(self, tmp_path: Path) -> None:
        for folder in ("n02123045", "zebra", "207"):
            picture(tmp_path / folder / "deeper" / "a.png")
        examples = open_dataset(f"imagefolder:{tmp_path}")
        assert [(each.name, each.labels) for each in examples] == [
            ("207/deeper/a.png", (207,)),
            ("n02123045/deeper/a.png", (281,)),
            ("zebra/deeper/a.png", (340,)),
        ]
        assert examples[0].mask is None
        assert examples[0].boxes is None

    def test_sorted_order(self, tmp_path: Path) -> None:
        for folder in ("ten", "apple", "Z"):
            picture(tmp_path / folder / "a.png")
        (tmp_path / ".cache").mkdir()
        found = {each.name: each.labels for each in open_dataset(f"imagefolder:{tmp_path}", classes="own")}
        assert found == {"Z/a.png": (0,), "apple/a.png": (1,), "ten/a.png": (2,)}
        for names in ("ab", "abcd"):
            with pytest.raises(InputError, match=rf"found 3 class folders .*, expected {len(names)}.* an empty folder"):
                open_dataset(f"imagefolder:{tmp_path}", classes="own", labels=list(names))

    def test_a_class_without_pictures_keeps_its_place(self, tmp_path: Path) -> None:
        for folder in ("a", "c"):
            picture(tmp_path / folder / "a.png")
        (tmp_path / "b").mkdir()
        assert [each.labels for each in open_dataset(f"imagefolder:{tmp_path}", classes="own")] == [(0,), (2,)]

    def test_wrong_folders(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the folder holds none"):
            open_dataset(f"imagefolder:{tmp_path}")
        picture(tmp_path / "zebbra" / "a.png")
        with pytest.raises(InputError, match=r"zebbra' is named after no class of the model: .*did you mean 'zebra'"):
            open_dataset(f"imagefolder:{tmp_path}")
        picture(tmp_path / "loose.png")
        with pytest.raises(InputError, match=r"loose.png' lies in no class folder"):
            open_dataset(f"imagefolder:{tmp_path}")


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        picture(tmp_path / "images" / "cat" / "a.jpg")
        picture(tmp_path / "images" / "golden_retriever" / "b.png")
        mask(tmp_path / "masks" / "cat" / "a.png", striped(0, 7, 255, 1))
        mask(tmp_path / "masks" / "golden_retriever" / "b.png", striped(9, 0))
        return tmp_path

    def test_masks_and_classes_by_subfolder(self, root: Path) -> None:
        first, second = open_dataset(f"folder:{root}", labels=LABELS)
        assert (first.name, first.labels, first.boxes) == ("cat/a.jpg", (0,), None)
        assert (second.name, second.labels) == ("golden_retriever/b.png", (1,))
        assert first.mask is not None
        assert first.mask.dtype == np.int8
        assert first.mask[::5, 0].tolist() == [0, 1, -1, 1]
        assert second.mask is not None
        assert second.mask[:, 0].tolist() == [1] * 10 + [0] * 10

    def test_another_ignored_value(self, root: Path) -> None:
        found = open_dataset(f"folder:{root}", labels=LABELS, ignored=7)[0].mask
        assert found is not None
        assert found[::5, 0].tolist() == [0, -1, 1, 1]

    def test_a_mask_of_255_alone_is_ambiguous(self, root: Path) -> None:
        mask(root / "masks" / "cat" / "a.png", striped(0, 255))
        with pytest.raises(InputError, match=r"a.png' holds nothing but 0 and 255.* pass ignored=-1"):
            open_dataset(f"folder:{root}", labels=LABELS)[0]
        found = open_dataset(f"folder:{root}", labels=LABELS, ignored=-1)[0].mask
        assert found is not None
        assert set(np.unique(found)) == {0, 1}

    def test_a_white_object_with_smooth_edges_is_no_number(self, root: Path) -> None:
        values = np.full((20, 10), 255, np.uint8)
        values[:5], values[5:7] = 0, 128
        mask(root / "masks" / "cat" / "a.png", values)
        with pytest.raises(InputError, match=r"more of 255, which is left out, .* up to 128: grey levels.*ignored=-1"):
            open_dataset(f"folder:{root}", labels=LABELS)[0]
        found = open_dataset(f"folder:{root}", labels=LABELS, ignored=-1)[0].mask
        assert found is not None
        assert found[:, 0].tolist() == [0] * 5 + [1] * 15
        values[5:7] = 12
        mask(root / "masks" / "cat" / "a.png", values)
        found = open_dataset(f"folder:{root}", labels=LABELS)[0].mask
        assert found is not None
        assert found[:, 0].tolist() == [0] * 5 + [1] * 2 + [-1] * 13

    @pytest.mark.parametrize("kind", ["csv", "json"])
    def test_tables_of_boxes_and_classes(self, tmp_path: Path, kind: str) -> None:
        for name in ("x/a.jpg", "b.jpg", "c.jpg"):
            picture(tmp_path / "images" / name)
        if kind == "csv":
            (tmp_path / "boxes.csv").write_text(
                "file,x0,y0,x1,y1\nx/a.jpg,1,2,3,4\n\nb.jpg,0,0,9.5,9\nx/a.jpg,5,6,7,8\n"
            )
            (tmp_path / "classes.csv").write_text("file,class,remark\nx/a.jpg,3,\nx/a.jpg,cat,two\nb.jpg,retriever,\n")
        else:
            write_json(tmp_path / "boxes.json", {"x/a.jpg": [[1, 2, 3, 4], [5, 6, 7, 8]], "b.jpg": [[0, 0, 9.5, 9]]})
            write_json(tmp_path / "classes.json", {"x/a.jpg": [3, "cat"], "b.jpg": "retriever"})
        examples = {each.name: each for each in open_dataset(f"folder:{tmp_path}", labels=LABELS)}
        assert {name: each.labels for name, each in examples.items()} == {"x/a.jpg": (0, 3), "b.jpg": (1,), "c.jpg": ()}
        boxes = {name: each.boxes.tolist() for name, each in examples.items() if each.boxes is not None}
        assert boxes == {"x/a.jpg": [[1, 2, 3, 4], [5, 6, 7, 8]], "b.jpg": [[0, 0, 9.5, 9]], "c.jpg": []}
        assert examples["c.jpg"].boxes is not None
        assert examples["c.jpg"].boxes.shape == (0, 4)

    def test_one_label_for_all(self, root: Path) -> None:
        assert [each.labels for each in open_dataset(f"folder:{root}", label="zebra")] == [(340,), (340,)]
        with pytest.raises(UnknownNameError, match=r"no class called 'zebbra'"):
            open_dataset(f"folder:{root}", label="zebbra")

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("boxes.csv", "file,x0,y0,x1\n", r"boxes.csv', line 1: found the columns file,x0,y0,x1, expected"),
            ("boxes.csv", "", r"found the columns none, expected file,x0"),
            ("boxes.csv", "file,x0,y0,x1,y1\ncat/a.jpg,1,2,3\n", "line 2: found 4 fields .* expected 5: file, x0"),
            ("boxes.csv", "file,x0,y0,x1,y1\ncat/a.jpg,9,2,3,4\n", r"line 2: found the box .* with x0 < x1"),
            ("boxes.csv", "file,x0,y0,x1,y1\ncat/a.jpg,nan,2,3,4\n", "line 2: found the box"),
            (
                "boxes.csv",
                "file,x0,y0,x1,y1\n../a.jpg,1,2,3,4\n",
                r"line 2: found file='../a.jpg', expected a path inside",
            ),
            ("boxes.csv", "file,x0,y0,x1,y1\ncat/z.jpg,1,2,3,4\n", r"2 of the 6 files .* are missing: .*z.jpg"),
            ("boxes.json", "[1]", "found a JSON list, expected an object"),
            ("boxes.json", '{"cat/a.jpg": [[1, 2, 3]]}', "'cat/a.jpg': found the box"),
            ("boxes.json", '{"cat/a.jpg": 5}', "found value=5, expected a list"),
            ("boxes.json", '{"cat/a.jpg": ', "boxes.json' is no JSON"),
            ("boxes.json", "[" * 100_000, "boxes.json' is no JSON"),
            (
                "classes.csv",
                "file,class\ncat/a.jpg,dog\n",
                "line 2: found the class 'dog', expected a class of the model",
            ),
            ("classes.csv", "file,class\ncat/a.jpg,4\n", "found the class '4'.*expected 0 to 3"),
            ("classes.json", '{"cat/a.jpg": 0.5}', "found the class 0.5, expected an index, a name"),
            ("classes.json", b"\xff\xfe", "cannot be read"),
        ],
    )
    def test_wrong_tables_are_named(self, root: Path, name: str, content: str | bytes, words: str) -> None:
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=words):
            open_dataset(f"folder:{root}", labels=LABELS)

    def test_two_tables_are_one_too_many(self, root: Path) -> None:
        (root / "boxes.csv").touch()
        (root / "boxes.json").touch()
        with pytest.raises(InputError, match=r"found both"):
            open_dataset(f"folder:{root}", labels=LABELS)

    def test_missing_masks(self, root: Path) -> None:
        (root / "masks" / "cat" / "a.png").unlink()
        with pytest.raises(InputError, match=r"1 of the 4 files .* missing: .*a.png.*skip_missing=True"):
            open_dataset(f"folder:{root}", labels=LABELS)
        examples = open_dataset(f"folder:{root}", labels=LABELS, skip_missing=True)
        assert examples.names == ("golden_retriever/b.png",)
        assert examples.notes == ("1 examples left out: 1 files are missing",)

    @pytest.mark.parametrize("option", ["images", "masks"])
    def test_folders_stay_inside(self, root: Path, option: str) -> None:
        with pytest.raises(InputError, match=r"expected a path inside"):
            open_dataset(f"folder:{root}", labels=LABELS, **{option: "../elsewhere"})


class TestMaskFiles:
    def read(self, root: Path) -> Any:
        picture(root / "images" / "a.jpg")
        return open_dataset(f"folder:{root}")[0].mask

    def test_palette_entries_count_not_their_colours(self, tmp_path: Path) -> None:
        stored = Image.new("P", (30, 20))
        stored.frombytes(striped(0, 2).tobytes())
        stored.putpalette([255, 255, 255, 0, 0, 0, 0, 0, 0])
        (tmp_path / "masks").mkdir()
        stored.save(tmp_path / "masks" / "a.png")
        assert self.read(tmp_path)[:, 0].tolist() == [0] * 10 + [1] * 10

    def test_bits_sixteen_bits_and_grey_in_colours(self, tmp_path: Path) -> None:
        (tmp_path / "masks").mkdir()
        values = striped(0, 1)
        for stored in (
            Image.fromarray(values.astype(bool)),
            Image.fromarray(values.astype(np.uint16) * 300),
            Image.fromarray(np.repeat(values[..., None], 3, 2)),
        ):
            stored.save(tmp_path / "masks" / "a.png")
            assert self.read(tmp_path)[:, 0].tolist() == [0] * 10 + [1] * 10, stored.mode

    def test_wrong_files(self, tmp_path: Path) -> None:
        (tmp_path / "masks").mkdir()
        file = tmp_path / "masks" / "a.png"
        picture(file)
        with pytest.raises(InputError, match=r"is in colours, expected one number a pixel"):
            self.read(tmp_path)
        Image.new("RGBA", (30, 20)).save(file)
        with pytest.raises(InputError, match=r"is stored as RGBA, expected"):
            self.read(tmp_path)
        Image.new("L", (30, 20)).save(file, format="jpeg")
        with pytest.raises(InputError, match=r"lossless format: PNG"):
            self.read(tmp_path)
        Image.fromarray(striped(0, 1)).save(file)
        file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(InputError, match=r"a.png' cannot be read"):
            self.read(tmp_path)


class TestAnnotated:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("a.jpg", "b.jpg"):
            picture(tmp_path / "images" / name)
        mask(tmp_path / "masks" / "a.png", striped(0, 1, 255, 2))
        return tmp_path

    def open(self, root: Path, *records: Any, **options: Any) -> Any:
        write_json(root / "annotations.json", list(records))
        return open_dataset(f"annotated:{root}", labels=LABELS, **options)

    def test_masks_boxes_and_classes(self, root: Path) -> None:
        first, second = self.open(
            root,
            {"file": "a.jpg", "mask": "a.png", "imagenet": [3, "cat"], "w": 30, "h": 20},
            {"file": "b.jpg", "boxes": [[1, 2, 3, 4]], "label": None},
        )
        assert (first.labels, first.boxes, first.size) == ((0, 3), None, (20, 30))
        assert first.mask[::5, 0].tolist() == [0, 1, -1, 1]
        assert (second.labels, second.mask, second.size) == ((), None, None)
        assert second.boxes.tolist() == [[1, 2, 3, 4]]
        examples = self.open(root, {"file": "a.jpg", "classes": 0}, {"file": "b.jpg"}, keep_unknown=False)
        assert examples.names == ("a.jpg",)
        assert examples.notes == ("1 examples without a class of the model left out",)

    def test_segments_give_one_example_a_category(self, root: Path) -> None:
        mask(root / "masks" / "a.png", striped(0, 1, 2, 3, 4))
        segments = [
            {"value": 1, "category": "pet", "classes": [0], "iscrowd": 0},
            {"value": 2, "category": "bird", "classes": [2]},
            {"value": 3, "category": "pet", "classes": [1]},
            {"value": 4, "category": "pet", "classes": [1], "iscrowd": 1},
        ]
        examples = self.open(root, {"file": "a.jpg", "mask": "a.png", "segments": segments})
        assert examples.names == ("a.jpg#pet", "a.jpg#bird")
        pet, bird = examples
        assert pet.labels == (0, 1)
        assert pet.mask[::4, 0].tolist() == [0, 1, 0, 1, -1]
        assert bird.labels == (2,)
        assert bird.mask[::4, 0].tolist() == [0, 0, 1, 0, 0]

    @pytest.mark.parametrize(
        ("record", "words"),
        [
            ({}, r"record 0: found no 'file' \(but nothing\), expected text"),
            ([1], r"record 0: found \[1\], expected an object"),
            ({"file": 5}, "record 0: found file=5, expected text"),
            ({"file": "../a.jpg"}, r"found file='../a.jpg', expected a path inside .*without '..'"),
            ({"file": "a.jpg", "mask": "/etc/a.png"}, "expected a path inside"),
            ({"file": "a.jpg", "boxes": 3}, "found boxes=3, expected a list"),
            ({"file": "a.jpg", "boxes": [[1, 2, 1, 4]]}, r"found the box \[1, 2, 1, 4\], expected four numbers"),
            ({"file": "a.jpg", "label": "dog"}, "found the class 'dog', expected a class of the model"),
            ({"file": "a.jpg", "label": -1}, "found the class '-1'"),
            ({"file": "a.jpg", "w": 30}, "found no 'h'"),
            ({"file": "a.jpg", "w": 0, "h": 5}, "found w=0, expected a whole number >= 1"),
            ({"file": "a.jpg", "w": True, "h": 5}, "found w=True, expected a whole number"),
            (
                {"file": "a.jpg", "mask": "a.png", "segments": [{"value": 0, "category": "x"}]},
                r"segments\[0\]: found value=0",
            ),
            ({"file": "z.jpg"}, r"1 of the 1 files .* missing: .*z.jpg"),
        ],
    )
    def test_wrong_records_are_named(self, root: Path, record: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            self.open(root, record)

    def test_names_are_unique(self, root: Path) -> None:
        with pytest.raises(InputError, match=r"found 1 names more than once, such as 'a.jpg'"):
            self.open(root, {"file": "a.jpg"}, {"file": "a.jpg"})

    def test_nothing_listed(self, root: Path) -> None:
        with pytest.raises(InputError, match=r"holds no example; expected:\n\nPictures listed in one JSON file"):
            self.open(root)


class TestScenes:
    def test_one_object(self) -> None:
        examples = open_dataset("scenes", split="validation", count=3)
        assert examples.names == ("validation/000000", "validation/000001", "validation/000002")
        scene = make_scene(SPLITS["validation"][1], num_objects=1)
        example = examples[1]
        assert example.labels == scene.classes
        np.testing.assert_array_equal(np.asarray(example.image), scene.image)
        np.testing.assert_array_equal(example.mask == 1, scene.masks[0])
        np.testing.assert_array_equal(example.boxes, scene.boxes)
        assert set(np.unique(example.mask)) == {0, 1}

    def test_two_objects_are_two_examples(self) -> None:
        examples = open_dataset("scenes", objects=2, count=2)
        assert examples.names == ("test/000000#0", "test/000000#1", "test/000001#0", "test/000001#1")
        scene = make_scene(SPLITS["test"][1], num_objects=2)
        for place in (0, 1):
            example = examples[2 + place]
            assert example.labels == (scene.classes[place],)
            np.testing.assert_array_equal(example.mask == 1, scene.masks[place])
            np.testing.assert_array_equal(example.boxes, scene.boxes[[place]])

    def test_options(self) -> None:
        with pytest.raises(OptionError, match=r"split='val'"):
            open_dataset("scenes", split="val")
        with pytest.raises(OptionError, match=r"count=0"):
            open_dataset("scenes", count=0)


class TestExamples:
    def test_a_sequence_that_travels(self, tmp_path: Path) -> None:
        for index in range(5):
            picture(tmp_path / "cat" / f"{index}.png")
        examples = open_dataset(f"imagefolder:{tmp_path}", labels=LABELS)
        assert len(examples) == 5
        assert examples[-1].name == "cat/4.png"
        assert examples[1:4:2].names == ("cat/1.png", "cat/3.png")
        assert pickle.loads(pickle.dumps(examples)).names == examples.names
        with pytest.raises(IndexError):
            examples[5]
