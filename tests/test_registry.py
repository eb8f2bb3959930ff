"""Names, options and plug-ins."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_images, make_model
from torch import Tensor

import vitexplain
from vitexplain import (
    Capture,
    CaptureError,
    Explainer,
    ExplanationWarning,
    Method,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
    compare,
    create_method,
    get_explainer,
    list_methods,
    load_model,
    method_info,
    option,
    register_method,
    registry,
)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("attention_rollout", "rollout"),
        ("Attention Rollout", "rollout"),
        ("TokenTM", "tokentm"),
        ("token-tm", "tokentm"),
        ("grad-cam", "gradcam"),
        ("GradCAM", "gradcam"),
        ("Generic-Attention", "generic_attention"),
        ("GAE", "generic_attention"),
        ("raw attention", "raw_attention"),
    ],
)
def test_names_people_would_type(typed: str, name: str) -> None:
    assert method_info(typed).name == name


def test_misspelt_names_get_suggestions_and_the_whole_list() -> None:
    with pytest.raises(UnknownNameError) as caught:
        get_explainer("rolout", make_model("cls"))
    assert "did you mean 'rollout'" in str(caught.value)
    for name in list_methods():
        assert name in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"option of rollout called 'head_fuson' .did you mean 'head_fusion'"):
        create_method("rollout", head_fuson="mean")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rollout", {"head_fusion": "median"}, "head_fusion='median', expected 'mean' or 'max' or 'min'"),
        ("rollout", {"head_fusion": 1}, "head_fusion=1"),
        ("rollout", {"discard_ratio": 1.0}, "a number >= 0 and <= 0.99"),
        ("rollout", {"discard_ratio": float("nan")}, "discard_ratio=nan"),
        ("rollout", {"start_layer": 1.0}, "a whole number >= 0"),
        ("rollout", {"start_layer": True}, "a whole number >= 0"),
        ("tokentm", {"necc_scale": "N"}, "'tokens' or a number >= 0"),
        ("tokentm", {"length": 1}, "True or False"),
        ("tokentm", {"transformation": None}, "'value' or 'literal' or 'residual'"),
    ],
)
def test_option_values_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        create_method(name, **options)


def test_layers_beyond_the_model_are_refused_before_any_work() -> None:
    for name, options in (("rollout", {"start_layer": 3}), ("gradcam", {"layer": -4}), ("raw_attention", {"layer": 3})):
        with pytest.raises(vitexplain.UnsupportedModelError, match="expected -3 to 2"):
            get_explainer(name, make_model("cls"), **options)


def test_every_method_says_what_it_is(method: str) -> None:
    info = method_info(method)
    assert info.name == method
    assert info.title
    assert any(character.isdigit() for character in info.paper)
    assert Path(sys.modules[info.method.__module__].__file__).stem == method
    assert info.method.__module__ == f"vitexplain.methods.{method}"
    assert "Scores" in info.method.__doc__
    for each in info.options:
        assert each.help
        assert each.range


def test_filters() -> None:
    assert set(list_methods(class_specific=True)) | set(list_methods(class_specific=False)) == set(list_methods())
    assert "rollout" in list_methods(class_specific=False)
    assert list_methods(trainable=True) == ["diffmask", "diffmask_class", "iavit"]


def test_threads_that_come_first_all_find_the_methods() -> None:
    words = (
        "import threading; from vitexplain import method_info\n"
        "found = []\n"
        "threads = [threading.Thread(target=lambda: found.append(method_info('vit_cx').name)) for _ in range(4)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]\n"
        "assert found == ['vit_cx'] * 4, found"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.mark.usefixtures("_clean_registry")
def test_a_new_method_is_one_class() -> None:
    @register_method("uniform", title="Uniform", paper="none, 2026", class_specific=False, passes="1F")
    @dataclass(frozen=True)
    class Uniform(Method):
        level: float = option(1.0, "the score of every patch")

        def attribute(self, capture: Capture) -> Tensor:
            return capture.seed_row() * 0 + self.level

    explainer = get_explainer("uniform", make_model("cls"), level=2.5)
    from families import make_images

    with pytest.warns(ExplanationWarning, match="constant map"):
        explanation = explainer(make_images("cls"))
    assert explanation.scores.unique().tolist() == [2.5]
    assert explanation.diagnostics["constant"].all()
    assert explanation.options == {"level": 2.5}

    with pytest.raises(
        OptionError, match=r"'Rollout' of .*Other is already taken by vitexplain.methods.rollout.Rollout"
    ):
        register_method("Rollout", title="", paper="", class_specific=False, passes="1F")(type("Other", (Method,), {}))
    register_method("uniform", title="Again", paper="none", class_specific=False, passes="1F")(Uniform)
    assert method_info("uniform").title == "Again"


@pytest.mark.usefixtures("_clean_registry")
def test_a_class_of_the_same_name_from_elsewhere_replaces_nothing() -> None:
    before = method_info("saliency").method
    with pytest.raises(OptionError, match=r"'saliency' of elsewhere.Saliency is already taken by vitexplain.methods"):
        register_method("saliency", title="", paper="", class_specific=True, passes="1F")(
            type("Saliency", (Method,), {"__module__": "elsewhere"})
        )
    assert method_info("saliency").method is before


def test_options_take_numbers_of_numpy() -> None:
    method = create_method("smoothgrad", samples=np.int64(3), noise=np.float32(0.5))
    assert json.loads(json.dumps(method.options)) == {**create_method("smoothgrad").options, "samples": 3, "noise": 0.5}


def test_large_limits_are_said_to_the_last_digit() -> None:
    with pytest.raises(OptionError, match=r"expected a whole number >= 0 and <= 4294967295$"):
        create_method("rise", seed=2**32)


@pytest.mark.usefixtures("_clean_registry")
def test_what_is_declared_wrongly_is_said() -> None:
    with pytest.raises(OptionError, match=r"no_method: found .*NoMethod, expected a class derived from"):

        @register_method("no_method", title="", paper="", class_specific=False, passes="1F")  # type: ignore[type-var]
        class NoMethod:
            pass

    class Uniform(Method):
        def attribute(self, capture: Capture) -> Tensor:
            return capture.seed_row()

    @register_method("no_option", title="", paper="", class_specific=False, passes="1F")
    @dataclass(frozen=True)
    class NoOption(Uniform):
        level: float = 1.0

    with pytest.raises(OptionError, match=r"no_option: found the field level, .* expected level = option\(default"):
        create_method("no_option", level=2.0)
    with pytest.raises(OptionError, match="no_option: found the field level"):
        assert method_info("no_option").options

    @register_method("no_dataclass", title="", paper="", class_specific=False, passes="1F")
    class NoDataclass(Uniform):
        level: float = option(1.0, "what every token gets")

    with pytest.raises(
        OptionError, match=r"no_dataclass: found the option level .* expected @dataclass\(frozen=True\)"
    ):
        create_method("no_dataclass")


@pytest.mark.usefixtures("_clean_registry")
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float16])
def test_scores_come_in_single_precision_or_wider_whatever_a_method_returns(kind: torch.dtype) -> None:
    from families import make_images

    @register_method("narrow", title="Narrow", paper="none, 2026", class_specific=False, passes="1F")
    @dataclass(frozen=True)
    class Narrow(Method):
        def attribute(self, capture: Capture) -> Tensor:
            return (torch.arange(capture.num_tokens) % 2).to(kind).expand(len(capture.images), -1)

    assert get_explainer("narrow", make_model("cls"))(make_images("cls")).scores.dtype == torch.float32


@pytest.mark.usefixtures("_clean_registry")
def test_scores_that_are_no_tensor_are_refused() -> None:
    from families import make_images

    @register_method("array", title="Array", paper="none, 2026", class_specific=False, passes="1F")
    @dataclass(frozen=True)
    class Array(Method):
        def attribute(self, capture: Capture) -> Tensor:
            return capture.seed_row().numpy()  # type: ignore[return-value]

    with pytest.raises(CaptureError, match=r"array returned ndarray, expected scores as a torch\.Tensor"):
        get_explainer("array", make_model("cls"))(make_images("cls"))


@pytest.mark.usefixtures("_clean_registry")
def test_scores_of_a_wrong_shape_are_refused() -> None:
    @register_method("broken", title="Broken", paper="none, 2026", class_specific=False, passes="1F")
    @dataclass(frozen=True)
    class Broken(Method):
        def attribute(self, capture: Capture) -> Tensor:
            return capture.seed_row()[:, :3]

    from families import make_images

    with pytest.raises(vitexplain.CaptureError, match=r"broken returned scores of shape .2, 3."):
        get_explainer("broken", make_model("cls"))(make_images("cls"))


PLUGIN = """
from dataclasses import dataclass
from vitexplain import Method, register_method

@register_method("from_outside", title="Outside", paper="none, 2026", class_specific=False, passes="1F")
@dataclass(frozen=True)
class FromOutside(Method):
    def attribute(self, capture):
        return capture.seed_row()
"""


def test_entry_points_bring_methods_and_broken_ones_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(PLUGIN)
    wrong = PLUGIN.replace("from_outside", "wrong").replace("    def", "    level: float = 1.0\n    def")
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "plug-1.0.dist-info").mkdir()
    (tmp_path / "plug-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (tmp_path / "plug-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\nbroken = no_such_module\noutside = outside\nwrong = wrong\n"
    )
    script = (
        "import sys, warnings; sys.path[:0] = sys.argv[1:]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); import vitexplain; print(vitexplain.list_methods())\n"
        "print([str(each.message) for each in caught if 'plug-in' in str(each.message)])"
    )
    root = str(Path(vitexplain.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), root], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    names, warned = done.stdout.splitlines()[-2:]
    assert "from_outside" in names
    assert "tokentm" in names
    assert "'broken' (no_such_module) could not be loaded" in warned
    assert "wrong" not in names
    assert "(wrong) could not be loaded and is left out: OptionError: wrong: found the field level" in warned


def test_methods_and_models_in_each_other_s_place() -> None:
    model = make_model("cls")
    with pytest.raises(
        UnknownNameError, match=r"found a VisionTransformer, expected a method's name, and then the model"
    ):
        get_explainer(model, "rollout")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"found a Rollout.*goes into vitexplain.Explainer\(method, model\)"):
        get_explainer(create_method("rollout"), model)  # type: ignore[arg-type]
    for wrong in (None, 3):
        with pytest.raises(UnsupportedModelError, match=f"found a {type(wrong).__name__}, expected a torch.nn.Module"):
            get_explainer("rollout", wrong)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModelError, match=f"found a {type(wrong).__name__}, expected a torch.nn.Module"):
            compare(wrong, make_images("cls"))  # type: ignore[arg-type]


def test_a_configured_method_takes_what_load_model_returned() -> None:
    loaded = load_model("scenes")
    assert Explainer(create_method("rollout"), loaded).subject is loaded.subject
