"""Fixtures of all tests."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import EXACT_STATES, NOT_DEFINED, TIMM, all_families, make_images, make_model
from support_matrix import SupportMatrix
from torch import Tensor, nn

from vitexplain import list_methods


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only contend


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
    if path is not None:
        config.pluginmanager.register(SupportMatrix(path))


@pytest.fixture(autouse=True)
def _note_support(request: pytest.FixtureRequest) -> None:
    """Tells the support matrix which method ran on which family."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and {"method", "family"} <= parameters.params.keys():
        request.node.user_properties.append(("support", (parameters.params["method"], parameters.params["family"])))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for every method, one that takes `family` for every family."""
    by_method = "method" in metafunc.fixturenames
    by_family = "family" in metafunc.fixturenames
    marked = metafunc.definition.get_closest_marker
    families = EXACT_STATES if marked("exact_states") else sorted(TIMM if marked("timm_families") else all_families())
    methods = list_methods(trainable=False if marked("needs_no_training") else None)
    if by_method and by_family:
        pairs = [(m, f) for m in methods for f in families if (m, f) not in NOT_DEFINED]
        metafunc.parametrize(("method", "family"), pairs)
    elif by_method:
        metafunc.parametrize("method", methods)
    elif by_family:
        metafunc.parametrize("family", families)


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
