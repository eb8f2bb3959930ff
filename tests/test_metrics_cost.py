"""The driver that times metrics: it runs, and its verdicts follow from the figures."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch

from vitexplain.benchmarks import measuring, metric_cost
from vitexplain.benchmarks.speed import Times

MADE_UP = {
    measuring.FORWARD: Times([1.0, 2.0], [1.0, 2.0]),
    "positive_perturbation": Times([11.0, 22.0], [30.0, 60.0]),
    "deletion": Times([38.0, 76.0], [20.0, 40.0]),
    metric_cost.SAME_WORK: Times([25.0, 50.0], [25.0, 50.0]),
    metric_cost.QUANTUS: Times([50.0, 100.0], [50.0, 100.0]),
}


def test_verdicts_follow_from_cpu_time() -> None:
    report = metric_cost.report(MADE_UP, 8, "random", "facts")
    positive, deletion, quantus = (line for line in report.splitlines() if line.startswith("- "))
    assert "`positive_perturbation` takes at most 12 forwards' time: **met**, largest ratio 11.000×" in positive
    assert "`deletion` takes at most 37 forwards' time: **not met**, largest ratio 38.000×" in deletion
    assert "Quantus PixelFlipping takes 2.00 [2.00, 2.00] times as long" in quantus
    assert report.endswith("facts\n")


@pytest.mark.peers
def test_every_candidate_runs(quantus: ModuleType) -> None:
    model, images = measuring.random_vit("vit_tiny_patch16_224", 96, depth=1), measuring.random_images(2, 96)
    runs = metric_cost.candidates(model, images, batch_size=4)
    assert set(metric_cost.LIMITS) | set(metric_cost.OTHERS) < set(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Quantus warns of is not ours
        results = {name: run() for name, run in runs.items()}
    flipped = torch.as_tensor(results[metric_cost.QUANTUS])
    ours = results[metric_cost.SAME_WORK]["probability"][:, 1:]
    torch.testing.assert_close(flipped.to(ours), ours, rtol=0, atol=1e-3)
    assert flipped.shape == (2, metric_cost.QUANTUS_STEPS)


@pytest.mark.peers
@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--only", "delition"]])
def test_wrong_arguments_are_refused(
    quantus: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        metric_cost.main(arguments)
    assert "error: " in capsys.readouterr().err
