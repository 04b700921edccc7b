"""Stages: what a recipe makes of them, and the plan that follows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from formats.errors import UserError
from model.clip import CLIP
from pipeline.recipe_files import load_recipe, parse_recipe, read_recipe_file
from pipeline.training.progress import Progress
from pipeline.training.run_record import check_unchanged, write_record
from pipeline.training.stage_plan import Stage, describe_stages, plan_stages, stage_of, steps_left
from pipeline.training.start_checks import (
    Machine,
    check_computable,
    check_stage,
    warnings_about,
    warnings_about_precision,
)
from pipeline.training.weights.stage_model import count_parameters, make_model, speed_up

CPU = torch.device("cpu")
MACHINE, GPU = Machine.of(CPU), Machine("a card", on_gpu=True, has_bf16=True)
BF16 = {"bf16": {"enabled": True}}
CONSTANT = ("masking.ratio_schedule=constant", "masking.final_mask_ratio=null")

STAGED = """
base: demo
model: {name: ViT-test-8}
masking: {strategy: random, ratio_schedule: linear, target_mask_ratio: 0.75, final_mask_ratio: 0.25}
train: {max_steps: 100, global_batch_size: 16, micro_batch_size: 8}
stages:
  - name: small
    model: {image_size: 16}
  - name: tail
    masking: {strategy: none}
    train: {epochs: 1.5, global_batch_size: 8}
    optimizer: {lr: 1.0e-5, warmup_steps: 3}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED)
    return path


def plan(path: Path, *overrides: str, num_samples: int = 96, world_size: int = 1) -> tuple[Stage, ...]:
    return plan_stages(load_recipe(str(path), overrides), num_samples, world_size, vocab_size=300, eot_token_id=3)


def test_a_stage_is_a_diff_over_the_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["optimizer.beta2=0.9", "stages.tail.optimizer.weight_decay=0.3"])
    (small_name, small), (tail_name, tail) = recipe.by_stage()
    assert (small_name, tail_name) == ("small", "tail")
    assert (small.model.image_size, tail.model.image_size) == (16, None)
    assert (small.optimizer.lr, tail.optimizer.lr) == (1e-3, 1e-5)
    assert (small.optimizer.weight_decay, tail.optimizer.weight_decay) == (0.1, 0.3)
    assert small.optimizer.beta2 == tail.optimizer.beta2 == 0.9
    # the recipe's max_steps is not left standing where a stage says how many epochs
    assert (small.train.max_steps, tail.train.max_steps, tail.train.epochs) == (100, None, 1.5)
    assert small.stages == tail.stages == ()

    resolved = recipe_file.with_name("resolved.yaml")
    resolved.write_text(recipe.to_yaml())
    assert read_recipe_file(str(resolved)) == recipe


def test_without_stages_the_recipe_is_the_only_stage() -> None:
    recipe = load_recipe("demo")
    assert recipe.by_stage() == [(None, recipe)]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{masking: {strategy: none}}", "stage 2 needs a name of its own"),
        ("{name: small}", "stage 2 needs a name of its own"),
        ("{name: a b}", "stage 2 needs a name of its own"),
        ("{name: b, model: {name: ViT-nano-8}}", "stage b cannot change model.name"),
        ("{name: b, data: {tokenizer: t}}", "stage b cannot change data.tokenizer"),
        ("{name: b, train: {seed: 1}}", "stage b cannot change train.seed"),
        ("{name: b, train: {output: x}}", "stage b cannot change train.output"),
        ("{name: b, train: {deepspeed_config: zero3_bf16}}", "stage b cannot change train.deepspeed_config"),
        ("{name: b, text_masking: {word_counts: w.json}}", "stage b cannot change text_masking.word_counts"),
        ("{name: b, stages: []}", "stage b cannot change stages"),
        ("{name: b, optimizer: 3}", "expected `key: value` lines under optimizer"),
        ("{name: b, optimizer: {lrr: 1}}", "stage b: unknown option 'optimizer.lrr': did you mean 'optimizer.lr'?"),
        ("{name: b, masking: {strategy: noone}}", "stage b: masking: unknown masking strategy 'noone'"),
        ("tail", "stages.1"),
    ],
)
def test_a_wrong_stage_is_one_clear_line(stage: str, message: str) -> None:
    fields = yaml.safe_load(f"stages: [{{name: small}}, {stage}]")
    with pytest.raises(UserError) as caught:
        parse_recipe(fields, "mine.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("mine.yaml: ")
    assert "\n" not in str(caught.value)


def test_wrong_overrides_of_stages_are_one_clear_line(recipe_file: Path) -> None:
    for override, message in {
        "stages.end.optimizer.lr=1": "no stage 'end': small, tail",
        "stages.tail.lr=1": "overrides look like section.key=value",
        "stages.tail.optimizer.lr": "overrides look like section.key=value",
        "stages.tail.model.name=ViT-nano-8": "stage tail cannot change model.name",
    }.items():
        with pytest.raises(UserError, match=message):
            load_recipe(str(recipe_file), [override])
    with pytest.raises(UserError, match="no stage 'tail': this recipe has none"):
        load_recipe("demo", ["stages.tail.optimizer.lr=1"])


def test_the_plan_counts_through_the_run(recipe_file: Path) -> None:
    small, tail = plan(recipe_file)
    assert (small.first_step, small.end_step) == (0, 100)
    assert (tail.first_step, tail.end_step) == (100, 118)  # 1.5 epochs of 96 // 8 = 12 steps
    assert (small.num_samples, tail.num_samples) == (1600, 144)
    assert (tail.samples(100), tail.samples(118)) == (1600, 1744)
    assert small.passes(100) == tail.passes(100) == pytest.approx(100 / 6)
    assert tail.passes(118) == pytest.approx(100 / 6 + 1.5)
    assert [small.progress(0), small.progress(99), tail.progress(100), tail.progress(117)] == [0, 1, 0, 1]
    assert (small.model.vision.num_patches, tail.model.vision.num_patches) == (4, 16)
    assert (small.patches_kept, tail.patches_kept) == (2, 16)  # half of 4 on average over the schedule
    assert [stage_of((small, tail), step).name for step in (0, 1, 100, 101, 118)] == ["small"] * 3 + ["tail"] * 2
    with pytest.raises(UserError, match=r"stage tail: .* 8 is not a multiple of micro_batch_size 8 x 2 ranks"):
        plan(recipe_file, world_size=2)
    with pytest.raises(UserError, match="stage small: 9 samples do not fill one global batch of 16"):
        plan(recipe_file, num_samples=9)
    with pytest.raises(UserError, match=r"stage small: .*image_size 20 is not a multiple of patch_size 8"):
        plan(recipe_file, "stages.small.model.image_size=20")


def test_the_plan_is_told_in_lines(recipe_file: Path) -> None:
    text = describe_stages(plan(recipe_file), num_shards=3)
    assert "stage 1 of 2, small: steps 1 to 100" in text
    assert "images: 16 px, masking random 75% to 25%: 2.0 of 4 patches are encoded" in text
    assert "stage 2 of 2, tail: steps 101 to 118" in text
    assert "learning rate 1e-05" in text
    assert "18 steps = 1.50 epochs = 144 samples" in text
    shares = [float(line.split("%")[0].split()[-1]) for line in text.splitlines() if line.startswith("stage ")]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert 100 * 144 / 1744 < shares[1] < 50, "a full image costs more than a small masked one"


def test_the_plan_says_that_the_batch_changed(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["train.global_batch_size=24", "stages.tail.train.global_batch_size=24"])
    before = plan(recipe_file)[0].reached(3)
    resumed = plan_stages(recipe, 96, 3, 300, 3, before)
    text = describe_stages(resumed, 3)
    assert "batch: 24 = 8 micro x 1 accumulation x 3 ranks; each pair meets 23 negatives; 16 pairs when" in text
    assert text.count("when the stage began") == 1
    assert resumed[0].end_step == 3 + math.ceil((1600 - 48) / 24)


def test_what_is_left_counts_later_stages_by_what_they_cost(recipe_file: Path) -> None:
    stages = plan(recipe_file)
    small, tail = stages
    step_ratio = (tail.flops / tail.num_steps) / (small.flops / small.num_steps)
    assert steps_left(stages, 60) == pytest.approx(40 + 18 * step_ratio)
    assert steps_left(stages, 110) == pytest.approx(8)
    assert steps_left(stages, 118) == 0


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([4, 8, 12])), min_size=1, max_size=4),
    num_samples=st.integers(12, 50),
)
@settings(max_examples=60, deadline=None)
def test_no_order_of_samples_comes_twice(lengths: list[tuple[int, int]], num_samples: int) -> None:
    """Read as a loader does, every stage begins an epoch that none before it has read from."""
    stages = [
        {"name": f"s{number}", "train": {"max_steps": steps, "global_batch_size": batch, "micro_batch_size": batch}}
        for number, (steps, batch) in enumerate(lengths)
    ]
    planned = plan_stages(parse_recipe({"stages": stages}, "test"), num_samples, 1, 300, 3)
    seen: dict[int, str | None] = {}
    step, read = 0, 0
    for stage in planned:
        assert stage.first_step == step
        positions = [
            p for step in range(stage.first_step, stage.end_step) for p in stage.batches.micro_batch(step, 0, 0)
        ]
        assert positions == list(range(positions[0], positions[0] + stage.num_samples)), "no gap"
        assert positions[0] % num_samples == 0
        for position in positions:
            assert seen.setdefault(position // num_samples, stage.name) == stage.name
        step, read = stage.end_step, read + len(positions)
        assert stage.samples(step) == read
    assert sorted(seen) == list(range(len(seen)))


@given(
    batches=st.lists(st.sampled_from([2, 3, 4, 6, 8, 10]), min_size=2, max_size=5),
    stops=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    lengths=st.lists(st.one_of(st.integers(1, 30), st.floats(0.2, 4)), min_size=1, max_size=3),
    num_samples=st.integers(10, 50),
)
@settings(max_examples=100, deadline=None)
def test_a_run_goes_on_in_other_batches(
    batches: list[int], stops: list[int], lengths: list[int | float], num_samples: int
) -> None:
    """Interrupted and continued with other batches: no gap, the same lengths in samples, schedules that never jump."""
    trains = [{"max_steps": n} if isinstance(n, int) else {"epochs": n, "max_steps": None} for n in lengths]
    stages = [{"name": f"s{number}", "train": train} for number, train in enumerate(trains)]

    def planned(batch: int, progress: Progress) -> tuple[Stage, ...]:
        train = {"global_batch_size": batch, "micro_batch_size": 1}
        recipe = parse_recipe({"stages": stages, "train": train}, "test")
        return plan_stages(recipe, num_samples, 1, 300, 3, progress)

    undisturbed = planned(batches[0], Progress(0, 0))
    progress = Progress(0, 0)
    positions: dict[int, list[int]] = {number: [] for number in range(len(stages))}
    schedule: dict[int, list[float]] = {number: [] for number in range(len(stages))}
    sizes: dict[int, int] = {}
    for start, batch in enumerate(batches):
        stop = progress.step + stops[start] if start < len(batches) - 1 else 10**9
        for number, stage in enumerate(planned(batch, progress)):
            for step in range(max(progress.step, stage.first_step), min(stop, stage.end_step)):
                sizes.setdefault(number, batch)
                begin = stage.batches.position(step)
                positions[number] += range(begin, begin + batch)
                schedule[number].append(stage.progress(step))
                progress = stage.reached(step + 1)
    assert progress.samples_seen == sum(map(len, positions.values()))
    of_stages = planned(batches[0], progress)[-1].positions(progress.step)
    assert [list(read) for read in of_stages] == list(positions.values())
    epoch = 0
    for number, length in enumerate(lengths):
        read = positions[number]
        assert read == list(range(epoch * num_samples, epoch * num_samples + len(read)))
        epoch += math.ceil(len(read) / num_samples)
        wanted = length * sizes[number] if isinstance(length, int) else max(1, round(length * num_samples))
        assert wanted <= len(read) < wanted + max(batches), "the stage ends with the batch that completes it"
        assert schedule[number] == sorted(schedule[number])
        assert schedule[number][0] == 0
        assert schedule[number][-1] <= 1
    if len(set(batches)) == 1:
        assert planned(batches[0], progress)[-1].end_step == undisturbed[-1].end_step
        assert [n for number in schedule for n in schedule[number]] == [
            stage.progress(step) for stage in undisturbed for step in range(stage.first_step, stage.end_step)
        ]


def test_a_stage_begins_with_the_weights_of_the_one_before(recipe_file: Path, tmp_path: Path) -> None:
    small, tail = plan(recipe_file)
    before = make_model(small, None, CPU)
    again = make_model(small, None, CPU).state_dict()
    assert all(torch.equal(parameter, again[name]) for name, parameter in before.named_parameters())
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    after = make_model(tail, tmp_path, CPU)
    for name, parameter in after.named_parameters():
        old = before.state_dict()[name]
        if name == "visual.positional_embedding":
            assert torch.equal(parameter[0], old[0])
            for column in range(3):  # each column of the embedding is a picture of its own
                picture = F.interpolate(old[1:, column].view(1, 1, 2, 2), (4, 4), mode="bicubic", antialias=True)
                torch.testing.assert_close(parameter[1:, column].view(4, 4), picture[0, 0])
        else:
            assert torch.equal(parameter, old), name
    assert count_parameters(tail.model) == sum(parameter.numel() for parameter in after.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot be read"):
        make_model(tail, tmp_path, CPU)


@pytest.mark.parametrize("option", ["target_mask_ratio=0.76", "final_mask_ratio=0.76"])
def test_masks_that_leave_images_empty_are_refused(option: str, recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"stage small: masking drops 0\.76 of the 4 patches of an image") as error:
        plan(recipe_file, f"masking.{option}")
    assert "\n" not in str(error.value)
    plan(recipe_file, "masking.target_mask_ratio=0.75")  # one of four patches stays
    for strategy in ("none", "cluster-reference"):
        plan(recipe_file, f"masking.{option}", f"masking.strategy={strategy}")


def test_image_tokens_are_dynamic_where_masks_change_them(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    varying: list[bool] = []
    monkeypatch.setattr(CLIP, "compile_blocks", lambda _, image_tokens_vary: varying.append(image_tokens_vary))
    schedule = plan(recipe_file, "train.compile=true")
    reference = plan(recipe_file, "train.compile=true", "masking.strategy=cluster-reference")
    constant = plan(recipe_file, "train.compile=true", *CONSTANT)
    for stage in (schedule[0], reference[0], *constant):
        speed_up(CLIP(stage.model), stage, "fp32")
    assert varying == [True, True, False, False]


def test_how_the_model_is_computed_follows_the_stage(recipe_file: Path) -> None:
    options = ["model.attention=buckets", "stages.tail.train.activation_checkpointing=true"]
    for stage, recomputes in zip(plan(recipe_file, *options), (False, True), strict=True):
        clip = CLIP(stage.model)
        speed_up(clip, stage, "fp32")
        for tower in (clip.visual, clip.text):
            assert tower.transformer.checkpoint_blocks is recomputes
            assert {block.attn.backend for block in tower.transformer.blocks} == {"buckets"}
    for option, zero, message in [
        ("model.attention=varlen", 1, "needs a GPU"),
        ("model.attention=flex", 1, "needs a GPU"),
        ("train.compile=true", 3, "does not work with ZeRO stage 3"),
    ]:
        with pytest.raises(UserError, match=message):
            check_computable(plan(recipe_file, option)[0], {**BF16, "zero_optimization": {"stage": zero}}, MACHINE)
    check_computable(plan(recipe_file, "train.compile=true")[0], {**BF16, "zero_optimization": {"stage": 2}}, MACHINE)
    old = Machine("an old card", on_gpu=True, has_bf16=False)
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.0, which an old card is not"):
        check_computable(plan(recipe_file, "model.attention=varlen")[0], {}, old)
    with pytest.raises(UserError, match="needs 16-bit floats"):
        check_computable(plan(recipe_file, "model.attention=varlen")[0], {}, GPU)


def test_a_cpu_without_bf16_is_no_secret() -> None:
    old, new = (Machine("this CPU", on_gpu=False, has_bf16=has) for has in (False, True))
    assert "zero1_fp32" in warnings_about_precision(BF16, old)[0]
    assert warnings_about_precision(BF16, new) == warnings_about_precision({}, old) == []


def test_a_staged_run_is_continued_only_as_it_was_started(recipe_file: Path, tmp_path: Path) -> None:
    def check(*overrides: str) -> None:
        check_unchanged(tmp_path, load_recipe(str(recipe_file), overrides), "aa", "bb", None)

    write_record(tmp_path, load_recipe(str(recipe_file)), {"manifest_sha256": "aa", "tokenizer_sha256": "bb"})
    check()
    check("stages.tail.train.log_every_steps=1", "stages.tail.train.activation_checkpointing=true")
    with pytest.raises(UserError, match=r"started with stages\.tail\.optimizer\.lr=1e-05, now it is 0\.1"):
        check("stages.tail.optimizer.lr=0.1")
    with pytest.raises(UserError, match=r"started with stages\.small\.masking"):
        check("masking.final_mask_ratio=0.5")
    recipe_file.write_text(STAGED.replace("name: tail", "name: end"))
    with pytest.raises(UserError, match=r"started with stages=\['small', 'tail'\], now it is \['small', 'end'\]"):
        check()


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("flip_vit_b16", (30 * 10_000_000, 10_000_000)),
        ("efficient_vit_b16", (2_560_000_000, 128_000_000)),
        ("dynamics_vit_b16", (2_560_000_000, 128_000_000)),
    ],
)
def test_the_published_recipes_have_the_stages_they_promise(name: str, samples: tuple[int, ...]) -> None:
    stages = plan_stages(load_recipe(name), 10_000_000, 8, 49408, 49407)
    assert [stage.num_samples for stage in stages] == pytest.approx(samples, rel=1e-3)
    assert stages[-1].masking.strategy == "none"
    assert stages[-1].model.vision.image_size == 224


def test_a_loss_over_one_pair_is_refused(recipe_file: Path) -> None:
    config = {"zero_optimization": {"stage": 1}}

    def check(*overrides: str, world_size: int = 1) -> None:
        for stage in plan(recipe_file, "train.micro_batch_size=1", *overrides, world_size=world_size):
            check_stage(stage, config, MACHINE)

    with pytest.raises(UserError, match=r"^stage small: .*1 x 1 rank = 1 pair at once.* all 16 pairs of the batch"):
        check()
    with pytest.raises(UserError, match=r"^stage tail: .* all 8 pairs"):
        check("stages.small.train.micro_batch_size=2", "loss.kind=sigmoid")
    with pytest.raises(UserError, match=r"^stage tail: a batch of one pair"):
        check("stages.tail.train.global_batch_size=1", "loss.cache_gradients=true")
    check("loss.cache_gradients=true")
    check(world_size=2)


def test_a_warm_up_that_does_not_end_is_told(recipe_file: Path) -> None:
    def told(*overrides: str) -> list[str]:
        return [warning for stage in plan(recipe_file, *overrides) for warning in warnings_about(stage)]

    assert told("optimizer.warmup_steps=100") == []
    small, tail = told("optimizer.warmup_steps=200", "stages.tail.optimizer.warmup_steps=36", "optimizer.lr=0.4")
    assert small == (
        "warning: stage small: optimizer.warmup_steps 200 are more than the 100 steps: the learning rate ends at 0.2 "
        "and never reaches its peak of 0.4"
    )
    assert tail.startswith("warning: stage tail: optimizer.warmup_steps 36 are more than the 18 steps")
