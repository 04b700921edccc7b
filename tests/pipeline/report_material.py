"""Made-up material for reports: results, runs, and an evaluation output with features that no model computed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from formats.files import write_json
from pipeline.evaluation.jobs import JOB_FILE, Job, make_job
from pipeline.evaluation.results import ModelIdentity, Result, write_results
from pipeline.evaluation.sets.layouts import open_evaluation_set
from pipeline.recipe_files import parse_recipe
from pipeline.reporting.inputs import Checkpoint, name_checkpoints
from pipeline.reporting.runs import Run

HOSTILE = '<script>alert("x")</script> $\\alpha_ & <img src=http://example.com/x.png> \'"'


def result_of(run: str, dataset: str, metrics: Mapping[str, float], step: int = 20, samples: int = 1000) -> Result:
    chance = dict.fromkeys(metrics, 0.1)
    return Result(
        "ViT-tiny-8",
        f"runs/{run}/checkpoints/step_{step:08d}",
        dataset,
        "task",
        dict(metrics),
        samples,
        chance,
        step=step,
    )


def checkpoints_of(results: Sequence[Result], runs: Sequence[Run] = ()) -> tuple[Checkpoint, ...]:
    """Results as if read from one file."""
    return name_checkpoints([(result, Path("/results.jsonl")) for result in results], runs)[1]


def write_run(directory: Path, results: Sequence[Result] = (), seed: int = 0, strategy: str = "cluster") -> Path:
    """A run of two logged steps, 36 s and 72 s after its start, on five devices."""
    directory.mkdir(parents=True)
    fields = {"model": {"name": "ViT-tiny-8"}, "masking": {"strategy": strategy}, "train": {"seed": seed}}
    (directory / "recipe.yaml").write_text(parse_recipe(fields, "test").to_yaml())
    write_json(directory / "run.json", {"world_size": 5, "device": "cuda:0"})
    steps = [
        {"step": step, "samples_seen": 64 * step, "loss": 4 - step / 10, "mask_ratio": 0.5, "wall_time_s": 3.6 * step}
        for step in (10, 20)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if results:
        write_results(directory / "evaluation", results)
    return directory


def write_classification_set(directory: Path, class_names: Sequence[str], labels: Sequence[int]) -> Path:
    directory.mkdir(parents=True)
    (directory / "classnames.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")
    (directory / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    _write_split(directory / "test", [("cls", str(label)) for label in labels])
    return directory


def write_retrieval_set(directory: Path, captions: Sequence[Sequence[str]]) -> Path:
    _write_split(directory / "test", [("txt", "\n".join(own)) for own in captions])
    return directory


def _write_split(split: Path, texts: Sequence[tuple[str, str]]) -> None:
    split.mkdir(parents=True)
    (split / "nshards.txt").write_text("1")
    with tarfile.open(split / "0.tar", "w") as tar:
        for index, (kind, text) in enumerate(texts):
            for name, data in ((f"{index:04d}.png", picture(index)), (f"{index:04d}.{kind}", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def picture(index: int) -> bytes:
    """A disc on a ground, in colours of their own."""
    rng = np.random.default_rng(index)
    ground, disc = rng.integers(40, 256, (2, 3))
    y, x = np.mgrid[-24:24, -36:36]
    pixels = np.where(((x**2 + y**2) < 300)[..., None], disc, ground).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def job_of(data: Path, step: int = 20, run: str = "alpha") -> Job:
    model = ModelIdentity(
        "ViT-tiny-8", f"runs/{run}/checkpoints/step_{step:08d}", step, 64 * step, 64, "w" * 64, "t" * 64
    )
    return make_job(model, data, open_evaluation_set(data), None, batch_size=16, masking=None)


def store(job: Job, output: Path, features: Mapping[str, torch.Tensor]) -> None:
    """What an evaluation would leave of a job with one task: its record and its features, made unit length."""
    (stores,) = job.stores(output).values()
    for name, collection_store in stores.items():
        features_ND = F.normalize(features[name].float(), dim=1)
        assert len(features_ND) == len(collection_store.collection)
        items = [item.encode() if isinstance(item, str) else item.read() for item in collection_store.collection.items]
        collection_store.write(0, features_ND, [hashlib.sha256(item).digest() for item in items])
    job.directory(output).mkdir(parents=True)
    write_json(job.directory(output) / JOB_FILE, job.record())
    write_json(job.directory(output) / "slice_0_of_1.json", {"seconds": 1.0})
