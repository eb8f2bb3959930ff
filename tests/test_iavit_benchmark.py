"""The IA-ViT tables: runs are computed once, figures come from the runs, and the cost has its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitexplain.benchmarks import iavit, iavit_cost, iavit_tasks


def made_up(task: str, variant: str, seed: int, accuracy: float) -> dict[str, Any]:
    maps = {
        name: {"deletion": [0.2, 0.1, 0.3], "insertion": [0.5 + seed / 10, 0.4, 0.7 + seed / 10]} for name in iavit.MAPS
    }
    if variant == "plain":
        del maps["iavit"]
    figures = {"accuracy": accuracy, "interpreter accuracy": 0.5, "agreement": 0.6}
    return {"task": task, "variant": variant, "seed": seed, "figures": figures, "maps": maps}


def test_tables_have_means_and_deviations_over_seeds() -> None:
    runs = [made_up("cifar10", "kl", 0, 0.7), made_up("cifar10", "kl", 1, 0.8), made_up("cifar10", "plain", 0, 0.9)]
    lines = iavit.table([*runs, made_up("scenes", "kl", 2, 0.1)], "cifar10").splitlines()
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[-2:] == ["deletion ↓", "insertion ↑"]
    assert [row[0] for row in rows[1:]] == [
        *("plain, raw_attention", "plain, rollout"),
        *("kl, iavit", "kl, raw_attention", "kl, rollout"),
    ]
    assert rows[1][1:5] == ["1", "90.0", "–", "–"]
    assert rows[3][1:] == [
        "2",
        "75.0 ± 7.1",
        "50.0 ± 0.0",
        "60.0 ± 0.0",
        "20.0 ± 0.0 [10.0, 30.0]",
        "55.0 ± 7.1 [40.0, 75.0]",
    ]


def test_a_model_that_is_not_trained_is_plain_once() -> None:
    found = list(iavit.wanted([iavit_tasks.FROZEN, "scenes"], list(iavit_tasks.VARIANTS), 2))
    assert len(found) == len(set(found)) == 4 * len(iavit_tasks.VARIANTS) - 1
    assert (iavit_tasks.FROZEN, "plain", 1) not in found
    assert [seed for _, _, seed in found] == sorted(seed for _, _, seed in found)


def test_a_finished_run_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(iavit_tasks, "_painted", lambda split, count: painted(count if split == "train" else 6))
    arguments = [
        *("--tasks", iavit_tasks.FROZEN, "--runs", str(tmp_path / "runs"), "--seeds", "1", "--images", "4"),
        *("--scenes", "8", "--scenes-steps", "2", "--output", str(tmp_path / "table.md")),
    ]
    iavit.main([*arguments, "--at-most", "1"])
    first = tmp_path / "runs" / "frozen-scenes-plain-0.run.json"
    assert [each.name for each in (tmp_path / "runs").glob("*.run.json")] == [first.name]
    found = json.loads(first.read_text())
    assert found["figures"].keys() == {"accuracy", "interpreter accuracy", "agreement"}
    assert found["maps"].keys() == {"raw_attention", "rollout"}
    assert all(each.keys() == {"deletion", "insertion", "PxAP", "pointing"} for each in found["maps"].values())
    first.write_text(json.dumps({**found, "figures": {**found["figures"], "accuracy": 0.123}}))
    iavit.main([*arguments, "--at-most", "2"])
    assert set(json.loads((tmp_path / "runs" / "frozen-scenes-none-0.run.json").read_text())["maps"]) == {"iavit"}
    assert "12.3" in (tmp_path / "table.md").read_text()
    assert str(tmp_path) not in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit, match="choose another folder"):
        iavit.main([*arguments, "--at-most", "0", "--scenes-steps", "3"])
    capsys.readouterr()


def painted(count: int) -> list[Any]:
    from vitexplain.data import open_dataset

    return list(open_dataset("scenes", split="test", count=count))


def test_what_a_map_costs_is_a_ratio_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cost.md"
    iavit_cost.main(["--models", "vit_tiny_patch16_224", "--batch", "1", "--rounds", "2", "--output", str(output)])
    assert "largest ratio" in capsys.readouterr().out
    row = next(line for line in output.read_text().splitlines() if line.startswith("| vit_tiny"))
    low, median, high = (float(cell) for cell in row.strip("|").split("|")[1:])
    assert 0.5 < low <= median <= high < 10
