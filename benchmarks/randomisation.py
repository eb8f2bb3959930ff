"""The sanity check of Adebayo et al.: do maps change when the model forgets what it learned?

``python -m vitexplain.benchmarks.randomisation --data FOLDER --output benchmarks/results``

ViT-Ti on photographs, weights made random from the head down, the predicted class explained throughout. What was
measured is kept, a file a method, and not measured again; ``--methods`` measures some alone, so that the whole may be
done in pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vitexplain import Method, create_method, list_methods
from vitexplain.data import load_examples, open_dataset
from vitexplain.files import write_whole
from vitexplain.keys import digest
from vitexplain.metrics import randomisation_checks
from vitexplain.metrics.correlation import spearman
from vitexplain.models.fingerprint import weights_digest
from vitexplain.models.loading import LoadedModel

from .export_images import shown
from .measuring import known_methods, machine_facts
from .patch_masks_photographs import open_vit
from .randomisation_report import OTHER_IMAGE, TITLES, Record, draw, report, table_file

_MODULE = "vitexplain.benchmarks.randomisation"


@dataclass(frozen=True)
class Plan:
    """How much is measured of a method.

    Attributes:
        images: how many photographs.
        stages: where maps are made.
        options: of the method, where the default takes too long here.
    """

    images: int = 32
    stages: tuple[str, ...] = tuple(name for name in TITLES if name != OTHER_IMAGE)
    options: Mapping[str, Any] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        """The method as it is measured."""
        return create_method(name, **self.options)


_QUICK = Plan()
_FEW = ("block 6", "stem")
PLANS: Mapping[str, Plan] = {
    "attention_flow": Plan(3, _FEW),
    "beyond_intuition": Plan(8),
    "feature_ablation": Plan(4, _FEW),
    "full_lrp": Plan(8),
    "gradient_shap": Plan(8, options={"samples": 8}),
    "integrated_gradients": Plan(8, options={"steps": 8}),
    "kernel_shap": Plan(4, _FEW, {"samples": 200}),
    "occlusion": Plan(8, _FEW, {"stride": 2}),
    "rise": Plan(4, _FEW, {"masks": 128}),
    "smoothgrad": Plan(8, options={"samples": 8}),
    "tis": Plan(4, _FEW, {"masks": 128}),
    "transformer_attribution": Plan(8),
    "transition_attention": Plan(8),
    "vit_cx": Plan(4, _FEW, {"distance": 0.2}),
}
"""Methods of many passes; the others share their captures and have the default plan."""


def open_photographs(data: Path, model: LoadedModel, count: int) -> Tensor:
    """Every twentieth photograph of those with boxes, (count, 3, 224, 224), normalised."""
    examples = open_dataset(f"annotated:{data / 'imagenet_val650_boxes'}", boxes_key="boxes_227_xyxy")
    (batch,) = load_examples(examples[::20][:count], model.preprocessing, batch_size=count)
    return batch.inputs


def measure(model: LoadedModel, photographs: Tensor, names: Sequence[str], plan: Plan) -> list[tuple[str, Record]]:
    """Methods of one plan, together."""
    methods, started = [plan.method(name) for name in names], time.process_time()
    images = photographs[: plan.images]
    checks = randomisation_checks(methods, model, images, stages=plan.stages, batch_size=8)
    seconds = (time.process_time() - started) / len(names)
    found = []
    for name, check in zip(names, checks, strict=True):
        other = spearman(check.scores.flatten(1), check.scores.roll(-1, 0).flatten(1)).cpu().numpy()
        columns = {OTHER_IMAGE: other, **check.correlations}
        plain = {stage: [None if math.isnan(value) else value for value in row] for stage, row in columns.items()}
        label = name + "".join(f", {option}={value}" for option, value in plan.options.items())
        found.append((name, Record(_key(model, photographs, name, plan), label, plain, seconds)))
    return found


def complete(model: LoadedModel, photographs: Tensor, names: Iterable[str], folder: Path) -> dict[str, Record]:
    """The records of some methods, measured where the folder has none that fits; each is written when it is known."""
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    together: dict[int, tuple[Plan, list[str]]] = {}
    for name in names:
        plan = PLANS.get(name, _QUICK)
        known = _read(folder / f"{name}.json")
        if known is not None and known.key == _key(model, photographs, name, plan):
            records[name] = known
        else:
            together.setdefault(id(plan), (plan, []))[1].append(name)
    for plan, missing in together.values():
        for name, record in measure(model, photographs, missing, plan):
            text = json.dumps(asdict(record))
            write_whole(folder / f"{name}.json", partial(_write, text.encode()))
            records[name] = record
            print(f"{name}: {record.seconds:.0f} s", file=sys.stderr, flush=True)
    return records


def _key(model: LoadedModel, photographs: Tensor, name: str, plan: Plan) -> str:
    images = photographs[: plan.images].double()
    shown = [float(images.sum()), float(images.square().sum())]
    return digest(weights_digest(model.model), name, plan.method(name).options, list(plan.stages), plan.images, shown)


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing, prints, and writes randomisation.md, .csv and .png where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("VITEXPLAIN_TEST_DATA"), help="weights and images")
    parser.add_argument("--methods", nargs="+", help="measure these alone, and write no report")
    parser.add_argument("--records", type=Path, default=Path("vitexplain-randomisation"), help="what was measured")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="folder to write to")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.data is None:
        parser.error("name the folder of weights and images: --data, or VITEXPLAIN_TEST_DATA")
    torch.set_num_threads(options.threads)
    model = open_vit(options.data)
    names = known_methods(options.methods or list_methods(trainable=False))
    most = max(_QUICK.images, *(plan.images for plan in PLANS.values()))
    records = complete(model, open_photographs(options.data, model, most), names, options.records)
    if options.methods:
        return
    ordered = sorted(records.values(), key=lambda record: np.nan_to_num(record.estimates()["stem"].value, nan=2))
    text = report(ordered, machine_facts(_MODULE, shown(given), f"{options.threads} threads of torch"))
    print(text)
    if options.output:
        write_whole(options.output / "randomisation.md", partial(_write, text.encode()))
        write_whole(options.output / "randomisation.csv", partial(_write, table_file(ordered).encode()))
        write_whole(options.output / "randomisation.png", partial(draw, ordered))


if __name__ == "__main__":
    main()
