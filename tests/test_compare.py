"""Methods, classes and models side by side: the same maps as alone, for what users may ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from families import make_images, make_model
from PIL import Image
from torch import nn

import vitexplain
from vitexplain import (
    Comparison,
    ExplanationWarning,
    ExportError,
    InputError,
    OptionError,
    Subject,
    TargetError,
    UnknownNameError,
    UnsupportedModelError,
    compare,
    create_method,
    get_explainer,
    load_model,
)
from vitexplain.comparison.agreement import agreements, top_overlap
from vitexplain.comparison.command import compare_command
from vitexplain.data.scenes import CLASS_NAMES, SPLITS, make_scene
from vitexplain.metrics.catalogue import create_metric
from vitexplain.metrics.evaluation import evaluate
from vitexplain.models.loading import LoadedModel
from vitexplain.preprocessing import Preprocessing

METHODS = ("rollout", "gradcam", "tokentm")


@pytest.fixture(scope="module")
def scenes() -> LoadedModel:
    return load_model("scenes")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(make_scene(index, num_objects=2).image) for index in SPLITS["test"][:2]]


@pytest.fixture(scope="module")
def comparison(scenes: LoadedModel, pictures: list[Image.Image]) -> Comparison:
    return compare(scenes, pictures, METHODS, top=2)


@pytest.fixture(scope="module")
def measured(scenes: LoadedModel, pictures: list[Image.Image]) -> Comparison:
    """Small enough for its faithfulness to be measured in no time."""
    return compare(scenes, pictures[:1], ["rollout", "tokentm"], top=2)


@pytest.fixture(scope="module")
def contrast(scenes: LoadedModel, pictures: list[Image.Image]) -> Comparison:
    return compare(scenes, pictures, ["rollout", "tokentm", "occlusion"], targets=(["mug", 3], ["key", 7]))


def shown(model: str) -> Subject:
    """A model of `families` that takes pictures."""
    return Subject(vitexplain.adapt(make_model(model)), Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3), [*"abcdefg"])


class TestMaps:
    def test_are_those_of_each_method_alone(
        self, comparison: Comparison, scenes: LoadedModel, pictures: list[Any]
    ) -> None:
        targets = comparison["tokentm"].targets
        assert targets is not None
        assert targets.shape == (2, 2)
        for name in METHODS:
            alone = get_explainer(name, scenes)(pictures, target=targets)
            torch.testing.assert_close(comparison[name].scores, alone.scores, rtol=1e-5, atol=1e-7)

    def test_the_most_probable_classes_come_first(self, comparison: Comparison) -> None:
        logits = comparison["rollout"].logits
        assert comparison["rollout"].targets.tolist() == logits.topk(2).indices.tolist()
        for case in comparison.cases:
            assert case.probability == pytest.approx(float(logits.softmax(1)[case.image, case.target]), rel=1e-5)
            assert case.predicted == (case.index == 0)
        assert [(case.image, case.index) for case in comparison.cases] == [(0, 0), (0, 1), (1, 0), (1, 1)]

    def test_one_forward_and_one_backward_a_class_serve_all_methods(
        self, scenes: LoadedModel, pictures: list[Any]
    ) -> None:
        passes = []
        forward = scenes.model.register_forward_hook(lambda *_: passes.append("F"))
        backward = scenes.model.blocks[-1].register_full_backward_hook(lambda *_: passes.append("B"))
        try:
            compare(scenes, pictures, ["rollout", "generic_attention", "tokentm"], targets=["mug", "key"])
        finally:
            forward.remove()
            backward.remove()
        assert passes == ["F", "B", "B"]

    def test_an_option_is_another_method(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        most = create_method("rollout", discard_ratio=0.9)
        found = compare(scenes, pictures[0], ["rollout", most])
        assert list(found.methods) == ["rollout", "rollout(discard_ratio=0.9)"]
        assert not torch.equal(found["rollout"].scores, found["rollout(discard_ratio=0.9)"].scores)
        named = compare(scenes, pictures[0], {"kept": "rollout", "thinned": most})
        torch.testing.assert_close(named["thinned"].scores, found["rollout(discard_ratio=0.9)"].scores)

    def test_the_model_is_given_back(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        model = scenes.model.train()
        try:
            before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            compare(scenes, pictures[0], METHODS)
            assert model.training
            assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
            assert all(parameter.grad is None for parameter in model.parameters())
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        finally:
            model.eval()


class TestTargets:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (5, [[5], [5]]),
            ("mug", [["mug"], ["mug"]]),
            (["mug", 3], [["mug", 3], ["mug", 3]]),
            (["7", "Key"], [[7, "key"], [7, "key"]]),
            ([["mug"], ["key"]], [["mug"], ["key"]]),
            (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
            (np.array([[9], [0]]), [[9], [0]]),
            (torch.tensor(6), [[6], [6]]),
        ],
    )
    def test_in_all_forms(self, scenes: LoadedModel, pictures: list[Any], given: Any, expected: list[Any]) -> None:
        found = compare(scenes, pictures, ["rollout"], targets=given)["rollout"].targets
        assert found is not None
        numbers = [[each if isinstance(each, int) else scenes.class_index(each) for each in row] for row in expected]
        assert found.tolist() == numbers

    def test_the_predicted_class_without(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        found = compare(scenes, pictures, ["rollout"])["rollout"]
        assert found.targets.tolist() == found.logits.argmax(1, keepdim=True).tolist()
        assert found.scores.shape == (2, 1, 12, 12)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((1, 2, 3), "tuple"),
            ((1, None), "tuple"),
            ((1, [2, 3]), "contrast"),
            ((12, 1), "12 classes"),
            (torch.tensor([1, 2]), r"\(2,\)"),
            ([[1], [2, 3]], "rows of the same length"),
            ([[1], [2], [3]], "3 images"),
            ([], "at least 1"),
            ([1.5], "1.5"),
            (12, "12 classes"),
        ],
    )
    def test_of_other_forms_are_refused(
        self, scenes: LoadedModel, pictures: list[Any], given: Any, message: str
    ) -> None:
        with pytest.raises(TargetError, match=message):
            compare(scenes, pictures, ["rollout"], targets=given)

    def test_an_unknown_name_is_refused(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        with pytest.raises(UnknownNameError, match="zebra"):
            compare(scenes, pictures, ["rollout"], targets="zebra")

    @pytest.mark.parametrize("top", [0, 13])
    def test_top_is_checked(self, scenes: LoadedModel, pictures: list[Any], top: int) -> None:
        with pytest.raises((OptionError, TargetError), match=f"top={top}"):
            compare(scenes, pictures, ["rollout"], top=top)


class TestContrastsAndFunctions:
    def test_maps_are_those_of_each_method_alone(
        self, contrast: Comparison, scenes: LoadedModel, pictures: list[Any]
    ) -> None:
        mug, key = map(scenes.class_index, ("mug", "key"))
        pair = (torch.tensor([[mug, 3]] * 2), torch.tensor([[key, 7]] * 2))
        for name in ("tokentm", "occlusion"):
            alone = get_explainer(name, scenes)(pictures, target=pair)
            torch.testing.assert_close(contrast[name].scores, alone.scores, rtol=1e-4, atol=1e-6)

    def test_sides_have_all_forms_of_classes(self, contrast: Comparison, pictures: list[Any]) -> None:
        mug, key = map(load_model("scenes").class_index, ("mug", "key"))
        sides = (torch.tensor([[mug, 3]] * 2), np.array([[key, 7]] * 2))
        found = compare("scenes", pictures, ["tokentm"], targets=sides)
        torch.testing.assert_close(found["tokentm"].scores, contrast["tokentm"].scores, rtol=1e-4, atol=1e-6)
        assert [case.name for case in found.cases] == [case.name for case in contrast.cases]
        assert found.against["scenes"].tolist() == [[key, 7]] * 2

    def test_cases_have_both_classes(self, contrast: Comparison) -> None:
        first, second, *_ = contrast.cases
        assert first.name == "mug against key"
        assert second.classes == (3, 7)
        assert not first.predicted
        probabilities = contrast["tokentm"].logits[0].softmax(0)
        assert second.probabilities == pytest.approx(probabilities[[3, 7]].tolist(), rel=1e-5)

    def test_faithfulness_is_left_empty_with_the_reason(self, contrast: Comparison) -> None:
        table = contrast.table(cost=False)
        assert len(table.rows) == 2 * 2 * 3
        assert all(np.isnan(row[metric]) for row in table.rows for metric in ("deletion", "insertion", "saco"))
        assert all(np.isfinite(row["agreement"]) for row in table.rows)
        text = table.to_markdown()
        assert "mug against key" in text
        assert text.splitlines()[-1].endswith("a contrast or a function has none.")
        assert "has none" not in contrast.table(faithfulness=False, cost=False).to_markdown()
        assert contrast.faithfulness.curves == {}

    def test_pictures_and_reports_are_made(self, contrast: Comparison, tmp_path: Path) -> None:
        assert contrast.picture(scale=1).width > 0
        page = contrast.save(tmp_path / "report.html", cost=False, attention=False).read_text()
        assert "mug against key" in page
        assert "a contrast or a function has none" in page
        assert "<polyline" not in page
        assert "the predicted class" not in page

    def test_functions_are_explained(self, scenes: LoadedModel, pictures: list[Any], tmp_path: Path) -> None:
        def score(logits: torch.Tensor) -> torch.Tensor:
            return logits.logsumexp(1)

        found = compare(scenes, pictures, ["tokentm", "gradcam"], targets=score)
        assert found["tokentm"].scores.shape == (2, 1, 12, 12)
        alone = get_explainer("tokentm", scenes)(pictures, target=score)
        torch.testing.assert_close(found["tokentm"].scores[:, 0], alone.scores, rtol=1e-4, atol=1e-6)
        assert [case.name for case in found.cases] == ["function"] * 2
        assert found.cases[0].target is None
        assert np.isnan(found.cases[0].probability)
        assert "nan" not in found.table(cost=False).to_markdown()
        assert found.table(faithfulness=False).rows[0]["seconds"] > 0
        page = found.save(tmp_path / "report.html", cost=False, attention=False).read_text()
        assert "nan" not in re.sub(r"data:[^)\"]*", "", page.split("</style>")[1].split("<script")[0])
        assert found.picture(scale=1).width > 0

    def test_methods_of_one_class_are_left_out_with_the_reason(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        with pytest.warns(ExplanationWarning, match="pm is left out: pm tells how a patch belongs to one class"):
            found = compare(scenes, pictures[:1], ["pm", "tokentm"], targets=("mug", "key"))
        assert list(found.refusals) == [("scenes", "pm")]
        with pytest.raises(TargetError, match="one class"):
            compare(scenes, pictures[:1], ["pm"], targets=("mug", "key"))


class TestModels:
    def test_several_each_with_its_own_grid_and_prediction(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        found = compare({"a": scenes, "b": shown("cls")}, pictures, ["rollout", "gradcam"])
        assert found["a", "rollout"].scores.shape == (2, 1, 12, 12)
        assert found["b", "rollout"].scores.shape == (2, 1, 4, 6)
        assert [(case.image, case.model) for case in found.cases] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
        assert found.pictures["b"].shape == (2, 32, 48, 3)
        with pytest.raises(InputError, match="expected a model too"):
            found["rollout"]
        with pytest.raises(UnknownNameError, match="c, rollout"):
            found["c", "rollout"]
        assert found.picture(scale=1).width > 0

    def test_of_one_name_are_numbered(self, scenes: LoadedModel, pictures: list[Any]) -> None:
        assert list(compare([scenes, scenes], pictures[0], ["rollout"]).subjects) == ["scenes 1", "scenes 2"]

    def test_without_preprocessing_take_tensors_and_are_not_drawn(self) -> None:
        found = compare(make_model("registers"), make_images("registers"), ["rollout", "generic_attention"])
        assert found.images == ["image 1", "image 2"]
        assert len(found.table(cost=False, faithfulness=False).rows) == 4
        with pytest.raises(InputError, match="normalised"):
            found.picture()

    def test_a_method_that_is_not_defined_is_left_out_with_its_reason(self) -> None:
        images = [Image.new("RGB", (60, 40), "navy"), Image.new("RGB", (60, 40), "teal")]
        with pytest.warns(ExplanationWarning, match="tokentm is left out"):
            found = compare(shown("post_norm"), images, ["rollout", "tokentm"])
        assert ("VisionTransformer", "tokentm") in found.refusals
        with pytest.raises(UnknownNameError, match="no maps"):
            found["tokentm"]
        assert len(found.table(cost=False, faithfulness=False).rows) == 2
        whole = np.asarray(found.picture(scale=1))
        assert whole.shape[1] > 3 * 192

    def test_where_no_method_works_it_raises(self) -> None:
        with pytest.raises(UnsupportedModelError):
            compare(make_model("post_norm"), make_images("post_norm"), ["tokentm"])

    @pytest.mark.parametrize(
        ("model", "methods", "kind"),
        [
            ([], ["rollout"], OptionError),
            ("scenes", [], OptionError),
            ("scenes", ["rollout", "attention-rollout"], OptionError),
            ("scenes", ["nope"], UnknownNameError),
            ("nope", ["rollout"], UnknownNameError),
        ],
    )
    def test_what_is_missing_or_twice_is_refused(
        self, model: Any, methods: Any, kind: type[Exception], pictures: list[Any]
    ) -> None:
        with pytest.raises(kind):
            compare(model, pictures, methods)


class TestAgreement:
    def test_rank_correlation_is_that_of_scipy(self, comparison: Comparison) -> None:
        from scipy.stats import spearmanr

        found = list(agreements(comparison))
        assert len(found) == 4 * 3
        for each in found:
            maps = [comparison.scores(each.case, label).flatten().numpy() for label in (each.first, each.second)]
            assert each.rank_correlation == pytest.approx(spearmanr(*maps).statistic, abs=1e-6)

    def test_overlap_counts_shared_highest_patches(self) -> None:
        torch.manual_seed(0)
        first, second = torch.randn(5, 6, 7), torch.randn(5, 6, 7)
        for share, count in ((0.1, 4), (0.5, 21), (1.0, 42), (0.001, 1)):
            expected = [
                len(set(a.topk(count).indices.tolist()) & set(b.topk(count).indices.tolist())) / count
                for a, b in zip(first.flatten(1), second.flatten(1), strict=True)
            ]
            torch.testing.assert_close(top_overlap(first, second, share), torch.tensor(expected, dtype=torch.float64))

    def test_overlap_knows_no_answer_for_flat_or_broken_maps(self) -> None:
        sound, flat, broken = torch.randn(1, 3, 3), torch.ones(1, 3, 3), torch.full((1, 3, 3), torch.nan)
        assert top_overlap(sound, sound).item() == 1
        assert top_overlap(sound, flat).isnan().all()
        assert top_overlap(broken, sound).isnan().all()

    def test_overlap_of_maps_that_are_zero_nearly_everywhere_is_chance(self) -> None:
        first, second = torch.zeros(2, 1, 14, 14)
        first[0, 0, 0], second[0, 13, 13] = 1, 1
        found = top_overlap(first, second, 20 / 196)
        assert found.item() == pytest.approx((2 * 19 / 195 + 194 * (19 / 195) ** 2) / 20)
        assert found.item() < 0.11
        assert top_overlap(first, first, 20 / 196).item() == 1

    @pytest.mark.parametrize("share", [0, 1.1])
    def test_overlap_checks_its_share(self, share: float) -> None:
        with pytest.raises(OptionError, match="share"):
            top_overlap(torch.ones(1, 2, 2), torch.ones(1, 2, 2), share)

    def test_maps_on_different_grids_have_no_figure(self, comparison: Comparison) -> None:
        from dataclasses import replace

        coarse = replace(comparison["gradcam"], scores=comparison["gradcam"].scores[..., ::2, ::2])
        found = replace(comparison, explanations={**comparison.explanations, ("scenes", "gradcam"): coarse})
        pairs = {(each.first, each.second): each for each in agreements(found) if each.case == found.cases[0]}
        assert np.isnan(pairs["rollout", "gradcam"].rank_correlation)
        assert not np.isnan(pairs["rollout", "tokentm"].rank_correlation)


class TestTable:
    def test_faithfulness_is_that_of_evaluate(self, measured: Comparison, scenes: LoadedModel, pictures: Any) -> None:
        second = measured.cases[1]
        metrics = ["deletion", "insertion"]
        expected = evaluate(["tokentm"], pictures[:1], metrics, model=scenes, target=second.target, resamples=10)
        for metric in metrics:
            found = measured.faithfulness.figures[metric, second, "tokentm"]
            assert found == pytest.approx(expected.estimates["tokentm", metric]["auc"].value, abs=1e-6)

    def test_saco_follows_the_class_that_is_explained(
        self, measured: Comparison, scenes: LoadedModel, pictures: list[Any]
    ) -> None:
        first, second = measured.cases
        published, own = create_metric("saco"), create_metric("saco", of="explained")
        for case, metric in ((first, published), (first, own), (second, own)):
            expected = evaluate(["tokentm"], pictures[:1], metric, model=scenes, target=case.target, resamples=10)
            (value,) = (each["saco"].value for each in expected.estimates.values())
            assert measured.faithfulness.figures["saco", case, "tokentm"] == pytest.approx(value)

    def test_curves_begin_and_end_where_they_must(self, measured: Comparison) -> None:
        for case in measured.cases:
            deletion = measured.faithfulness.curves["deletion", case, "tokentm"]
            insertion = measured.faithfulness.curves["insertion", case, "tokentm"]
            assert deletion[0] == pytest.approx(case.probability, abs=1e-5)
            assert insertion[-1] == pytest.approx(case.probability, abs=1e-5)
            assert ("saco", case, "tokentm") not in measured.faithfulness.curves

    def test_has_a_row_a_map_and_what_was_asked_for(self, measured: Comparison) -> None:
        table = measured.table(cost=False)
        assert len(table.rows) == 2 * 2
        assert set(table.better) == {"deletion", "insertion", "saco"}
        assert "seconds" not in table.rows[0]
        text = table.to_markdown().splitlines()
        assert len(text) == 2 + 4
        assert "deletion ↓" in text[0]
        assert all(line.count("|") == text[0].count("|") for line in text)

    def test_agreement_is_the_mean_over_the_other_methods(self, comparison: Comparison) -> None:
        table = comparison.table(cost=False, faithfulness=False)
        of_first = [each for each in table.agreements if each.case == comparison.cases[0]]
        values = [each.rank_correlation for each in of_first if "rollout" in (each.first, each.second)]
        assert len(values) == 2
        assert table.rows[0]["agreement"] == pytest.approx(np.mean(values))

    def test_cost_is_measured_where_asked(self, comparison: Comparison) -> None:
        table = comparison.table(faithfulness=False)
        assert all(row["seconds"] > 0 and row["forwards"] > 0 for row in table.rows)
        assert "in forwards" in repr(table)


class TestCommand:
    def test_writes_a_picture(self, tmp_path: Path, pictures: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
        pictures[0].save(tmp_path / "a.png")
        compare_command(
            [str(tmp_path / "a.png")],
            "rollout,tokentm",
            targets="mug, key",
            output=tmp_path / "out.png",
            view="patches",
        )
        with Image.open(tmp_path / "out.png") as found:
            assert found.width > found.height / 2
        printed = capsys.readouterr().out
        assert printed.count("| tokentm |") == 2
        assert str(tmp_path / "out.png") in printed

    def test_prepares_pictures_as_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Any) -> None:
        pictures[0].resize((300, 200)).save(tmp_path / "a.png")
        seen: list[Comparison] = []
        monkeypatch.setattr(Comparison, "save", lambda self, *_, **__: seen.append(self))
        prepared = ["crop_mode=squash", "mean=[0.4, 0.5, 0.6]"]
        for words in ([], prepared):
            compare_command([str(tmp_path / "a.png")], "rollout", preprocessing=words, output=tmp_path / "out.png")
        usual, told = (each.subjects["scenes"].preprocessing for each in seen)
        assert usual is not None
        assert told is not None
        assert (told.crop_mode, told.mean, told.std) == ("squash", (0.4, 0.5, 0.6), usual.std)
        assert usual.crop_mode != "squash"

    def test_explains_classes_against_another(
        self, tmp_path: Path, pictures: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures[0].save(tmp_path / "a.png")
        options = {"targets": "mug, 3", "against": "key", "output": tmp_path / "out.png"}
        compare_command([str(tmp_path / "a.png")], "tokentm", **options)
        printed = capsys.readouterr().out
        assert printed.count("against key") == 2
        assert "mug against key" in printed

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"output": Path("a.gif")}, "--output"),
            ({"model": ["scenes", "scenes"], "labels": Path("x")}, "one model"),
            ({"against": "mug"}, "--targets"),
            ({"targets": "mug", "top": 2}, "found --top with --targets"),
        ],
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            compare_command(["a.png"], **options)

    def test_refuses_a_class_against_itself(self, tmp_path: Path, pictures: list[Any]) -> None:
        pictures[0].save(tmp_path / "a.png")
        options = {"targets": "key, 4", "against": CLASS_NAMES[4], "output": tmp_path / "out.png"}
        with pytest.raises(OptionError, match=r"--targets '4' and --against .*, which are one class"):
            compare_command([str(tmp_path / "a.png")], "tokentm", **options)

    def test_refuses_a_place_that_cannot_be_written_before_the_work(
        self, tmp_path: Path, pictures: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pictures[0].save(tmp_path / "a.png")
        (tmp_path / "out.png").mkdir()
        monkeypatch.setattr("vitexplain.comparison.run.compare", lambda *_, **__: pytest.fail("it is compared"))
        for output in ("out.png", "a.png/out.png"):
            with pytest.raises(ExportError, match=r"found a folder there|cannot use the folder"):
                compare_command([str(tmp_path / "a.png")], "tokentm", output=tmp_path / output)

    def test_leaves_out_what_cannot_be_read(
        self, tmp_path: Path, pictures: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        pictures[0].save(tmp_path / "b.png")
        for name in ("a.png", "c.png"):
            (tmp_path / name).write_bytes(b"no picture")
        output = tmp_path / "out.png"
        for _ in range(2):  # the second time the picture that was written lies there too
            with pytest.raises(typer.Exit) as ended:
                compare_command([str(tmp_path)], "tokentm", output=output, view="patches")
            assert ended.value.exit_code == 1
            printed, said = capsys.readouterr()
            assert "| b.png |" in printed
            assert "1 of 3 images compared" in printed
            assert [re.search(r"error: '.*(.)\.png'", line)[1] for line in said.splitlines()] == ["a", "c"]
        (tmp_path / "b.png").unlink()
        with pytest.raises(InputError, match="none of 2 images can be read"):
            compare_command([str(tmp_path)], "tokentm", output=output)


def test_plain_modules_are_told_apart_by_class(pictures: list[Any]) -> None:
    model: nn.Module = make_model("cls")
    found = compare(model, make_images("cls"), ["rollout"])
    assert found.model_names == {"VisionTransformer": "VisionTransformer"}
    assert "1 methods" in repr(found)
