"""Vision DiffMask on photographs: gates of ViT-Ti, and what their hard masks keep and change.

``python -m vitexplain.benchmarks.diffmask_photographs vit-tiny-diffmask.safetensors
--output benchmarks/results/diffmask_photographs.md``

``VITEXPLAIN_TEST_DATA`` names the folder of weights and images. Trained is on one photograph of each ImageNet class and
on every other ImageNet photograph with boxes; measured on the others. Gates that are there already are measured and not
trained again. The perturbation test beside other methods reads them from the folder where it is started::

    vitexplain bench benchmarks/configurations/diffmask_photographs.yaml --output photographs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitexplain import get_explainer
from vitexplain.data import Example, load_examples, open_dataset
from vitexplain.diffmask.checkpoint import load_checkpoint
from vitexplain.diffmask.constraint import divergence
from vitexplain.diffmask.masking import MaskedModel, amortised_log_kept, hard_mask
from vitexplain.files import write_whole
from vitexplain.models.loading import LoadedModel
from vitexplain.training.diffmask import DiffMaskSettings, train_diffmask
from vitexplain.training.picture_batches import PictureBatches

from .diffmask_scenes import HEADER, joined, row
from .measuring import machine_facts, markdown_table
from .patch_masks_photographs import open_vit

SETTINGS = DiffMaskSettings(
    steps=1_300,
    margin=0.2,
    agreement=0.85,
    learning_rate=3e-4,
    final_rate=0.1,
    averaging=0.98,
    shallowest_depth=1.0,
    warmup_steps=50,
    evaluate_every=50,
    shared_multiplier=True,
    multiplier_start=2.5,
    multiplier_rate=0.02,
    multiplier_limits=(0.01, 200.0),
)
"""1,000 classes and few steps: the constraint is looser than by default, and one multiplier moves at every step.

A patch of a photograph changes the answer little, so a multiplier that begins high makes the gates keep all, and where
they surely keep, nothing pulls them back. All gates take part in every step: what the shallow ones read does not say
what a photograph shows, and to drop by it is to drop by chance. Steps are slow, and the average of the gates counts,
since gates and multiplier swing about each other.
"""

RIVALS = ("generic_attention", "contributions", "rollout", "raw_attention")
"""Methods that need no training, whose hottest patches are kept instead."""

_BATCH = 16
_CHOSEN_BY = 64  # photographs held back from training, by which the best gates are chosen


def photographs(data: Path) -> tuple[list[Path], list[Path], Sequence[Example]]:
    """Files to train on and to choose the best gates by, and the examples to test on."""
    boxes = open_dataset(f"annotated:{data / 'imagenet_val650_boxes'}", boxes_key="boxes_227_xyxy")
    classes = open_dataset(f"annotated:{data / 'imagenet_train1000_classes'}")
    known = [_file(example) for example in boxes[1::2]]
    return [*map(_file, classes), *known[_CHOSEN_BY:]], known[:_CHOSEN_BY], boxes[::2]


def _file(example: Example) -> Path:
    assert isinstance(example.image, Path)  # annotated photographs are files
    return example.image


def train(data: Path, output: Path, settings: DiffMaskSettings) -> None:
    """Trains gates; goes on from an interrupted training where there is one."""
    model = open_vit(data)
    files, chosen_by, _ = photographs(data)
    batches, held_back = (
        PictureBatches(each, model.preprocessing, batch_size=_BATCH, seed=settings.seed) for each in (files, chosen_by)
    )
    train_diffmask(
        model.subject.adapter,
        batches,
        output,
        settings,
        validation=list(held_back),
        resume=True,
        progress=True,
    )


def measured(gates: Path, model: LoadedModel, examples: Sequence[Example], **options: Any) -> list[str]:
    """Cells of the table: the masks of all examples, the predicted class explained."""
    explainer = get_explainer("diffmask", model, checkpoint=str(gates), **options)
    method: Any = explainer.method
    inputs = [batch.inputs for batch in load_examples(examples, model.preprocessing)]
    return row(joined([method.report(model.model, explainer(images)) for images in inputs]))


@torch.no_grad()
def of_the_same_number(gates: Path, model: LoadedModel, examples: Sequence[Example]) -> list[list[str]]:
    """The masks beside as many patches chosen otherwise: by chance, or as the hottest of other methods.

    All others are replaced by the gates' own vector each time, so that nothing differs but which patches are kept.

    Returns:
        A line a choice: its name, share kept, agreement and divergence.
    """
    adapter = model.subject.adapter
    masked = MaskedModel(adapter)
    trained = load_checkpoint(gates, adapter, torch.device("cpu"), torch.float32).gates
    explainers = {name: get_explainer(name, model) for name in RIVALS}
    found: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in load_examples(examples, model.preprocessing):
        states = masked.read(batch.inputs)
        mask = hard_mask(amortised_log_kept(trained, states))
        number = mask.sum(1, keepdim=True)
        ranked = {name: each(batch.inputs).scores.flatten(1) for name, each in explainers.items()}
        ranked["by chance"] = torch.rand(mask.shape, generator=generator)
        kept = {name: (scores.argsort(1, descending=True).argsort(1) < number) for name, scores in ranked.items()}
        for name, chosen in {"gates": mask, **kept}.items():
            answer = masked.logits(batch.inputs, chosen.to(mask.dtype), trained.replacement)
            same = (answer.argmax(1) == states.logits.argmax(1)).float()
            change = divergence("distribution", states.logits, answer, None)
            found.setdefault(name, []).append(torch.stack([chosen.float().mean(1), same, change]))
    means = {name: torch.cat(parts, 1).mean(1).tolist() for name, parts in found.items()}
    return [[name, f"{kept:.1%}", f"{same:.1%}", f"{change:.3f}"] for name, (kept, same, change) in means.items()]


def report(data: Path, gates: Path, refined: int) -> str:
    """Trains nothing; measures the masks, and those of the first few examples after a search, as Markdown."""
    card = json.loads(gates.with_suffix(".json").read_text(encoding="utf-8"))
    model, examples = open_vit(data), photographs(data)[2]
    lines = [["gates", str(len(examples)), *measured(gates, model, examples)]]
    if refined:
        first = examples[:refined]
        lines += [
            ["gates", str(len(first)), *measured(gates, model, first)],
            ["gates, refined", str(len(first)), *measured(gates, model, first, refine=True)],
        ]
    files, chosen_by, _ = photographs(data)
    beside = markdown_table(["patches", "kept", "agreement", "divergence"], of_the_same_number(gates, model, examples))
    return (
        f"# Vision DiffMask on photographs\n\nViT-Ti, gates of step {card['result']['step']} of "
        f"{card['training']['steps']}, {_BATCH} of {len(files)} photographs a step, {card['wall_seconds']:.0f} s; "
        f"chosen by {len(chosen_by)} others. Hard masks of photographs that neither saw. Divergence in nats, "
        "its mean and its quantiles over images; all masked: its mean where every patch is replaced.\n\n"
        f"{markdown_table(['masks', 'photographs', *HEADER], lines)}\n\n"
        f"As many patches of all {len(examples)} photographs chosen otherwise, the rest replaced by the gates' own "
        "vector; divergence in nats, its mean:\n\n"
        f"{beside}\n"
    )


def main(arguments: list[str]) -> None:
    """Trains where there are no gates yet, measures, prints, and writes the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates", type=Path, help="file of the trained gates, ending in .safetensors")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="training steps")
    parser.add_argument("--seed", type=int, default=SETTINGS.seed, help="of the training")
    parser.add_argument("--refined-images", type=int, default=32, help="photographs whose masks are refined; 0: none")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    if "VITEXPLAIN_TEST_DATA" not in os.environ:
        parser.error("set VITEXPLAIN_TEST_DATA to the folder of weights and images")
    data = Path(os.environ["VITEXPLAIN_TEST_DATA"])
    if not options.gates.is_file():
        train(data, options.gates, replace(SETTINGS, steps=options.steps, seed=options.seed))
    text = report(data, options.gates, options.refined_images)
    threads = f"{torch.get_num_threads()} threads"
    text += f"\n{machine_facts('vitexplain.benchmarks.diffmask_photographs', arguments, threads)}\n"
    print(text)
    if options.output:
        write_whole(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(sys.argv[1:])
