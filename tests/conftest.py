"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_images, make_model
from torch import Tensor, nn

from vitexplain import list_methods


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only contend


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> nn.Module:
    return make_model(family)


@pytest.fixture
def images(family: str) -> Tensor:
    return make_images(family)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for every method of the registry: adding one adds its tests."""
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", list_methods())


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
