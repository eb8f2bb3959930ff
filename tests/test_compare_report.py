"""The report: one page that needs nothing else, shows what the comparison says, and runs nobody's code but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_model
from PIL import Image

from vitexplain import Capture, Comparison, Needs, Subject, adapt, compare, load_model
from vitexplain.comparison.attention_rows import attention_rows, count_bytes
from vitexplain.comparison.charts import HEIGHT, MARGIN, WIDTH, make_charts
from vitexplain.data.scenes import SPLITS, make_scene
from vitexplain.preprocessing import Preprocessing

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    pictures = [Image.fromarray(make_scene(index, num_objects=2).image) for index in SPLITS["test"][:2]]
    return compare("scenes", pictures, ["rollout", "tokentm"])


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    return comparison.save(tmp_path_factory.mktemp("report") / "report.html").read_text()


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else ""
        if self._inside:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside][-1] += data


def data_of(page: str) -> dict[str, list[dict[str, object]]]:
    content: dict[str, list[dict[str, object]]] = json.loads(Elements(page).raw["script"][0])
    return content


class TestPage:
    def test_needs_nothing_else(self, page: str) -> None:
        for tag, attributes in Elements(page).found:
            assert tag not in ("link", "iframe", "object", "embed", "base")
            for name in ("src", "href", "action", "data"):
                assert (attributes.get(name) or "data:").startswith("data:")
            assert not any(name.startswith("on") for name in attributes)
        assert set(re.findall(r"url\((\w+):", page)) == {"data"}
        assert "@import" not in page

    def test_names_its_one_script_and_style_by_their_digests(self, page: str) -> None:
        elements = Elements(page)
        (policy,) = [
            each["content"] for tag, each in elements.found if each.get("http-equiv") == "Content-Security-Policy"
        ]
        _, script = elements.raw["script"]
        (style,) = elements.raw["style"]
        for kind, text in (("script-src", script), ("style-src", style)):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{kind} 'sha256-{digest}'" in str(policy)
        assert str(policy).startswith("default-src 'none'")

    def test_scores_are_those_of_the_comparison(self, page: str, comparison: Comparison) -> None:
        maps = iter(data_of(page)["maps"])
        for case in comparison.cases:
            for label in comparison.methods:
                written = next(maps)
                assert written["grid"] == [12, 12]
                np.testing.assert_allclose(written["scores"], comparison.scores(case, label).flatten(), rtol=1e-3)
        assert next(maps, None) is None

    def test_attention_is_that_of_the_model(self, page: str) -> None:
        model = load_model("scenes")
        picture = Image.fromarray(make_scene(SPLITS["test"][1], num_objects=2).image)
        with Capture(model.subject.adapter, Needs(attention=True)) as capture, torch.no_grad():
            capture.forward(model.preprocessing([picture]))
            expected = torch.stack([block.attention().mean(1)[0] for block in capture.blocks])[..., 1:]
        written = data_of(page)["attention"][1]
        assert (written["blocks"], written["prefix"], written["grid"]) == (6, 1, [12, 12])
        levels = np.frombuffer(base64.b64decode(str(written["levels"])), np.uint8).reshape(6, 145, 144)
        peaks = np.frombuffer(base64.b64decode(str(written["peaks"])), "<f4").reshape(6, 145, 1)
        on_patches = np.frombuffer(base64.b64decode(str(written["onPatches"])), "<f4").reshape(6, 145)
        np.testing.assert_allclose(levels / 255 * peaks, expected, atol=float(peaks.max()) / 400)
        np.testing.assert_allclose(on_patches, expected.sum(-1), rtol=1e-5)

    def test_says_what_was_measured_and_how_it_was_made(self, page: str, comparison: Comparison) -> None:
        for row in comparison.table(cost=False).rows:
            assert f">{row['deletion']:.3f}<" in page
        for text in ("Attention rollout", "head_fusion=mean", "predicted class", "SHA-256", "in forward passes"):
            assert text in page

    def test_hostile_names_are_text(self, comparison: Comparison) -> None:
        from vitexplain.comparison.report import render_report

        labels = [HOSTILE] * 12
        spoiled = replace(
            comparison,
            images=[HOSTILE] * 2,
            methods={HOSTILE if name == "tokentm" else name: each for name, each in comparison.methods.items()},
            subjects={HOSTILE: comparison.subjects["scenes"]},
            model_names={HOSTILE: HOSTILE},
            explanations={
                (HOSTILE, HOSTILE if name == "tokentm" else name): replace(each, labels=labels)
                for (_, name), each in comparison.explanations.items()
            },
            refusals={(HOSTILE, "other"): HOSTILE},
        )
        text = render_report(spoiled, title=HOSTILE, faithfulness=False, cost=False, attention=False)
        elements = Elements(text)
        assert len(elements.raw["script"]) == 2
        assert not any("onerror" in attributes for _, attributes in elements.found)
        assert "alert(1)" in text
        assert "<script>alert" not in text
        html = spoiled._repr_html_()
        assert html.count("<") == 1

    def test_without_measurements(self, comparison: Comparison) -> None:
        from vitexplain.comparison.report import render_report

        text = render_report(comparison, faithfulness=False, cost=False, attention=False, share_scale=True)
        assert "polyline" not in text.split("<script")[0]
        assert "in forward passes" not in text
        assert "one range for all maps of a method" in text
        assert data_of(text)["attention"] == [None, None]


class TestAttentionRows:
    def test_are_left_out_where_they_would_take_too_much_room(
        self, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vitexplain.comparison import scene
        from vitexplain.comparison.report import render_report

        subject = comparison.subjects["scenes"]
        assert count_bytes(subject, (96, 96)) == 6 * 145 * 144
        monkeypatch.setattr(scene, "_MOST_ATTENTION", 2 * 6 * 145 * 144 - 1)
        text = render_report(comparison, faithfulness=False, cost=False)
        assert data_of(text)["attention"] == [None, None]
        assert "is left out" in text

    def test_there_are_none_where_tokens_change(self) -> None:
        import timm

        torch.manual_seed(0)
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), window_size=7, num_classes=3
        )
        subject = Subject(adapt(swin), Preprocessing((56, 56), (0.5,) * 3, (0.5,) * 3))
        assert attention_rows(subject, torch.randn(1, 3, 56, 56)) is None

    def test_prefix_tokens_are_not_patches(self) -> None:
        subject = Subject(adapt(make_model("registers")))
        (rows,) = attention_rows(subject, torch.randn(1, 3, 32, 48)) or [None]
        assert rows is not None
        assert rows.levels.shape == (3, 5 + 24, 24)
        assert (rows.levels.max(-1) == 255).all()
        assert (rows.on_patches < 1).all()


def test_charts_stay_within_their_drawing(comparison: Comparison) -> None:
    case = comparison.cases[0]
    deletion, insertion = make_charts(comparison, case)
    assert (deletion.better, insertion.better) == ("lower", "higher")
    for chart in (deletion, insertion):
        assert [line.number for line in chart.lines] == [0, 1]
        for line in chart.lines:
            points = np.array([[float(each) for each in pair.split(",")] for pair in line.points.split()])
            assert points[:, 0].tolist() == sorted(points[:, 0])
            assert (points[0, 0], points[-1, 0]) == (MARGIN, WIDTH - MARGIN)
            assert points[:, 1].min() >= MARGIN
            assert points[:, 1].max() <= HEIGHT - MARGIN
    start = float(deletion.lines[0].points.split()[0].split(",")[1])
    assert start == pytest.approx(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * case.probability, abs=0.06)


def test_the_page_is_written_whole(comparison: Comparison, tmp_path: Path) -> None:
    path = comparison.save(tmp_path / "deep" / "r.html", faithfulness=False, cost=False, attention=False)
    assert path.read_text().rstrip().endswith("</html>")
    assert [each.name for each in path.parent.iterdir()] == ["r.html"]
