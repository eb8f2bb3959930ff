"""The package as users meet it: installed, built, or straight from a checkout, from any directory."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path

import pytest

import vitexplain

ROOT = Path(__file__).resolve().parent.parent
NEIGHBOURS = ("methods", "benchmarks")

# What takes seconds to import, or opens a window, is imported where it is used.
NOT_AT_IMPORT = {
    "captum",
    "cv2",
    "gradio",
    "lightning",
    "matplotlib",
    "pandas",
    "ray",
    "timm",
    "torchvision",
    "transformers",
    "typer",
    "zarr",
}
# Distributions whose import name is another.
IMPORT_NAMES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
# Never required, only used where they are: with the user's own model, in a notebook, or brought by timm and captum.
BORROWED = {"IPython", "pandas", "torchvision", "transformers", "triton"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    assert config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def places() -> list[tuple[Path, Path]]:
    """Every file of the package as (where it is in the tree, where a wheel has it)."""
    found = []
    for source, home in [("vitexplain", "vitexplain"), *((name, f"vitexplain/{name}") for name in NEIGHBOURS)]:
        for path in sorted((ROOT / source).rglob("*")):
            hidden = any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts)
            if path.is_file() and not hidden:
                found.append((path, Path(home) / path.relative_to(ROOT / source)))
    return found


def run(*command: str, cwd: Path, pythonpath: Path | None = None) -> str:
    """Runs Python in a process of its own; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\nin {cwd}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------ what setup.cfg says


def test_packages_listed_are_the_packages_there_are():
    listed = lines(setup_cfg()["options"]["packages"])
    there = {".".join(home.parent.parts) for _, home in places() if home.suffix == ".py"}
    assert sorted(listed) == sorted(there), "setup.cfg [options] packages differs from the tree"


def test_every_package_has_an_init_with_a_docstring():
    for name in lines(setup_cfg()["options"]["packages"]):
        folder = ROOT.joinpath(*name.split("."))
        neighbour = ROOT.joinpath(*name.split(".")[1:])
        source = folder / "__init__.py" if folder.is_dir() else neighbour / "__init__.py"
        assert source.is_file(), f"{name} has no __init__.py"
        assert ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))), f"{source} has no docstring"


def test_third_party_imports_are_declared():
    options = setup_cfg()
    required = lines(options["options"]["install_requires"])
    extras = [line for value in options["options.extras_require"].values() for line in lines(value)]
    names = [re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in required + extras]
    known = {IMPORT_NAMES.get(name, name) for name in names} | BORROWED | sys.stdlib_module_names | {"vitexplain"}
    for path, _ in places():
        if path.suffix != ".py" or ROOT / "benchmarks" in path.parents:  # a benchmark may try any peer that is there
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            roots = []
            if isinstance(node, ast.Import):
                roots = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                roots = [node.module.split(".")[0]]
            assert set(roots) <= known, f"{path.relative_to(ROOT)}:{node.lineno} imports {roots}, which setup.cfg lacks"


def test_one_opencv_and_it_is_headless():
    assert re.findall(r"opencv[\w-]*", setup_cfg()["options"]["install_requires"]) == ["opencv-python-headless"]


# ------------------------------------------------------------------------------------------ one version, one surface


def test_the_version_is_a_literal_that_setuptools_can_read():
    tree = ast.parse((ROOT / "vitexplain" / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__version__" for t in node.targets)
    ]
    assert [ast.literal_eval(value) for value in values] == [vitexplain.__version__]
    assert setup_cfg()["metadata"]["version"] == "attr: vitexplain.__version__"


def test_the_version_agrees_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(vitexplain.__version__)}\]", changelog, re.MULTILINE)
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"), "a second place for the version"
    try:
        installed = distribution("vitexplain")
    except PackageNotFoundError:
        return
    assert installed.version == vitexplain.__version__, "installed from an older tree: install again"


def test_every_public_name_exists_once():
    assert len(set(vitexplain.__all__)) == len(vitexplain.__all__)
    missing = [name for name in vitexplain.__all__ if not hasattr(vitexplain, name)]
    assert not missing


def test_the_command_line_entry_point_exists():
    (line,) = lines(setup_cfg()["options.entry_points"]["console_scripts"])
    name, _, value = line.partition(" = ")
    assert name == "vitexplain"
    assert callable(EntryPoint(name, value, "console_scripts").load())


# ------------------------------------------------------------------------------------------ imports from a checkout

WHERE = """
import vitexplain, vitexplain.methods, vitexplain.benchmarks
for module in (vitexplain, vitexplain.methods, vitexplain.benchmarks):
    print(module.__path__[0])
"""


def test_import_is_light():
    code = f"import sys, vitexplain; print(*[name for name in {NOT_AT_IMPORT!r} if name in sys.modules])"
    assert run("-c", code, cwd=ROOT) == ""


def test_a_checkout_is_importable_without_installing(tmp_path):
    expected = [str(ROOT / name) for name in ("vitexplain", *NEIGHBOURS)]
    assert run("-c", WHERE, cwd=ROOT).splitlines() == expected
    assert run("-c", WHERE, cwd=tmp_path, pythonpath=ROOT).splitlines() == expected


def test_a_checkout_does_not_take_its_methods_from_another_installation(tmp_path):
    other = tmp_path / "other"
    (other / "methods").mkdir(parents=True)
    (other / "methods" / "__init__.py").touch()
    # What an editable install of another checkout does: a finder that knows where the sub-packages are.
    install = f"""
import sys
from importlib.machinery import PathFinder
class Other:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(other)!r}]) if name == "vitexplain.methods" else None
sys.meta_path.append(Other)
"""
    assert run("-c", install + WHERE, cwd=ROOT).splitlines()[1] == str(ROOT / "methods")


def test_linking_twice_adds_one_finder():
    code = "import sys, vitexplain; before = len(sys.meta_path); vitexplain._checkout.link_neighbours()"
    assert run("-c", f"{code}; print(len(sys.meta_path) - before)", cwd=ROOT) == "0"


def test_nothing_else_of_the_repository_becomes_importable():
    for name in ("vitexplain.tests", "vitexplain.docs", "vitexplain.vitexplain"):
        assert importlib.util.find_spec(name) is None


def test_spawned_processes_find_methods(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        """
import importlib, inspect, multiprocessing, pkgutil

def find():
    import vitexplain.methods
    for each in pkgutil.iter_modules(vitexplain.methods.__path__):
        module = importlib.import_module("vitexplain.methods." + each.name)
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                return value

def name(value):
    return value.__module__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(name, (find(),)))
""",
        encoding="utf-8",
    )
    assert run(str(script), cwd=tmp_path, pythonpath=ROOT).startswith("vitexplain.methods.")


# ------------------------------------------------------------------------------------------ sdist and wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of this tree, and the wheel that comes out of that sdist. Needs no network: nothing is isolated."""
    setuptools = pytest.importorskip("setuptools", reason="building needs setuptools: pip install -e '.[test]'")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools>=77, found {setuptools.__version__}: pip install -e '.[test]'")
    place = tmp_path_factory.mktemp("built")
    tree = place / "tree"
    leave = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "vitexplain-*", "lightning_logs")
    shutil.copytree(ROOT, tree, ignore=leave)
    code = "import sys; out = sys.argv[1]; from setuptools import build_meta; build_meta.build_{}(out)"
    run("-c", code.format("sdist"), str(place), cwd=tree)
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    run("-c", code.format("wheel"), str(place), cwd=place / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = place.glob("*.whl")
    return sdist, wheel


def test_the_sdist_holds_sources_tests_and_papers(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    papers = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "setup.cfg", "pyproject.toml"}
    sources = {str(path.relative_to(ROOT).as_posix()) for path, _ in places() if path.suffix == ".py"}
    assert papers | sources | {"tests/test_packaging.py"} <= names


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    # Of benchmarks/ a user needs the code; the figures stay in the repository.
    left = {home for _, home in places() if home.parts[1] == "benchmarks" and home.suffix != ".py"}
    expected = {home.as_posix() for _, home in places() if home not in left}
    assert names == expected, "add the file type to [options.package_data], or move the file out of the package"
    assert "vitexplain/py.typed" in names


def test_the_wheel_has_the_command_and_the_license(built):
    with zipfile.ZipFile(built[1]) as wheel:
        info = {name.partition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
        assert "vitexplain = vitexplain.cli:main" in wheel.read(info["entry_points.txt"]).decode()
        assert "licenses/LICENSE" in info
        assert f"\nVersion: {vitexplain.__version__}\n" in wheel.read(info["METADATA"]).decode().replace("\r", "")


def test_the_wheel_works_from_anywhere(built, tmp_path):
    unpacked = tmp_path / "site"
    zipfile.ZipFile(built[1]).extractall(unpacked)
    inside = [str(unpacked / "vitexplain"), *(str(unpacked / "vitexplain" / name) for name in NEIGHBOURS)]
    assert run("-c", WHERE, cwd=Path(ROOT.anchor), pythonpath=unpacked).splitlines() == inside
    # In the root of the repository the current directory comes first: core and methods of the checkout, not a mixture.
    beside = [str(ROOT / name) for name in ("vitexplain", *NEIGHBOURS)]
    assert run("-c", WHERE, cwd=ROOT, pythonpath=unpacked).splitlines() == beside
    listing = "import vitexplain; print(*[getattr(each, 'name', each) for each in vitexplain.list_methods()])"
    methods = run("-c", listing, cwd=tmp_path, pythonpath=unpacked)
    assert methods
    assert methods == run("-c", listing, cwd=ROOT)
    data = "from importlib.resources import files; print(*sorted(f.name for f in files('vitexplain.assets').iterdir()))"
    there = {home.name for _, home in places() if home.parts[:2] == ("vitexplain", "assets")}
    assert there <= set(run("-c", data, cwd=tmp_path, pythonpath=unpacked).split())


# ------------------------------------------------------------------------------------------ README and CI


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_readme_has_the_command_that_ci_runs(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^<!-- command: {name} -->\n+```bash\n(.*?)\n```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"README.md needs one bash block after the line <!-- command: {name} -->"
    assert "\n" not in blocks[0], "the command is one line"
    assert blocks[0].strip()
