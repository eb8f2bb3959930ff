"""Readers of published data sets, on small copies of their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from vitexplain.data import Examples, open_dataset
from vitexplain.data.segmentations import run_lengths
from vitexplain.errors import InputError, VitExplainError

Array = np.ndarray[Any, Any]


def picture(file: Path, height: int = 20, width: int = 30) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 99, 199)).save(file)


def stored(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(file)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def corners(*blocks: tuple[int, int], height: int = 20, width: int = 30) -> Array:
    """A mask with values in 5 x 10 blocks along the diagonal: (place, value) each."""
    values = np.zeros((height, width), np.uint8)
    for place, value in blocks:
        values[5 * place : 5 * place + 5, 10 * place : 10 * place + 10] = value
    return values


class TestCoco:
    LABELS = ("tabby", "chair", "person")
    RUNS = (100, 20, 480)  # column 5 (20 x 30 pixels)

    @pytest.fixture
    def content(self) -> dict[str, Any]:
        def annotation(
            number: int, category: int, segmentation: Any, box: list[float], crowd: int = 0
        ) -> dict[str, Any]:
            return {"id": number, "image_id": 7, "category_id": category, "segmentation": segmentation, "bbox": box} | {
                "iscrowd": crowd
            }

        return {
            "images": [{"id": 7, "file_name": "7.jpg", "height": 20, "width": 30}],
            "categories": [{"id": 17, "name": "cat"}, {"id": 62, "name": "chair"}, {"id": 1, "name": "giraffe"}],
            "annotations": [
                annotation(1, 17, [[2, 3, 12, 3, 12, 8, 2, 8]], [2, 3, 10, 5]),
                annotation(2, 17, {"size": [20, 30], "counts": list(self.RUNS)}, [5, 0, 1, 20]),
                annotation(3, 17, {"size": [20, 30], "counts": [0, 120, 480]}, [0, 0, 6, 20], crowd=1),
                annotation(4, 62, [[20, 10, 25, 10, 25, 15, 20, 15], [0, 0, 1, 1]], [20, 10, 5, 5]),
                annotation(5, 62, [[1, 1, 2, 2]], [1, 1, 0, 3]),
                annotation(6, 1, [[0, 0, 5, 0, 5, 5]], [0, 0, 5, 5]),
            ],
        }

    def open(self, root: Path, content: Any, **options: Any) -> Examples:
        write(root / "annotations" / "instances_val2017.json", json.dumps(content))
        picture(root / "val2017" / "7.jpg")
        return open_dataset(f"coco:{root}", labels=self.LABELS, **options)

    def test_one_example_a_category(self, tmp_path: Path, content: dict[str, Any]) -> None:
        write(tmp_path / "map.json", json.dumps({"cat": [[0, "tabby"], 2], "chair": "chair"}))
        examples = self.open(tmp_path, content, class_map=str(tmp_path / "map.json"))
        assert examples.names == ("7.jpg#cat", "7.jpg#chair")
        assert examples.notes == ("objects of 1 categories left out, which are no classes of the model: giraffe",)
        cat, chair = examples
        assert (cat.labels, chair.labels) == ((0, 2), (1,))
        assert cat.size == (20, 30)
        expected = np.zeros((20, 30), int)
        expected[:, :6] = -1  # the crowd, under the objects
        expected[3:8, 2:12] = 1
        expected[:, 5] = 1
        np.testing.assert_array_equal(cat.mask, expected)
        assert cat.boxes is not None
        assert cat.boxes.tolist() == [[2, 3, 12, 8], [5, 0, 6, 20]]
        expected = np.zeros((20, 30), int)
        expected[10:15, 20:25] = 1
        np.testing.assert_array_equal(chair.mask, expected)
        assert chair.boxes is not None
        assert chair.boxes.tolist() == [[20, 10, 25, 15]]

    def test_by_label_name(self, tmp_path: Path, content: dict[str, Any]) -> None:
        examples = self.open(tmp_path, content)
        assert examples.names == ("7.jpg#chair",)
        assert "2 categories" in examples.notes[0]
        kept = self.open(tmp_path, content, keep_unknown=True)
        assert {each.name: each.labels for each in kept} == {"7.jpg#giraffe": (), "7.jpg#cat": (), "7.jpg#chair": (1,)}
        content["categories"][1]["name"] = "stool"
        with pytest.raises(
            InputError, match=r"none of the 3 categories \(cat, giraffe, stool\) is a class of the model"
        ):
            self.open(tmp_path, content)

    def test_nothing_but_a_crowd(self, tmp_path: Path, content: dict[str, Any]) -> None:
        del content["annotations"][:2]
        examples = self.open(tmp_path, content, keep_unknown=True)
        assert "7.jpg#cat" not in examples.names
        assert examples.notes == ("1 categories left out where a picture shows only crowds or objects without area",)

    @pytest.mark.parametrize("empty", [False, True])
    def test_boxes_alone(self, empty: bool, tmp_path: Path, content: dict[str, Any]) -> None:
        for each in content["annotations"]:
            if empty:
                each["segmentation"] = []
            else:
                del each["segmentation"]
        example = self.open(tmp_path, content)[0]
        assert example.mask is None
        assert example.boxes is not None

    def test_compressed_run_lengths(self) -> None:
        import pycocotools.mask

        generator = np.random.default_rng(5)
        for share in (0.0, 0.1, 0.5, 1.0):
            drawn = (generator.random((37, 53)) < share).astype(np.uint8)
            encoded = pycocotools.mask.encode(np.asfortranarray(drawn))
            encoded["counts"] = encoded["counts"].decode()
            runs = run_lengths(encoded)
            found = np.repeat(np.arange(len(runs)) % 2, runs).reshape((37, 53), order="F")
            np.testing.assert_array_equal(found, drawn)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c: c.pop("images"), r"instances_val2017.json': found no 'images'"),
            (lambda c: c["annotations"][0].pop("image_id"), r"annotations\[0\]: found no 'image_id'"),
            (
                lambda c: c["annotations"][1].update(image_id=8),
                r"annotations\[1\]: found image_id=8, expected the id of",
            ),
            (lambda c: c["annotations"][1].update(category_id=8), r"annotations\[1\]: found category_id=8, expected"),
            (
                lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]),
                r"annotations\[0\]: found a polygon \[1, 2",
            ),
            (lambda c: c["annotations"][0].update(segmentation=[[1, 2, "3", 4]]), r"found a polygon"),
            (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 2**70, 4, 5, 6]]), r"found a polygon"),
            (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 1e8, 4, 5, 6]]), r"found a polygon"),
            (lambda c: c["annotations"][0].update(segmentation=[[1, 2, float("nan"), 4, 5, 6]]), r"found a polygon"),
            (lambda c: c["annotations"][0].update(segmentation=7), r"found a segmentation 7"),
            (lambda c: c["annotations"][1]["segmentation"].update(size=[30, 20]), r"of size \[20, 30\]"),
            (lambda c: c["annotations"][1]["segmentation"].update(counts=[1, 2]), r"they cover 3 pixels of 600"),
            (lambda c: c["annotations"][1]["segmentation"].update(counts=[-1, 601]), r"found counts"),
            (lambda c: c["annotations"][1]["segmentation"].update(counts="3"), r"they cover 3 pixels of 600"),
            (lambda c: c["annotations"][1]["segmentation"].update(counts="o"), r"the last run is cut short"),
            (lambda c: c["annotations"][1]["segmentation"].update(counts="é"), r"found the character 'é'"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, "x", 3]), r"annotations\[0\]: found the box"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 3]), r"annotations\[0\]: found the box"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotations\[0\]: found the box"),
            (lambda c: c["images"][0].update(file_name="../7.jpg"), r"images\[0\]: found file_name='../7.jpg'"),
            (lambda c: c["images"][0].update(height=0), r"images\[0\]: found height=0"),
            (lambda c: c["images"][0].update(file_name="8.jpg"), r"missing: .*8.jpg"),
        ],
    )
    def test_wrong_metadata_is_named(
        self, tmp_path: Path, content: dict[str, Any], change: Callable[[Any], Any], words: str
    ) -> None:
        change(content)
        with pytest.raises(InputError, match=words):
            self.open(tmp_path, content, keep_unknown=True)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ('{"cat": "doggy"}', r"category 'cat': found the class 'doggy'"),
            ("[]", r"expected an object"),
            ("{", r"no JSON"),
        ],
    )
    def test_wrong_class_maps_are_named(self, tmp_path: Path, content: str, words: str) -> None:
        write(tmp_path / "map.json", content)
        with pytest.raises(InputError, match=words):
            self.open(
                tmp_path,
                {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]},
                class_map=str(tmp_path / "map.json"),
            )

    def test_without_the_library(self, tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
        with pytest.raises(VitExplainError, match=r"pip install 'vitexplain\[data\]'"):
            self.open(tmp_path, content)


class TestImageNetSegmentation:
    def matlab(self, file: Path, masks: list[Array], ids: list[str] | None = None) -> list[Array]:
        """A file as MATLAB 7.3 writes a struct of cell arrays: references, and arrays with their axes turned round."""
        generator = np.random.default_rng(1)
        pictures = []
        with h5py.File(file, "w") as content:
            groups = {name: [] for name in ("img", "gt", "target")}
            for index, mask in enumerate(masks):
                pixels = generator.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
                pictures.append(pixels)
                image = content.create_dataset(f"#refs#/i{index}", data=pixels.transpose(2, 1, 0))
                inner = content.create_dataset(f"#refs#/m{index}", data=mask.T)
                cell = content.create_dataset(f"#refs#/c{index}", (1, 1), dtype=h5py.ref_dtype)
                cell[0, 0] = inner.ref
                groups["img"].append(image.ref)
                groups["gt"].append(cell.ref)
                if ids:
                    characters = np.array([[ord(each)] for each in ids[index]], np.uint16)
                    groups["target"].append(content.create_dataset(f"#refs#/t{index}", data=characters).ref)
            for name, references in groups.items():
                if references:
                    target = content.create_dataset(f"value/{name}", (len(references), 1), dtype=h5py.ref_dtype)
                    for index, reference in enumerate(references):
                        target[index, 0] = reference
        return pictures

    def test_axes_ids_and_values(self, tmp_path: Path) -> None:
        masks = [corners((0, 1), (1, 255)).astype(np.int8), np.eye(17, 9, dtype=np.uint8)]
        pictures = self.matlab(tmp_path / "gt.mat", masks, ["n02123045", "n00000001"])
        examples = open_dataset(f"imagenet_segmentation:{tmp_path / 'gt.mat'}")
        assert examples.names == ("0000#n02123045", "0001#n00000001")
        assert [each.labels for each in examples] == [(281,), ()]
        assert examples.notes == ("1 pictures without label: their ids are no classes of the model",)
        for example, mask, pixels in zip(examples, masks, pictures, strict=True):
            np.testing.assert_array_equal(np.asarray(example.image), pixels)
            np.testing.assert_array_equal(example.mask, mask)
        assert examples[0].mask is not None
        assert set(np.unique(examples[0].mask)) == {-1, 0, 1}

    def test_without_ids(self, tmp_path: Path) -> None:
        self.matlab(tmp_path / "gt.mat", [np.eye(4, dtype=np.uint8)])
        examples = open_dataset(f"imagenet_segmentation:{tmp_path / 'gt.mat'}")
        assert [(each.name, each.labels) for each in examples] == [("0000", ())]
        assert examples.notes == ()

    def test_wrong_files_are_named(self, tmp_path: Path) -> None:
        file = tmp_path / "gt.mat"
        file.write_bytes(b"MATLAB 5.0 MAT-file")
        with pytest.raises(InputError, match=r"cannot be read as MATLAB 7.3"):
            open_dataset(f"imagenet_segmentation:{file}")
        with h5py.File(file, "w") as content:
            content["value/img"] = np.zeros((3, 1))
        with pytest.raises(InputError, match=r"found /value/img \(3, 1\) and /value/gt None, expected two lists"):
            open_dataset(f"imagenet_segmentation:{file}")
        for target in (np.zeros((2, 1)), np.zeros((1, 1))):
            self.matlab(file, [np.eye(4, dtype=np.uint8)] * 2)
            with h5py.File(file, "a") as content:
                content["value/target"] = target
            with pytest.raises(InputError, match=r"a /value/target that cannot be read .*, expected 2 references"):
                open_dataset(f"imagenet_segmentation:{file}")
        self.matlab(file, [np.full((4, 4), 3, np.uint8)])
        with pytest.raises(InputError, match=r"picture 0: found mask values \[3\], expected"):
            open_dataset(f"imagenet_segmentation:{file}")[0]
        self.matlab(file, [np.zeros((4, 4), np.uint8)])
        with h5py.File(file, "a") as content:
            del content["#refs#/i0"]
            content["#refs#/i0"] = np.zeros((4, 4), np.uint8)
            content["value/img"][0, 0] = content["#refs#/i0"].ref
        with pytest.raises(InputError, match=r"picture 0: found .*expected a picture \(H, W, 3\)"):
            open_dataset(f"imagenet_segmentation:{file}")[0]


class TestImageNetS:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for place, wordnet_id in enumerate(("n01440764", "n02123045", "n04355933"), 1):
            picture(tmp_path / "validation" / wordnet_id / f"{place}.JPEG")
            self.mask(tmp_path, wordnet_id, place, corners((0, place), (1, 3 if place == 1 else 0)))
        return tmp_path

    def mask(self, root: Path, wordnet_id: str, name: int, ids: Array) -> None:
        ids = ids.astype(int)
        ids[-1] = 1000
        channels = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], -1)
        stored(root / "validation-segmentation" / wordnet_id / f"{name}.png", channels)

    def test_ids_and_labels(self, root: Path) -> None:
        examples = open_dataset(f"imagenet_s:{root}")
        assert [each.labels for each in examples] == [(0,), (281,), (836, 837)]
        for example in examples:
            assert example.mask is not None
            expected = corners((0, 1)).astype(int)
            expected[-1] = -1
            np.testing.assert_array_equal(example.mask, expected)
        assert examples.names[0] == "validation/n01440764/1.JPEG"

    def test_ids_above_255(self, root: Path) -> None:
        wordnet_ids = [f"n{number:08d}" for number in range(300)] + ["n01440764"]
        write(root / "categories.txt", "\n".join([*wordnet_ids, "n02123045", "n04355933"]))
        with pytest.raises(InputError, match=r"holds the class ids \[0, 1, 3, 1000\], expected its folder's 301"):
            open_dataset(f"imagenet_s:{root}", categories=str(root / "categories.txt"))[0]
        self.mask(root, "n01440764", 1, corners((0, 1)).astype(int) * 301)
        example = open_dataset(f"imagenet_s:{root}", categories=str(root / "categories.txt"))[0]
        assert example.mask is not None
        assert (example.mask == 1).sum() == 50

    def test_wrong_layouts_are_named(self, root: Path) -> None:
        write(root / "categories.txt", "n01440764\n")
        with pytest.raises(InputError, match=r"n02123045' is not among the 1 categories"):
            open_dataset(f"imagenet_s:{root}", categories=str(root / "categories.txt"))
        write(root / "categories.txt", "n01440764 tench\n")
        with pytest.raises(InputError, match=r"categories.txt', line 1: found 2 fields"):
            open_dataset(f"imagenet_s:{root}", categories=str(root / "categories.txt"))
        picture(root / "validation" / "loose.JPEG")
        with pytest.raises(InputError, match=r"holds pictures in no class folder"):
            open_dataset(f"imagenet_s:{root}")
        (root / "validation" / "loose.JPEG").unlink()
        (root / "validation-segmentation" / "n01440764" / "1.png").unlink()
        with pytest.raises(InputError, match=r"1 of the 6 files .* missing: .*1.png"):
            open_dataset(f"imagenet_s:{root}")
        (root / "validation" / "n01440764").rename(root / "validation" / "tunch")
        with pytest.raises(InputError, match=r"tunch' is named after no class"):
            open_dataset(f"imagenet_s:{root}")


VOC_OBJECT = """<object><name>{0}</name><difficult>{1}</difficult>
    <bndbox><xmin>{2}</xmin><ymin>{3}</ymin><xmax>{4}</xmax><ymax>{5}</ymax></bndbox><part><name>head</name></part></object>"""


def annotation(*objects: tuple[str, int, float, float, float, float]) -> str:
    parts = "".join(VOC_OBJECT.format(*each) for each in objects)
    return f"<annotation><size><width>30</width><height>20</height><depth>3</depth></size>{parts}</annotation>"


class TestVoc:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write(tmp_path / "ImageSets/Segmentation/val.txt", "2007_000033\n")
        write(tmp_path / "ImageSets/Main/val.txt", "2007_000033\n2007_000034\n")
        for name in ("2007_000033", "2007_000034"):
            picture(tmp_path / f"JPEGImages/{name}.jpg")
        stored(tmp_path / "SegmentationClass/2007_000033.png", corners((0, 8), (1, 15), (2, 255)))
        write(
            tmp_path / "Annotations/2007_000033.xml",
            annotation(("cat", 0, 1, 1, 10, 5), ("person", 0, 11, 6, 20, 10), ("cat", 1, 21.5, 1, 30, 20)),
        )
        write(tmp_path / "Annotations/2007_000034.xml", annotation(("cat", 1, 5, 5, 6, 6)))
        write(tmp_path / "map.json", json.dumps({"cat": [0], "person": [1]}))
        return tmp_path

    def open(self, root: Path, **options: Any) -> Examples:
        return open_dataset(f"voc:{root}", labels=("tabby", "groom"), class_map=str(root / "map.json"), **options)

    def test_segmentation(self, root: Path) -> None:
        cat, person = self.open(root)
        assert (cat.name, cat.labels, cat.size) == ("2007_000033#cat", (0,), (20, 30))
        np.testing.assert_array_equal(cat.mask, corners((0, 1), (2, 255)).astype(np.int8))
        np.testing.assert_array_equal(person.mask, corners((1, 1), (2, 255)).astype(np.int8))
        assert cat.boxes is not None
        assert cat.boxes.tolist() == [[0, 0, 10, 5], [20.5, 0, 30, 20]]

    def test_detection(self, root: Path) -> None:
        examples = self.open(root, task="detection")
        assert examples.names == ("2007_000033#cat", "2007_000033#person", "2007_000034#cat")
        assert examples[0].mask is None
        easy = self.open(root, task="detection", difficult=False)
        assert easy.names == ("2007_000033#cat", "2007_000033#person")
        assert easy[0].boxes is not None
        assert easy[0].boxes.tolist() == [[0, 0, 10, 5]]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("<annotation>", r"2007_000033.xml' is no XML"),
            ("<annotation/>", r"2007_000033.xml', size: found no 'height'"),
            (
                annotation(("unicorn", 0, 1, 1, 2, 2)),
                r"object 0: found the category 'unicorn', expected one of aeroplane",
            ),
            (annotation(("cat", 0, 1, 1, 2, 2), ("cat", 2, 1, 1, 2, 2)), r"object 1: found difficult='2'"),
            (annotation(("cat", 0, 5, 1, 2, 2)), r"object 0, bndbox: found the box"),
            (annotation(("cat", 0, 5, 1, 2, 2)).replace("xmax", "xmas"), r"object 0, bndbox: found no 'xmax'"),
            (f"<!DOCTYPE a [<!ENTITY b 'c'>]>{annotation()}", r"found a document type declaration"),
        ],
    )
    def test_wrong_annotations_are_named(self, root: Path, text: str, words: str) -> None:
        write(root / "Annotations/2007_000033.xml", text)
        with pytest.raises(InputError, match=words):
            self.open(root)

    def test_text_that_is_marked_as_such_is_text(self, root: Path) -> None:
        before = self.open(root).names
        file = root / "Annotations/2007_000033.xml"
        text = "<!-- drawn <by> hand --><filename><![CDATA[2007_000033.jpg]]></filename></annotation>"
        file.write_text(file.read_text().replace("</annotation>", text))
        assert self.open(root).names == before

    def test_wrong_lists_are_named(self, root: Path) -> None:
        with pytest.raises(InputError, match=r"minival.txt' cannot be read"):
            self.open(root, split="minival")
        with pytest.raises(InputError, match=r"expected a path inside"):
            self.open(root, split="../../../secret")
        write(root / "ImageSets/Segmentation/val.txt", "2007_000033 1\n")
        with pytest.raises(InputError, match=r"line 1: found 2 fields .* expected 1: name"):
            self.open(root)
        write(root / "ImageSets/Segmentation/val.txt", "../2007_000033\n")
        with pytest.raises(InputError, match=r"line 1: found name='../2007_000033'"):
            self.open(root)
        write(root / "ImageSets/Segmentation/val.txt", "")
        with pytest.raises(InputError, match=r"holds no example"):
            self.open(root)


class TestCub:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write(tmp_path / "images.txt", "1 001.A/a.jpg\n2 002.B/b.jpg\n3 002.B/c.jpg\n")
        write(tmp_path / "bounding_boxes.txt", "1 6.0 2.0 3.5 3.0\n2 0.0 0.0 30.0 20.0\n3 1.0 1.0 1.0 1.0\n")
        write(tmp_path / "image_class_labels.txt", "1 1\n2 2\n3 2\n")
        write(tmp_path / "train_test_split.txt", "1 0\n2 1\n3 0\n")
        for name in ("001.A/a", "002.B/b", "002.B/c"):
            picture(tmp_path / f"images/{name}.jpg")
        return tmp_path

    def test_splits_boxes_and_classes(self, root: Path) -> None:
        examples = open_dataset(f"cub:{root}", labels=["A", "B"])
        assert [(each.name, each.labels) for each in examples] == [("001.A/a.jpg", (0,)), ("002.B/c.jpg", (1,))]
        assert examples[0].mask is None
        assert examples[0].boxes is not None
        assert examples[0].boxes.tolist() == [[6, 2, 9.5, 5]]
        assert open_dataset(f"cub:{root}", split="train").names == ("002.B/b.jpg",)
        assert len(open_dataset(f"cub:{root}", split="all")) == 3

    def test_segmentations_count_votes(self, root: Path) -> None:
        for name in ("001.A/a", "002.B/c"):
            stored(root / f"segmentations/{name}.png", corners((0, 255), (1, 153), (2, 102)))
        example = open_dataset(f"cub:{root}")[0]
        np.testing.assert_array_equal(example.mask, corners((0, 1), (1, 1)))

    @pytest.mark.parametrize(
        ("file", "text", "words"),
        [
            ("images.txt", "1\n", r"images.txt', line 1: found 1 fields .* expected 2: id, file"),
            ("images.txt", "1 ../a.jpg\n", r"images.txt', line 1: found file='../a.jpg'"),
            ("images.txt", "1 001.A/a.jpg\n1 001.A/b.jpg\n", r"line 2: found the picture 1 again"),
            ("images.txt", "9 001.A/a.jpg\n", r"line 1: found picture 9, of which the other files know nothing"),
            ("bounding_boxes.txt", "1 6.0 2.0 0.0 3.0\n", r"line 1: found the box"),
            ("bounding_boxes.txt", "1 six 2.0 1.0 3.0\n", r"line 1: found x='six', expected a number"),
            ("image_class_labels.txt", "1 0\n", r"line 1: found class='0', expected a whole number >= 1"),
            ("image_class_labels.txt", "1 3\n", r"found class 3, but the labels of the model are 2"),
            ("train_test_split.txt", "1 2\n", r"line 1: found training='2'"),
        ],
    )
    def test_wrong_tables_are_named(self, root: Path, file: str, text: str, words: str) -> None:
        if file != "images.txt":
            write(root / "images.txt", "1 001.A/a.jpg\n")
        write(root / file, text)
        with pytest.raises(InputError, match=words):
            open_dataset(f"cub:{root}", labels=["A", "B"])


class TestOxfordPets:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        listed = "#Image CLASS-ID SPECIES BREED ID\nEgyptian_cat_3 2 1 1\nyorkshire_terrier_1 37 2 25\n"
        write(tmp_path / "annotations/test.txt", listed)
        for name in ("Egyptian_cat_3", "yorkshire_terrier_1"):
            picture(tmp_path / f"images/{name}.jpg")
            trimap = corners((0, 1), (1, 3))
            stored(tmp_path / f"annotations/trimaps/{name}.png", np.where(trimap == 0, 2, trimap))
        write(tmp_path / "annotations/xmls/Egyptian_cat_3.xml", annotation(("cat", 0, 3, 2, 9, 8)))
        return tmp_path

    def test_trimaps_and_classes(self, root: Path) -> None:
        cat, dog = open_dataset(f"oxford_pets:{root}")
        assert [(each.name, each.labels) for each in (cat, dog)] == [
            ("Egyptian_cat_3", (1,)),
            ("yorkshire_terrier_1", (36,)),
        ]
        np.testing.assert_array_equal(cat.mask, corners((0, 1), (1, 255)).astype(np.int8))
        assert cat.boxes is None
        assert [each.labels for each in open_dataset(f"oxford_pets:{root}", classes="names")] == [(285,), (187,)]

    def test_boxes_are_of_heads_and_asked_for(self, root: Path) -> None:
        examples = open_dataset(f"oxford_pets:{root}", boxes=True)
        assert examples.names == ("Egyptian_cat_3",)
        assert examples.notes == ("1 pictures without a box left out",)
        assert examples[0].boxes is not None
        assert examples[0].boxes.tolist() == [[2, 1, 9, 8]]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Egyptian_cat_3 2 1\n", r"test.txt', line 1: found 3 fields"),
            ("Egyptian_cat_3 0 1 1\n", r"line 1: found class='0'"),
            ("../Egyptian_cat_3 1 1 1\n", r"line 1: found name='../Egyptian_cat_3'"),
            ("Egyptian_cat_4 1 1 1\n", r"2 of the 2 files .* missing: .*Egyptian_cat_4"),
        ],
    )
    def test_wrong_lists_are_named(self, root: Path, text: str, words: str) -> None:
        write(root / "annotations/test.txt", text)
        with pytest.raises(InputError, match=words):
            open_dataset(f"oxford_pets:{root}")

    def test_wrong_trimaps_are_named(self, root: Path) -> None:
        stored(root / "annotations/trimaps/Egyptian_cat_3.png", corners((0, 1)))
        with pytest.raises(InputError, match=r"Egyptian_cat_3.png' holds the value 0, expected 1, 2, 3"):
            open_dataset(f"oxford_pets:{root}")[0]


class TestWsol:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write(tmp_path / "image_ids.txt", "val/a.jpg\nval/b.jpg\n")
        write(tmp_path / "class_labels.txt", "val/a.jpg,65\nval/b.jpg,0\nval/c.jpg,1\n")
        write(tmp_path / "image_sizes.txt", "val/a.jpg,30,20\nval/b.jpg,30,20\n")
        write(tmp_path / "localization.txt", "val/a.jpg,1,2,11,12\nval/b.jpg,0,0,30,20\nval/a.jpg,5,5,6,6\n")
        for name in "ab":
            picture(tmp_path / f"images/val/{name}.jpg")
        return tmp_path

    def test_boxes(self, root: Path) -> None:
        examples = open_dataset(f"wsol:{root}")
        assert [(each.name, each.labels, each.size) for each in examples] == [
            ("val/a.jpg", (65,), (20, 30)),
            ("val/b.jpg", (0,), (20, 30)),
        ]
        assert examples[0].boxes is not None
        assert examples[0].boxes.tolist() == [[1, 2, 11, 12], [5, 5, 6, 6]]

    def test_masks(self, root: Path) -> None:
        write(root / "localization.txt", "val/a.jpg,m/1.png,m/i.png\nval/a.jpg,m/2.png,\nval/b.jpg,m/2.png,\n")
        stored(root / "images/m/1.png", corners((0, 255)))
        stored(root / "images/m/2.png", np.kron(corners((1, 255)), np.ones((2, 2))))  # twice the picture's size
        stored(root / "images/m/i.png", corners((0, 255), (2, 255)))
        first, second = open_dataset(f"wsol:{root}", kind="masks")
        np.testing.assert_array_equal(first.mask, corners((0, 1), (1, 1), (2, 255)).astype(np.int8))
        np.testing.assert_array_equal(second.mask, corners((1, 1)))
        assert first.boxes is None

    def test_pictures_elsewhere(self, root: Path, tmp_path: Path) -> None:
        (root / "images").rename(root / "elsewhere")
        with pytest.raises(InputError, match=r"2 of the 2 files .* missing"):
            open_dataset(f"wsol:{root}")
        assert len(open_dataset(f"wsol:{root}", images=str(root / "elsewhere"))) == 2

    @pytest.mark.parametrize(
        ("file", "text", "words"),
        [
            ("image_ids.txt", "val/d.jpg\n", r"line 1: found 'val/d.jpg', which class_labels.txt does not have"),
            ("class_labels.txt", "val/a.jpg\n", r"class_labels.txt', line 1: found 1 fields"),
            ("class_labels.txt", "val/a.jpg,dog\nval/b.jpg,1\n", r"found class='dog', expected a whole number"),
            ("image_sizes.txt", "val/a.jpg,30,0\nval/b.jpg,1,1\n", r"line 1: found height='0'"),
            ("localization.txt", "val/a.jpg,1,2,3\n", r"localization.txt', line 1: found 4 fields .* expected 5"),
            ("localization.txt", "val/a.jpg,9,2,3,4\nval/b.jpg,1,1,2,2\n", r"line 1: found the box"),
            ("image_ids.txt", "../a.jpg\n", r"which class_labels.txt does not have"),
        ],
    )
    def test_wrong_tables_are_named(self, root: Path, file: str, text: str, words: str) -> None:
        write(root / file, text)
        with pytest.raises(InputError, match=words):
            open_dataset(f"wsol:{root}")

    def test_wrong_masks_are_named(self, root: Path) -> None:
        write(root / "localization.txt", "val/a.jpg,m/1.png,m/i.png\nval/a.jpg,m/2.png,m/i.png\nval/b.jpg,m/2.png,\n")
        with pytest.raises(InputError, match=r"line 2: found a second ignore file"):
            open_dataset(f"wsol:{root}", kind="masks")
        write(root / "localization.txt", "val/a.jpg,../1.png,\nval/b.jpg,m/2.png,\n")
        with pytest.raises(InputError, match=r"line 1: found mask='../1.png'"):
            open_dataset(f"wsol:{root}", kind="masks")
