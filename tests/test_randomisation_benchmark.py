"""The driver of the randomisation check: what it keeps, what it measures again, what its report says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_images, make_model
from PIL import Image
from torch import Tensor

from vitexplain import Subject, adapt
from vitexplain.benchmarks import randomisation
from vitexplain.benchmarks.randomisation import Plan
from vitexplain.benchmarks.randomisation_report import OTHER_IMAGE, TITLES, Record, draw, report, table_file
from vitexplain.metrics import randomisation_check
from vitexplain.models.loading import LoadedModel

STAGES = ("head", "block 1", "stem")
NAMES = ("centre_prior", "generic_attention", "occlusion", "random_scores", "rollout")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    vit = make_model("cls")
    return LoadedModel("tiny", vit, Subject(adapt(vit)), "random", 7)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return make_images("cls", batch=5)


@pytest.fixture(autouse=True)
def _small_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomisation, "_QUICK", Plan(5, STAGES))
    monkeypatch.setattr(randomisation, "PLANS", {"occlusion": Plan(3, ("stem",), {"window": 1})})


def test_figures_are_those_of_the_check(model: LoadedModel, photographs: Tensor, tmp_path: Path) -> None:
    records = randomisation.complete(model, photographs, NAMES, tmp_path)
    assert sorted(records) == sorted(NAMES)
    alone = randomisation_check("generic_attention", model.model, photographs)
    for stage in STAGES:
        np.testing.assert_allclose(records["generic_attention"].correlations[stage], alone.correlations[stage], 1e-4)
    assert records["occlusion"].images == 3
    assert records["occlusion"].label == "occlusion, window=1"
    assert set(records["occlusion"].correlations) == {"stem", OTHER_IMAGE}


def test_what_does_not_look_at_the_model_stays_the_same(
    model: LoadedModel, photographs: Tensor, tmp_path: Path
) -> None:
    records = randomisation.complete(model, photographs, ["random_scores", "centre_prior"], tmp_path)
    for record in records.values():
        assert all(record.estimates()[stage].value == pytest.approx(1) for stage in STAGES)
    assert records["centre_prior"].estimates()[OTHER_IMAGE].value == pytest.approx(1)
    assert abs(records["random_scores"].estimates()[OTHER_IMAGE].value) < 0.5


def test_only_what_is_missing_is_measured(
    model: LoadedModel, photographs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = randomisation.complete(model, photographs, NAMES[:3], tmp_path)
    measured: list[str] = []
    measure = randomisation.measure

    def watched(model: LoadedModel, images: Tensor, names: list[str], plan: Plan) -> list[tuple[str, Record]]:
        measured.extend(names)
        return measure(model, images, names, plan)

    monkeypatch.setattr(randomisation, "measure", watched)
    again = randomisation.complete(model, photographs, NAMES, tmp_path)
    assert measured == ["random_scores", "rollout"]
    assert {name: again[name] for name in NAMES[:3]} == first
    (tmp_path / "rollout.json").write_text("half a rec", encoding="utf-8")
    randomisation.complete(model, photographs, NAMES, tmp_path)
    assert measured[2:] == ["rollout"]
    randomisation.complete(model, photographs + 0.1, NAMES[:1], tmp_path)  # other photographs
    monkeypatch.setattr(randomisation, "PLANS", {"occlusion": Plan(3, ("stem",), {"window": 2})})
    randomisation.complete(model, photographs, ["occlusion"], tmp_path)
    assert measured[3:] == ["centre_prior", "occlusion"]


def test_report_and_plot() -> None:
    records = [
        Record(
            "", "first", {OTHER_IMAGE: [0.1, 0.3], **{each: [0.5, 0.7] for each in TITLES if each != OTHER_IMAGE}}, 2.0
        ),
        Record("", "second", {OTHER_IMAGE: [None, None], "stem": [1.0, None]}, 3.0),
    ]
    text = report(records, "facts")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    assert rows[0] == ["method", "images", *TITLES.values()]
    assert rows[2][:3] == ["first", "2", "0.20 [0.10, 0.30]"]
    assert rows[3] == ["second", "2", "–", "–", "–", "–", "–", "–", "1.00"]
    assert "`diffmask`" in text
    assert "5 s of computing" in text
    lines = table_file(records).splitlines()
    assert lines[0] == "method,random,mean,low,high,images"
    assert len(lines) == 1 + len(TITLES) + 2
    file = io.BytesIO()
    draw(records, file)
    assert Image.open(file).size[0] > 600


def test_the_command_wants_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VITEXPLAIN_TEST_DATA", raising=False)
    with pytest.raises(SystemExit):
        randomisation.main([])
    assert "--data, or VITEXPLAIN_TEST_DATA" in capsys.readouterr().err


def test_records_are_plain_json(model: LoadedModel, photographs: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        blind = make_model("cls")
        blind.head.weight.zero_()  # so that gradients vanish and maps are constant
    dull = LoadedModel("tiny", blind, Subject(adapt(blind)), "random", 7)
    record = randomisation.complete(dull, photographs, ["generic_attention"], tmp_path)["generic_attention"]
    assert record.correlations["head"] == [None] * 5
    kept = json.loads((tmp_path / "generic_attention.json").read_text(encoding="utf-8"))
    assert kept["correlations"]["head"] == [None] * 5
