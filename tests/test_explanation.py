"""`Explanation`: views of the scores, slicing, saving; and inputs given as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_images, make_model
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitexplain import (
    Explainer,
    Explanation,
    InputError,
    OptionError,
    TargetError,
    UnknownNameError,
    UnsupportedModelError,
    adapt,
    create_method,
    explain_with,
    get_explainer,
)
from vitexplain.preprocessing import Preprocessing
from vitexplain.subject import Subject

PREPROCESSING = Preprocessing(size=(32, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_fraction=1.0)


@pytest.fixture
def subject() -> Subject:
    return Subject(adapt(make_model("cls")), PREPROCESSING, tuple("abcdefg"))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def test_heatmaps_are_upsampled_and_in_range() -> None:
    explanation = get_explainer("generic_attention", make_model("cls"))(make_images("cls"), [1, 5])
    heatmaps = explanation.heatmap()
    assert heatmaps.shape == (2, 32, 48)
    assert heatmaps.flatten(1).amin(1).tolist() == [0.0, 0.0]
    assert heatmaps.flatten(1).amax(1).tolist() == [1.0, 1.0]
    assert explanation.heatmap((64, 20), mode="nearest").shape == (2, 64, 20)
    shared = explanation.heatmap(scale="shared")
    assert shared.max() == 1.0
    assert (shared.flatten(1).amax(1) < 1).any()


def test_signed_heatmaps_have_zero_in_the_middle() -> None:
    explanation = get_explainer("gradcam", make_model("cls"), relu=False)(make_images("cls"))
    assert explanation.signed
    heatmaps = explanation.heatmap((4, 6))
    positive = explanation.scores > 0
    assert (heatmaps[positive] > 0.5).all()
    assert (heatmaps[explanation.scores < 0] < 0.5).all()


def test_probabilities_are_those_of_the_targets() -> None:
    model, images = make_model("cls"), make_images("cls")
    softmax = model(images).softmax(1).detach()
    explainer = get_explainer("rollout", model)
    torch.testing.assert_close(explainer(images).probabilities, softmax.amax(1))
    torch.testing.assert_close(explainer(images, 3).probabilities, softmax[:, 3])
    torch.testing.assert_close(explainer(images, [[0, 1], [2, 3]]).probabilities[1], softmax[1, 2:4])
    torch.testing.assert_close(explainer(images, lambda z: z[:, 0]).probabilities, softmax.amax(1))


def test_slices_hold_the_same_maps() -> None:
    explanation = get_explainer("tokentm", make_model("cls"))(make_images("cls", batch=3), torch.tensor([[0, 1]] * 3))
    part = explanation[1]
    assert len(part) == 1
    assert isinstance(part, Explanation)
    torch.testing.assert_close(part.scores, explanation.scores[1:2])
    torch.testing.assert_close(explanation[-1].logits, explanation.logits[2:])
    for number in (np.int64(1), np.array(1), torch.tensor(1)):
        torch.testing.assert_close(explanation[number].scores, part.scores)
    assert len(explanation[1:]) == 2
    assert explanation[:2].diagnostics["prefix_share"].shape == (2, 2)
    with pytest.raises(IndexError, match="found image 3"):
        explanation[3]
    assert [each.scores.shape[0] for each in explanation] == [1, 1, 1]


def test_pictures_files_and_tensors_give_the_same_map(subject: Subject, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "photo.png")
    explainer = Explainer(create_method("tokentm"), subject)
    by_tensor = explainer(PREPROCESSING([picture]), 2)
    for given in (picture, [picture], tmp_path / "photo.png", str(tmp_path / "photo.png")):
        torch.testing.assert_close(explainer(given, 2).scores, by_tensor.scores)
    torch.testing.assert_close(explainer(PREPROCESSING(picture), 2).scores, by_tensor.scores)
    np.testing.assert_array_equal(by_tensor.pictures()[0], np.asarray(PREPROCESSING.view(picture)))


def test_what_pipelines_hand_out_gives_the_same_map(subject: Subject, picture: Image.Image) -> None:
    explainer = get_explainer("generic_attention", subject)
    tensor = subject.prepare([picture] * 2)
    expected = explainer(tensor, 1).scores
    array = np.asarray(picture)
    for given in ([tensor[0], tensor[1]], {"pixel_values": tensor}, [array, array], np.stack([array, array])):
        assert torch.equal(explainer(given, 1).scores, expected)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"\(2, 3, 32, 48\) and \(2,\), expected one tensor .* pass the images alone"):
        explainer((tensor, torch.tensor([1, 2])))
    with pytest.raises(InputError, match=r"an array of type float32, expected normalised input as a tensor"):
        explainer(tensor.numpy())  # type: ignore[arg-type]


def test_models_and_methods_are_taken_as_get_explainer_takes_them() -> None:
    from vitexplain import load_model

    loaded = load_model("scenes")
    images = torch.randn(1, 3, 96, 96)
    expected = get_explainer("rollout", loaded)(images).scores
    for model in ("scenes", loaded, loaded.subject, loaded.model, Explainer("rollout", loaded)):
        found = explain_with(["rollout", create_method("gradcam")], model, images)[0].scores
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert Subject.of(loaded) is loaded.subject
    assert Subject.of("scenes").labels == loaded.labels
    assert torch.equal(Explainer("rollout", loaded)(images).scores, expected)


def test_what_is_no_model_or_no_name_is_said() -> None:
    from vitexplain import compare

    for given in (None, make_model("cls").state_dict()):
        with pytest.raises(UnsupportedModelError, match=r"found .*, expected a torch\.nn\.Module"):
            get_explainer("rollout", given)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModelError, match=r"found .*, expected a torch\.nn\.Module"):
            compare([given], make_images("cls"), ["rollout"])  # type: ignore[list-item]
    with pytest.raises(UnknownNameError, match="found a VisionTransformer, expected the name of a method"):
        create_method(make_model("cls"))  # type: ignore[arg-type]


def test_overlays_take_pictures_as_a_list(subject: Subject, picture: Image.Image) -> None:
    explanation = get_explainer("generic_attention", subject)([picture] * 2, 1)
    large = [picture.resize((120, 80)), picture.resize((120, 80)).convert("L")]
    drawn = explanation.overlay(large)
    assert drawn.shape == (2, 80, 120, 3)
    assert np.array_equal(drawn, explanation.overlay(np.stack([np.asarray(each.convert("RGB")) for each in large])))
    explanation.panel(large)
    with pytest.raises(InputError, match="found pictures of 2 shapes"):
        explanation.overlay([picture, large[0]])
    with pytest.raises(OptionError, match=r"found size=224, expected \(height, width\)"):
        explanation.heatmap(224)  # type: ignore[arg-type]


def test_pictures_need_a_known_preprocessing(picture: Image.Image) -> None:
    plain = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    explainer = get_explainer("rollout", plain)
    with pytest.raises(InputError, match="how this model wants them is not known"):
        explainer(picture)
    explanation = explainer(torch.randn(1, 3, 16, 16))
    with pytest.raises(InputError, match="cannot be shown"):
        explanation.overlay()
    assert explanation.overlay(np.zeros((1, 40, 40, 3), dtype=np.uint8)).shape == (1, 40, 40, 3)
    with pytest.raises(InputError, match="empty list"):
        Explainer(create_method("rollout"), Subject(adapt(plain), PREPROCESSING))([])


def test_timm_models_know_their_preprocessing() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    picture = Image.fromarray(np.zeros((80, 100, 3), dtype=np.uint8))
    explanation = get_explainer("raw_attention", model)(picture)
    assert explanation.preprocessing.mean == (0.5, 0.5, 0.5)
    assert explanation.overlay().shape == (1, 64, 64, 3)


def test_overlays_and_panels(subject: Subject, picture: Image.Image) -> None:
    explainer = Explainer(create_method("tokentm"), subject)
    one, several = explainer([picture, picture], 1), explainer([picture, picture], [[1, 2, 3], [4, 5, 6]])
    assert one.overlay().shape == (2, 32, 48, 3)
    assert several.overlay().shape == (2, 3, 32, 48, 3)
    np.testing.assert_array_equal(several.overlay()[:, 0][:1], explainer(picture, 1).overlay())
    assert several.target_names() == [["b", "c", "d"], ["e", "f", "g"]]
    assert one.panel().width < several.panel().width
    assert explainer([picture], lambda z: z[:, 0]).target_names() == [["function"]]


def test_captions_say_what_is_explained(subject: Subject, picture: Image.Image, tmp_path: Path) -> None:
    explainer = get_explainer("generic_attention", subject)
    pair = explainer([picture, picture], (["b", "c"], "d"))
    shares = (100 * pair.logits.softmax(1)).tolist()
    assert pair._captions() == [
        [f"{'bc'[row]} {shares[row][row + 1]:.0f}% against d {shares[row][3]:.0f}%"] for row in range(2)
    ]
    assert repr(pair).endswith("targets [1, 2] against [3, 3])")
    assert repr(pair[1]).endswith("targets [2] against [3])")
    assert Explanation.concatenate([pair[0], pair[1]]).against.tolist() == [3, 3]
    assert np.load(pair.save(tmp_path / "pair.npz"))["against"].tolist() == [3, 3]
    pair.panel()
    function = explainer(picture, lambda z: z[:, 0])
    assert function._captions() == [["function"]], "the most probable class is not what was explained"
    plain = explainer(picture, 1)
    assert plain.against is None
    assert "against" not in np.load(plain.save(tmp_path / "plain.npz"))


def test_panels_say_what_colours_mean(subject: Subject, picture: Image.Image) -> None:
    from vitexplain.panels import colour_bar

    for name, signed in (("generic_attention", False), ("attnlrp", True)):
        panel = np.asarray(get_explainer(name, subject)([picture], torch.tensor([[1, 2]])).panel())
        bar = np.asarray(colour_bar(signed=signed, width=208))
        places = np.lib.stride_tricks.sliding_window_view(panel[-len(bar) - 40 :], bar.shape)[:, :, 0]
        assert (places == bar).all((2, 3, 4)).sum() == 2


def test_saving_and_reading_back(subject: Subject, picture: Image.Image, tmp_path: Path) -> None:
    explanation = Explainer(create_method("tokentm"), subject)([picture], [[1, 2]])
    with Image.open(explanation.save(tmp_path / "a" / "panel.png")) as panel:
        assert panel.size == explanation.panel().size
    np.testing.assert_array_equal(np.load(explanation.save(tmp_path / "scores.npy")), explanation.scores.numpy())
    with np.load(explanation.save(tmp_path / "all.npz")) as everything:
        assert set(everything.files) == {"scores", "logits", "targets", "prefix_share", "constant"}
        np.testing.assert_array_equal(everything["targets"], [[1, 2]])
    with pytest.raises(InputError, match=r"expected .png, .npy or .npz"):
        explanation.save(tmp_path / "scores.csv")
    assert sorted(each.name for each in tmp_path.rglob("*.*")) == ["all.npz", "panel.png", "scores.npy"]
    with Image.open(explanation.save(tmp_path / "LOUD.PNG")) as drawn:
        assert drawn.format == "PNG"


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", None])
def test_batches_that_do_not_fit_are_halved(message: str | None) -> None:
    model, images = make_model("cls"), make_images("cls", batch=7)
    sizes: list[int] = []

    def little_memory(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        sizes.append(len(arguments[0]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory") if message is None else RuntimeError(message)

    explainer = get_explainer("tokentm", model)
    expected = explainer(images, [0, 1, 2, 3, 4, 5, 6]).scores
    handle = model.blocks[0].register_forward_pre_hook(little_memory)
    torch.testing.assert_close(explainer(images, [0, 1, 2, 3, 4, 5, 6]).scores, expected, rtol=1e-4, atol=1e-6)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    handle.remove()
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("another failure")))
    with pytest.raises(RuntimeError, match="another failure"):
        explainer(images)
    handle.remove()


@pytest.mark.parametrize("target", [[0, 1, 2], torch.zeros(5, dtype=torch.long), ([0, 1, 2], 3)])
def test_targets_for_another_number_of_images_are_refused(target: object) -> None:
    for batch_size in (None, 2, 1):
        with pytest.raises(TargetError, match="entries for 4 images"):
            get_explainer("rollout", make_model("cls"))(make_images("cls", batch=4), target, batch_size=batch_size)


def test_attribute_takes_one_image(subject: Subject) -> None:
    explainer, images = Explainer(create_method("tokentm"), subject), make_images("cls", batch=1)
    torch.testing.assert_close(explainer.attribute(images[0], 2), explainer.attribute(images, 2))


def test_numbers_that_are_no_images_or_batch_sizes_are_refused(subject: Subject) -> None:
    explainer = Explainer(create_method("tokentm"), subject)
    with pytest.raises(InputError, match="found the number 3"):
        explainer(torch.tensor(3.0))
    with pytest.raises(OptionError, match=r"batch_size=1\.5"):
        explainer(make_images("cls"), batch_size=1.5)


def test_attribute_gives_one_map(subject: Subject) -> None:
    with pytest.raises(TargetError, match="2 targets an image"):
        Explainer(create_method("tokentm"), subject).attribute(make_images("cls"), [[0, 1], [1, 2]])


def test_captum_metrics_take_our_attributions() -> None:
    from captum.metrics import infidelity, sensitivity_max

    model, images = make_model("cls"), make_images("cls")
    explainer = get_explainer("generic_attention", model)

    def perturb(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        return noise, inputs - noise

    with torch.no_grad():
        unfaithful = infidelity(model, perturb, images, explainer.attribute(images, 2), target=2)
    assert unfaithful.shape == (2,)
    assert unfaithful.isfinite().all()
    sensitive = sensitivity_max(explainer.attribute, images, target=2, n_perturb_samples=2)
    assert (sensitive > 0).all()


def test_prefix_share_is_a_share() -> None:
    for method in ("rollout", "raw_attention", "tokentm"):
        share = get_explainer(method, make_model("registers"))(make_images("registers"), 1).diagnostics["prefix_share"]
        assert ((share > 0) & (share < 1)).all()


def test_repr_names_method_shape_and_targets() -> None:
    explanation = get_explainer("rollout", make_model("cls"))(make_images("cls"), [1, 2])
    assert repr(explanation) == "Explanation(rollout, scores (2, 4, 6), targets [1, 2])"


def test_several_methods_are_checked_before_any_work() -> None:
    from vitexplain import UnsupportedModelError, explain_with

    subject = Subject.of(make_model("cls"))
    with pytest.raises(OptionError, match="no methods"):
        explain_with([], subject, make_images("cls"))
    with pytest.raises(UnsupportedModelError, match="expected -3 to 2"):
        explain_with([create_method("gradcam", layer=7)], subject, torch.zeros(1))


@pytest.mark.parametrize("kind", ["cls", "mean_pooled", "torchvision"])
@pytest.mark.parametrize("name", ["generic_attention", "gradcam", "saliency", "legrad", "gradient_rollout", "attnlrp"])
def test_a_callers_autocast_is_about_the_forward(name: str, kind: str) -> None:
    model, images = make_model(kind), make_images(kind)
    expected = get_explainer(name, model)(images, 1).scores
    with torch.autocast("cpu", torch.bfloat16):
        found = get_explainer(name, model)(images, 1)
    assert found.scores.dtype == torch.float32
    assert (found.scores - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_what_is_explained_is_what_the_model_says_in_its_own_precision(half: str) -> None:
    model, images = make_model("cls"), make_images("cls", batch=64)
    if half == "weights":
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        with torch.no_grad():
            logits = model(images)
        for name in ("generic_attention", "transformer_attribution"):
            found = get_explainer(name, model)(images)
            assert torch.equal(found.logits, logits), name
            assert torch.equal(found.targets, logits.argmax(1)), name
            assert found.scores.isfinite().all(), name


def test_autocast_does_not_reach_the_attribution() -> None:
    explainer, images = get_explainer("rollout", make_model("cls")), make_images("cls")
    with torch.autocast("cpu", torch.bfloat16):
        inside = explainer(images)
    total = inside.scores.flatten(1).sum(1) + inside.diagnostics["prefix_share"]
    torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-5)  # half precision would be off by 1e-3


def test_checkpointed_models_are_explained_and_given_back() -> None:
    model, images = make_model("cls"), make_images("cls")
    expected = get_explainer("tokentm", model)(images, 1).scores
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(get_explainer("tokentm", model)(images, 1).scores, expected)
    assert model.grad_checkpointing


def test_warnings_count_images_over_all_batches() -> None:
    from vitexplain import ExplanationWarning

    model = make_model("cls")
    with torch.no_grad():
        model.head.weight[2] = 0.0
    with pytest.warns(ExplanationWarning) as caught:
        get_explainer("generic_attention", model)(make_images("cls", batch=3), 2, batch_size=2)
    assert [str(each.message).split(":")[0].split("images ")[1] for each in caught] == ["[0, 1]", "[2]"]


@pytest.mark.filterwarnings("ignore::vitexplain.ExplanationWarning")
def test_everything_discarded_gives_zeros_not_nan() -> None:
    explainer = get_explainer("rollout", make_model("cls"), residual=0.0, discard_ratio=0.99)
    assert explainer(make_images("cls")).scores.isfinite().all()


def test_warnings_point_at_the_line_that_asked() -> None:
    from vitexplain import ExplanationWarning, Subject, create_method, explain_with

    model, images = make_model("cls"), make_images("cls")
    with torch.no_grad():
        model.head.weight[2] = 0.0
    explainer, method = get_explainer("generic_attention", model), create_method("generic_attention")
    doors = [
        lambda: explainer(images, 2),
        lambda: explainer(images, 2, batch_size=1),
        lambda: explainer.attribute(images, 2),
        lambda: explainer.attribute((images,), 2),
        lambda: explain_with([method], Subject.of(model), images, 2),
    ]
    for door in doors:
        with pytest.warns(ExplanationWarning, match="constant map") as caught:
            door()
        line = door.__code__.co_firstlineno
        assert {(each.filename, each.lineno) for each in caught} == {(__file__, line)}
