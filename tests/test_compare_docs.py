"""Quick start and troubleshooting: examples run, messages that are quoted can come."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUICK_START = ROOT / "docs" / "quick-start.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


def messages() -> list[str]:
    """All texts in the source, what is filled in standing as ``…``."""
    found = []
    for folder in ("vitexplain", "methods"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [each.value if isinstance(each, ast.Constant) else "…" for each in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_message_that_is_quoted_is_one() -> None:
    known = "\n".join(messages())
    quoted = re.findall(r"^> (.+)$", TROUBLESHOOTING.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) > 25
    assert [each for each in quoted if each not in known] == []


def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", QUICK_START.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert {each.name for each in tmp_path.iterdir()} == {"side-by-side.png", "patches.png", "raw.png", "report.html"}


def test_pictures_are_no_larger_than_they_must_be() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 800_000, picture.name
