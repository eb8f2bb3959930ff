"""Fixtures of all tests."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from families import EXACT_STATES, FEW_FAMILIES, NOT_DEFINED, TIMM, all_families, make_images, make_model
from golden_maps import MODELS
from on_paper import make_paper_model
from safetensors.torch import load_file
from support_matrix import SupportMatrix
from torch import Tensor, nn

from vitexplain import create_method, list_methods


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only contend


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test, and a peer that draws from the shared generators in it, sees the same numbers whatever ran before.

    They are others than those of any seed that a test gives a generator of its own.
    """
    torch.manual_seed(719_403)
    np.random.seed(719_403)


@pytest.fixture(scope="session")
def quantus() -> ModuleType:
    """Quantus, to compare with. It brings its own OpenCV, so `.[test]` leaves it out and `.ci/run` installs it."""
    if os.environ.get("VITEXPLAIN_PEERS") != "required":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("quantus", reason="compared with Quantus where that is installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Quantus and its imports warn of is not ours
        return importlib.import_module("quantus")


@pytest.fixture(scope="session")
def pytorch_grad_cam() -> ModuleType:
    """pytorch-grad-cam, to compare with; it brings its own OpenCV, so `.[test]` leaves it out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its imports warn of is not ours
        if os.environ.get("VITEXPLAIN_PEERS") != "required":
            pytest.importorskip("pytorch_grad_cam", reason="compared with pytorch-grad-cam where that is installed")
        return importlib.import_module("pytorch_grad_cam")


@pytest.fixture
def model(family: str) -> nn.Module:
    return make_model(family)


@pytest.fixture
def images(family: str) -> Tensor:
    return make_images(family)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-matrix", type=Path, help="Markdown file to write the support matrix to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--support-matrix")
    if path is not None and not hasattr(config, "workerinput"):  # workers of pytest-xdist report to the first process
        config.pluginmanager.register(SupportMatrix(path))


@pytest.fixture(autouse=True)
def _note_support(request: pytest.FixtureRequest) -> None:
    """Tells the support matrix which method ran on which family."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and {"method", "family"} <= parameters.params.keys():
        request.node.user_properties.append(("support", (parameters.params["method"], parameters.params["family"])))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for every method, one that takes `family` for every family.

    With both, a method that reads tokens or attention meets all of timm's families and one of each other kind, as what
    it does there has little to do with whose model it is; another method meets one of each kind. Marked `each_family`,
    a test meets every family with every method, marked `few_families` one of each kind.
    """
    by_method = "method" in metafunc.fixturenames
    by_family = "family" in metafunc.fixturenames
    marked = metafunc.definition.get_closest_marker
    families = EXACT_STATES if marked("exact_states") else sorted(TIMM if marked("timm_families") else all_families())
    methods = list_methods(trainable=False if marked("needs_no_training") else None)
    if by_method and by_family:
        chosen = {method: _families_for(method, families, marked) for method in methods}
        metafunc.parametrize(
            ("method", "family"),
            [(m, family) for m in methods for family in chosen[m] if (m, family) not in NOT_DEFINED],
        )
    elif by_method:
        metafunc.parametrize("method", methods)
    elif by_family:
        metafunc.parametrize("family", families)


def _families_for(method: str, families: Sequence[str], marked: Callable[[str], object]) -> list[str]:
    few = [name for name in families if name in FEW_FAMILIES]
    if marked("each_family"):
        return list(families)
    if marked("few_families") or not _reads_model(method):
        return few
    return [name for name in families if name in TIMM or name in few]


def _reads_model(method: str) -> bool:
    needs = create_method(method).needs
    return needs.any_attention or bool(needs.seen_states)


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: parity with reference data is not checked here")
    return Path(value)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real weights and images."""
    return _folder("VITEXPLAIN_TEST_DATA")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference maps."""
    return _folder("VITEXPLAIN_GOLDENS")


@pytest.fixture(scope="session")
def real_models(test_data: Path) -> dict[str, nn.Module]:
    """The two models of the reference maps, with their weights."""
    models: dict[str, nn.Module] = {}
    for name in MODELS:
        models[name] = timm.create_model(f"{name}_patch16_224").eval()
        models[name].load_state_dict(load_file(test_data / f"{name}_patch16_224_in1k" / "model.safetensors"))
    return models


@pytest.fixture(scope="session")
def real_inputs(goldens: Path) -> Any:
    """The images of the reference maps, as the models take them."""
    return np.load(goldens / "inputs.npz")


@pytest.fixture
def paper_model() -> nn.Module:
    """A model that is small enough for pen and paper."""
    return make_paper_model()
