"""What the documents say is true: tables equal the registry, examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vitexplain import get_explainer, list_methods, method_info, registry

ROOT = Path(__file__).resolve().parent.parent


def methods_table() -> str:
    """The README's table of methods, from the registry."""
    rows = ["| name | method | class-specific | passes | paper |", "|---|---|---|---|---|"]
    for name in list_methods():
        info = method_info(name)
        rows.append(
            f"| `{name}` | {info.title} | {'yes' if info.class_specific else 'no'} | {info.passes} | {info.paper} |"
        )
    return "\n".join(rows)


def test_the_table_of_methods_is_the_registry() -> None:
    text = (ROOT / "README.md").read_text()
    written = text.split("<!-- methods -->\n")[1].split("\n<!-- end of methods -->")[0]
    assert written == methods_table(), f"paste this into README.md:\n{methods_table()}"


def test_the_support_matrix_has_every_family_and_method() -> None:
    from families import NOT_DEFINED, all_families
    from support_matrix import TITLES

    assert set(TITLES) == set(all_families())
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "support.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert rows[0] == ["| family", *list_methods()[:-1], f"{list_methods()[-1]} |"]
    found = {row[0].removeprefix("| "): [cell.strip("| ") for cell in row[1:]] for row in rows[1:]}
    assert set(found) == {TITLES[family] for family in all_families()}
    for family in all_families():
        for method, cell in zip(list_methods(), found[TITLES[family]], strict=True):
            assert cell == "–" if (method, family) in NOT_DEFINED else int(cell) > 0


def test_pictures_and_links_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} points to {link}"


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_the_method_of_the_page_on_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from families import make_images, make_model

    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    exec(block, {"__name__": __name__})
    model, images = make_model("cls"), make_images("cls")
    found = get_explainer("attended", model)(images, torch.tensor([[1, 2], [1, 2]]))
    assert found.scores.amin() >= 0
    assert not torch.equal(found.scores[:, 0], found.scores[:, 1])


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)).save("photo.jpg")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert Path("explained.png").stat().st_size > 0
    assert Path("methods.png").stat().st_size > 0
    assert names["tokentm"].scores.shape == (4, 14, 14)


def test_the_page_about_performance_has_the_summary_of_the_table_of_peers() -> None:
    report = (ROOT / "benchmarks" / "results" / "peers.md").read_text(encoding="utf-8")
    summary = next(part for part in report.split("\n\n") if part.startswith("| here | other |"))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert summary in page, f"paste this into docs/performance.md:\n{summary}"
