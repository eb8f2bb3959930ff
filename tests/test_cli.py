"""The command line as a user meets it: results, exit codes, and one line for everything that goes wrong."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import vitexplain
from vitexplain import ExplanationWarning, list_methods, method_info
from vitexplain.cli import app, main

LABELS = ["cat", "dog", "bird, fowl", "zebra", "crane", "crane", "fly"]
ROOT = Path(vitexplain.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, a broken one, weights and labels."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    save_file(model.state_dict(), folder / "tiny.safetensors")
    (folder / "labels.json").write_text(json.dumps(LABELS))
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "photos/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((200, 150)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def test_signs_that_the_output_cannot_hold_end_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "latin-1", write_through=True))
    monkeypatch.setattr(sys, "argv", ["vitexplain", "methods", "contributions"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert b"surroundings=0.1   \\u03b2: weight" in content.getvalue()


def run(*words: object, width: int = 100) -> Any:
    environment = {"COLUMNS": str(width), "NO_COLOR": "1", "FORCE_COLOR": None, "TERM": "dumb"}
    return CliRunner().invoke(app, [str(word) for word in words], env=environment)


def explain(folder: Path, *words: object, image: str = "a.png") -> Any:
    """`vitexplain explain` with the tiny model; later words win over its own."""
    weights = ["--model", "timm:test_vit", "--checkpoint", folder / "tiny.safetensors"]
    return run("explain", folder / image, *weights, "--labels", folder / "labels.json", *words)


def refusal(result: Any, *said: str) -> None:
    """Exit code 2 and one line on stderr that says so."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for words in said:
        assert re.search(words, lines[0]), (words, lines[0])


class TestExplain:
    def test_results(self, folder: Path, tmp_path: Path) -> None:
        words = ["--method", "Roll-Out", "--method", "tokentm", "--target", "zebra", "--target", 0]
        preparation = ["--mean", "0.4,0.5,0.6", "--crop-mode", "squash", "--size", 160, "--option", "head_fusion=max"]
        result = explain(folder, *words, *preparation, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"1 of 1 images explained. Results: {tmp_path}\n"
        assert result.stderr == ""
        stems = [f"a-{method}-{target}" for method in ("rollout", "tokentm") for target in (3, 0)]
        expected = ["a.json", *(f"{stem}{suffix}" for stem in stems for suffix in (".npy", ".png"))]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
        record = json.loads((tmp_path / "a.json").read_text())
        assert [each["label"] for each in record["maps"]] == ["zebra", "cat"] * 2
        assert record["maps"][0]["options"]["head_fusion"] == "max"
        assert "head_fusion" not in record["maps"][2]["options"]
        recorded = record["model"]["preprocessing"]
        assert (recorded["mean"], recorded["crop_mode"], recorded["size"]) == ([0.4, 0.5, 0.6], "squash", [160, 160])
        assert recorded["std"] == [0.5, 0.5, 0.5]
        assert np.load(tmp_path / "a-rollout-3.npy").shape == (10, 10)
        with Image.open(tmp_path / "a-rollout-3.png") as overlay:
            assert overlay.size == (160, 160)

    def test_defaults(self, folder: Path, tmp_path: Path) -> None:
        assert explain(folder, "--output", tmp_path).exit_code == 0
        (entry,) = json.loads((tmp_path / "a.json").read_text())["maps"]
        assert entry["method"] == "contributions"
        assert entry["label"] == LABELS[entry["class"]]

    def test_an_option_without_a_method_is_of_the_default_method(self, folder: Path, tmp_path: Path) -> None:
        assert explain(folder, "--option", "sharpness=1", "--output", tmp_path).exit_code == 0
        (entry,) = json.loads((tmp_path / "a.json").read_text())["maps"]
        assert (entry["method"], entry["options"]["sharpness"]) == ("contributions", 1)

    def test_folders_patterns_and_a_broken_file(self, folder: Path, tmp_path: Path) -> None:
        result = explain(folder, folder / "*.png", folder / "photos", folder / "b.jpg", "--output", tmp_path)
        assert result.exit_code == 1
        assert result.stdout.startswith("3 of 4 images explained.")
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert "broken.png" in line
        assert {path.stem for path in tmp_path.glob("*.json")} == {"a", "b", "c"}

    @pytest.mark.parametrize("output", [".", "maps"])
    def test_overlays_of_an_earlier_run_are_not_explained(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.png", "photos/c.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        for _ in range(2):
            result = explain(folder, "**/*.png", ".", "--output", output, image="a.png")
            assert result.stdout.startswith("3 of 3 images explained."), "the picture that is named, and the two here"
        (tmp_path / "photos" / "c.npy").write_bytes(b"features of somebody's own")
        (tmp_path / "photos" / "c.json").write_text("[]")
        result = explain(folder, "photos/*.png", ".", "--output", "elsewhere", image="a.png")
        assert result.stdout.startswith("3 of 3 images explained."), "overlays of another folder are none either"
        named = next((tmp_path / output).glob("a-*.png"))
        assert explain(folder, named, "--output", tmp_path / "others").stdout.startswith("2 of 2 images explained.")

    def test_overlays_of_earlier_runs_for_other_classes_are_not_explained(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "a-1.png").write_bytes((folder / "a.png").read_bytes())
        (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
        (tmp_path / "a-1.npy").write_bytes(b"features of somebody's own")
        for target in ("1", "2", "3"):
            words = ["--method", "rollout", "--target", target, "--output", tmp_path]
            assert run("explain", tmp_path, *words).stdout.startswith("2 of 2 images explained.")
        result = run("compare", tmp_path, "--methods", "rollout", "--output", tmp_path / "report.png")
        assert {line.split("|")[1].strip() for line in result.stdout.splitlines()[2:4]} == {"a.png", "a-1.png"}

    def test_preprocessing_in_one_option(self, folder: Path, tmp_path: Path) -> None:
        words = ["--preprocessing", "size=(96, 128)", "--preprocessing", "crop_mode=squash", "--std", "0.4,0.4,0.4"]
        assert explain(folder, *words, "--output", tmp_path).exit_code == 0
        said = json.loads((tmp_path / "a.json").read_text())["model"]["preprocessing"]
        assert (said["size"], said["crop_mode"], said["std"]) == ([96, 128], "squash", [0.4] * 3)

    def test_nothing_but_broken_files(self, folder: Path, tmp_path: Path) -> None:
        result = explain(folder, "--output", tmp_path, image="broken.png")
        assert result.exit_code == 1
        assert result.stdout.startswith("0 of 1 images explained.")

    def test_a_method_that_is_asked_twice_is_done_once(self, folder: Path, tmp_path: Path) -> None:
        words = ["--method", "gradcam", "--method", "grad-cam", "--target", "dog", "--target", "1"]
        assert explain(folder, *words, "--output", tmp_path).exit_code == 0
        assert len(json.loads((tmp_path / "a.json").read_text())["maps"]) == 1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--model", "vit_tiny"], ["no model called 'vit_tiny'", "scenes", "timm:ARCHITECTURE"]),
            (["--model", "timm:vit_tinny_patch16_224"], ["did you mean 'vit_tiny_patch16_224'"]),
            (["--model", "timm:pit_ti_224"], ["timm:pit_ti_224 is not supported: "]),
            (["--model", "timm:vit_tiny_patch16_224"], ["not of this architecture"]),
            (["--checkpoint", "none.pt"], ["no checkpoint at 'none.pt'"]),
            (["--checkpoint", __file__], [r"test_cli\.py' cannot be read as weights"]),
            (["--labels", "none.txt"], ["labels file 'none.txt' cannot be read"]),
            (["--method", "tokentn"], ["no method called 'tokentn' .did you mean 'tokentm'"]),
            (
                ["--method", "tokentm", "--option", "start_leyer=1"],
                ["no option of tokentm called 'start_leyer' .did you mean 'start_layer'"],
            ),
            (["--option", "start_layer"], ["--option: found 'start_layer', expected NAME=VALUE"]),
            (
                ["--method", "tokentm", "--option", "start_layer=1.0"],
                [r"tokentm: found start_layer=1\.0, expected a whole number >= 0"],
            ),
            (["--method", "tokentm", "--option", "start_layer="], ["found start_layer='', expected a whole number"]),
            (["--method", "tokentm", "--option", "length=1"], ["found length='1', expected True or False"]),
            (
                ["--method", "tokentm", "--option", "length=true", "--option", "length=false"],
                ["found length twice .'true' and 'false'"],
            ),
            (
                ["--method", "rollout", "--option", "head_fusion=median"],
                ["'median', expected 'mean' or 'max' or 'min'"],
            ),
            (["--method", "tokentm", "--option", "start_layer=99"], ["99"]),
            (["--target", "-1"], ["found class -1, expected 0 to 6"]),
            (["--target", "5000"], ["found class 5000, expected 0 to 6"]),
            (["--target", "crane"], [r"ambiguous: 4 \(crane\), 5 \(crane\)\. Give the index"]),
            (["--target", "zebar"], ["no class called 'zebar' .did you mean 'zebra'"]),
            (["--device", "cuda:77"], ["the device 'cuda:77' cannot be used .*available: cpu"]),
            (["--size", "160y160"], ["--size: found '160y160', expected a size such as 224 or 224x160"]),
            (["--size", "96x90"], ["cannot take inputs of 96x90 pixels"]),
            (["--size", "-160"], ["--size: found '-160', expected a size"]),
            (["--preprocessing", "size=160y160"], ["--preprocessing size: found '160y160', expected a size such as"]),
            (["--preprocessing", "size"], ["--preprocessing: found 'size', expected NAME=VALUE"]),
            (["--preprocessing", "size=96", "--preprocessing", "size=160"], ["found size twice"]),
            (["--preprocessing", "size=96", "--size", "160"], ["found size in --preprocessing and in an option of"]),
            (["--preprocessing", "crop_fraction=most"], ["found 'most', expected a number such as 0.9"]),
            (["--preprocessing", "crop=squash"], ["the setting is 'crop', expected one of size, mean"]),
            (["--model", "scenes"], [r"no description 'tiny\.json' beside it.*add --model timm:ARCHITECTURE"]),
            (["--model", "scenes", "--checkpoint", "none.safetensors"], ["no checkpoint at 'none.*no such file"]),
            (["--mean", "0.5"], ["--mean: found '0.5', expected 3 numbers such as"]),
            (["--std", "0.5,0,0.5"], ["std is .*, expected three numbers above 0"]),
            (["--interpolation", "cubic"], ["interpolation is 'cubic', expected one of .*bicubic"]),
            (["--crop-fraction", "0"], ["crop_fraction is 0.0"]),
            (["--batch-size", "0"], ["batch_size=0"]),
            (["--output", __file__], ["cannot use the folder .*FileExistsError"]),
            (["--output", f"{__file__}/x"], ["cannot use the folder .*NotADirectoryError"]),
            (["nowhere/*.jpg"], ["no images at 'nowhere/.*nothing matches the pattern"]),
        ],
    )
    def test_what_cannot_be_carried_out(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: list[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        refusal(explain(folder, *words), *said)
        assert not list(tmp_path.rglob("*.*")), "nothing was written"

    def test_weights_that_no_network_brings(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("vitexplain.models.hub.is_cached", lambda _: False)
        result = run("explain", folder / "a.png", "--model", "timm:test_vit", "--output", tmp_path)
        refusal(result, "could not be fetched .HF_HUB_OFFLINE is set", r"scenes.*--checkpoint")

    def test_a_message_comes_before_a_download(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create = timm.create_model
        monkeypatch.setattr("vitexplain.models.hub.is_cached", lambda _: False)
        monkeypatch.setattr("vitexplain.models.hub.offline_cause", lambda: "")
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
        result = run("explain", folder / "a.png", "--model", "timm:test_vit", "--target", 3, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        assert result.stderr.splitlines()[0] == "fetching the pretrained weights of timm:test_vit from the hub"
        assert logging.getLogger("vitexplain").handlers == []

    @pytest.mark.parametrize("kind", ["python", "torch"])
    def test_out_of_memory(self, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            if kind == "python":
                raise MemoryError
            torch.empty(10**15)  # more than there is

        monkeypatch.setattr("vitexplain.explain_files.explain_with", fail)
        refusal(explain(folder, "--output", tmp_path), "out of memory .*smaller --batch-size")

    def test_a_bug_of_ours_is_not_dressed_up(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError("deep inside")

        monkeypatch.setattr("vitexplain.explain_files.explain_with", fail)
        assert isinstance(explain(folder, "--output", tmp_path).exception, ZeroDivisionError)

    def test_warnings_are_one_line_each_and_only_ours(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vitexplain.explain_files import explain_with

        def with_warnings(*args: Any) -> Any:
            warnings.warn("gave a constant map for images [0]:\ncause", ExplanationWarning, stacklevel=1)
            warnings.warn("theirs", UserWarning, stacklevel=1)
            return explain_with(*args)

        monkeypatch.setattr("vitexplain.explain_files.explain_with", with_warnings)
        shown = warnings.showwarning
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            others: list[str] = []
            monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: others.append(str(message)))
            result = explain(folder, folder / "b.jpg", "--batch-size", 1, "--output", tmp_path)
            monkeypatch.setattr(warnings, "showwarning", shown)
        assert result.exit_code == 0
        assert result.stderr.splitlines() == [
            f"warning: gave a constant map for {str(folder / name)!r}: cause" for name in ("a.png", "b.jpg")
        ]
        assert set(others) == {"theirs"}


class TestOtherCommands:
    def test_methods(self) -> None:
        result = run("methods", width=80)
        assert result.exit_code == 0
        for name in list_methods():
            info = method_info(name)
            assert re.search(rf"^{name}   ", result.stdout, re.MULTILINE)
            assert info.title in result.stdout
            assert info.passes in result.stdout
            for each in info.options:
                assert f"--option {each.name}={each.default}" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80

    def test_methods_by_pattern(self) -> None:
        for pattern, names in (("*cam", {"agcam", "eigencam"}), ("Token-TM", {"tokentm"})):
            listed = set(re.findall(r"^(\w+)   ", run("methods", pattern).stdout, re.MULTILINE))
            assert names <= listed <= {name for name in list_methods() if "cam" in name} | {"tokentm"}
        refusal(run("methods", "tokentn"), "no method called 'tokentn' .did you mean 'tokentm'")

    def test_models(self) -> None:
        result = run("models", "test_vit")
        assert result.stdout.split() == ["timm:test_vit"]
        assert run("models", "scenes").stdout.startswith("scenes ")
        refusal(run("models", "risnet*"), r"no model that can be explained matches 'risnet\*'")

    def test_models_that_are_not_built_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("built"))
        result = run("models", "timm:resnet1*")
        assert (result.exit_code, result.stdout) == (0, "")
        number = len(timm.list_models("resnet1*"))
        said = rf"{number} other architectures of timm match 'timm:resnet1\*' \(timm:resnet10t, .*, …\).*Grad-CAM"
        assert re.search(said, result.stderr)

    def test_version(self) -> None:
        assert run("--version").stdout == f"vitexplain {vitexplain.__version__}\n"

    @pytest.mark.parametrize("width", [80, 120])
    @pytest.mark.parametrize("command", [[], ["demo"], ["explain"], ["methods"], ["models"], ["train", "classifier"]])
    def test_help(self, command: list[str], width: int) -> None:
        result = run(*command, "--help", width=width)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert "Traceback" not in result.output
        if command:
            examples = [line.strip() for line in lines if line.startswith(f" vitexplain {command[0]}")]
            assert examples, "--help shows an example"
            following = [lines[index + 1].strip() for index, line in enumerate(lines) if line.strip() in examples]
            assert not any(following), "an example is one line, to be copied"

    def test_help_says_what_the_defaults_are(self) -> None:
        text = re.sub(r"[\s│]+", " ", run("explain", "--help", width=80).stdout)
        for default in ("auto", "the predicted class", "scenes", "8", "vitexplain-output", "the model's own", "cpu"):
            assert f"[default: {default}]" in text

    @pytest.mark.parametrize(
        ("reason", "said"),
        [
            ((), "results finished before this are complete"),
            (("stopped after 3 steps:\nresume",), "stopped after 3 steps: resume"),
        ],
    )
    def test_an_interruption_says_what_it_knows(
        self, reason: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt(*reason)

        monkeypatch.setattr("vitexplain.demo.make_demo", interrupted)
        result = run("demo")
        assert result.exit_code == 130
        assert result.stderr == f"interrupted; {said}\n"

    def test_misuse(self) -> None:
        for words in (["explain"], ["explian"], ["explain", "a.png", "--batch-size", "many"], ["explain", "--colour"]):
            result = run(*words)
            assert result.exit_code == 2
            assert "Usage:" in result.output
            assert "Traceback" not in result.output


class TestProcesses:
    """The same through `python -m vitexplain`, where nothing stands between a mistake and the user."""

    def start(
        self, folder: Path, *words: object, weights: str = "tiny.safetensors", **variables: str
    ) -> subprocess.Popen[str]:
        model = ["--model", "timm:test_vit", *(["--checkpoint", weights] if weights else [])]
        command = [sys.executable, "-m", "vitexplain", "explain", *map(str, (*words, *model))]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        # a shell that runs the tests in the background has them, and what they start, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def test_some_failed(self, folder: Path, tmp_path: Path) -> None:
        process = self.start(folder, "a.png", "broken.png", "--output", tmp_path)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert output == f"1 of 2 images explained. Results: {tmp_path}\n"
        assert re.fullmatch(r"error: 'broken\.png' .*\n", errors)

    def test_a_reader_that_has_enough_is_no_error(self) -> None:
        words = [sys.executable, "-m", "vitexplain", "methods"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 0

    def test_not_carried_out(self, folder: Path, tmp_path: Path) -> None:
        process = self.start(folder, "a.png", "--target", "-1", "--output", tmp_path)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert output == ""
        assert errors == "error: found class -1, expected 0 to 6: the model has 7 classes\n"

    def test_cached_weights_need_no_network(self, folder: Path, tmp_path: Path) -> None:
        torch.manual_seed(1)
        cache = tmp_path / "home" / "hub" / "models--timm--test_vit.r160_in1k"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0123abcd")
        (cache / "snapshots" / "0123abcd").mkdir(parents=True)
        save_file(timm.create_model("test_vit").state_dict(), cache / "snapshots" / "0123abcd" / "model.safetensors")
        process = self.start(folder, "a.png", "--output", tmp_path, weights="", HF_HOME=str(tmp_path / "home"))
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        assert json.loads((tmp_path / "a.json").read_text())["model"]["weights"] == "hub:timm/test_vit.r160_in1k"

    @pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
    def test_interrupted(self, folder: Path, tmp_path: Path) -> None:
        picture = (folder / "a.png").read_bytes()
        (tmp_path / "in").mkdir()
        for index in range(2000):
            (tmp_path / "in" / f"{index}.png").write_bytes(picture)
        output = tmp_path / "out"
        process = self.start(folder, tmp_path / "in", "--batch-size", 1, "--output", output)
        try:
            deadline = time.monotonic() + 100
            while not list(output.glob("*.json")) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert errors == "interrupted; results finished before this are complete\n"
        records = list(output.glob("*.json"))
        assert 0 < len(records) < 2000
        for record in records:
            for entry in json.loads(record.read_text())["maps"]:
                assert np.load(output / entry["scores"]).shape == (10, 10)
                with Image.open(output / entry["overlay"]) as overlay:
                    overlay.load()
        assert not list(output.glob(".*"))


@pytest.mark.parity
def test_real_photographs(test_data: Path, tmp_path: Path) -> None:
    result = run(
        *("explain", test_data / "xai_samples" / "*koala*", test_data / "xai_samples" / "*tractor*"),
        *("--model", "timm:vit_tiny_patch16_224", "--output", tmp_path),
        *("--checkpoint", test_data / "vit_tiny_patch16_224_in1k" / "model.safetensors"),
    )
    assert result.exit_code == 0, result.output
    labels = {
        path.stem.split("__")[1]: json.loads(path.read_text())["maps"][0]["label"] for path in tmp_path.glob("*.json")
    }
    assert labels["koala"].startswith("koala")
    assert labels["tractor"] == "tractor"
