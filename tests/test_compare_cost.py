"""The driver that times a comparison: it runs, and its verdict follows from its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitexplain.benchmarks import compare_cost, measuring
from vitexplain.benchmarks.compare_cost import LIMIT, TOGETHER, dearest, report
from vitexplain.benchmarks.speed import Times


def test_the_driver_runs_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_cost, "random_vit", lambda name, size: measuring.random_vit(name, size, depth=2))
    arguments = ["--size", "32", "--batch", "1", "--rounds", "1", "--methods", "rollout", "gradcam"]
    compare_cost.main([*arguments, "--output", str(tmp_path)])
    text = (tmp_path / "compare_cost.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert f"| {TOGETHER} |" in text
    assert "2 methods together take at most 1.6" in text


@pytest.mark.parametrize(("together", "met"), [(LIMIT - 0.1, True), (LIMIT + 0.1, False)])
def test_the_verdict_is_about_the_dearest(together: float, met: bool) -> None:
    seconds = {"cheap": 0.5, "dear": 1.0, TOGETHER: together}
    times = {name: Times([value] * 3, [value] * 3) for name, value in seconds.items()}
    assert dearest(times, ["cheap", "dear"]) == "dear"
    text = report("vit", times, ["cheap", "dear"], "facts")
    assert f"**{'met' if met else 'not met'}**, largest ratio {together:.3f}" in text
