"""Must show 1: training under ZeRO 0, 1, 2, 3 is plain PyTorch's in one process, step for step, trust ratios included.

The reference below knows no DeepSpeed, no ranks and no fused update. `pytest -s tests/test_parity.py` prints the table.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.launch import DEMO
from tests.oracles import lars_by_the_paper
from tests.spawn import run_ranks
from trainer import distributed
from trainer.assemble import build_method, build_teacher
from trainer.engine import build_engine, load_ds_config, rewriting, whole
from trainer.lars import LARS
from trainer.methods.joint_embedding import Method
from trainer.models.backbones import synchronise_batchnorm
from trainer.optim import build_optimizer, param_groups, set_progress
from trainer.partitions import pieces
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.schedules import Progress

STEPS, BATCH = 20, 16
LOSS_TOLERANCE, RATIO_TOLERANCE = 2e-6, 1e-5
"""Absolute, in fp32; relative."""
RATES = {"adamw": 1e-4, "lars": 0.03}
DECAY, MOMENTUM = 0.05, 0.99
"""The same for every case; prototypes are frozen in the first of two epochs of 10 steps."""
METHODS = {
    "dino": (
        "method={name: dino, hidden_dim: 32, bottleneck_dim: 16, num_prototypes: 32, head_norm: true, "
        "student_temp: 0.4, teacher_temp: 0.2, warmup_teacher_temp: 0.2, warmup_teacher_temp_epochs: 0, "
        "global_weight: 0.4, local_weight: 0.6}",
    ),
    "swav": (
        "method={name: swav, hidden_dim: 256, out_dim: 16, num_prototypes: 24, temperature: 0.4, epsilon: 0.2, "
        "queue_size: 32, queue_start_epoch: 1, global_weight: 0.4, local_weight: 0.6}",
        "teacher={kind: none}",
    ),
}
"""Temperatures four times the usual: the usual ones multiply every rounding error by 10 to 25 at every step."""
BACKBONES = {
    "resnet": (
        "backbone.args={layers: [1, 1, 1, 1], channels: [8, 16, 16, 32], stem_width: 8, act_layer: gelu, "
        "replace_stem_pool: true}",
    ),
    "vit": (
        "backbone.name=vit_tiny_patch16_224",
        "backbone.args={img_size: 32, patch_size: 8, dynamic_img_size: true, embed_dim: 24, depth: 2, num_heads: 2, "
        "global_pool: avg}",
    ),
}
"""No jump in any gradient, so neither ReLU nor a largest pixel: with a maximum, and AdamW at three times the rate, a
mere permutation of the batch in one process moved losses by 2e-5. And the mean of a ViT's tokens: BatchNorm in the
heads takes away what all images share, so most of the class token, whose gradient is then what rounding leaves."""
CASES = list(itertools.product(BACKBONES, METHODS, RATES))
STAGES: dict[int, dict[str, Any]] = {
    0: {"stage": 0},
    1: {"stage": 1},
    2: {"stage": 2},
    3: {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 4000},
}
"""Stage 3 cuts every parameter, however small, and calls the optimizer several times a group."""


Case = tuple[str, str, str]
"""Network, method, optimizer."""


class Trace(NamedTuple):
    """What a training did: its loss, and the trust ratio of every parameter that LARS adapts, at every step."""

    losses: list[float]
    ratios: list[dict[str, float]]


def recipe_of(backbone: str, method: str, optimizer: str) -> Recipe:
    views = ("views.global_views.size=32", "views.local_views.size=24", "views.local_views.count=2")
    batch = (f"optim.global_batch={BATCH}", f"optim.name={optimizer}", "data.train=none.beton")
    return load_recipe(DEMO, [*METHODS[method], *BACKBONES[backbone], *views, *batch])


def method_of(recipe: Recipe) -> Method:
    """The method with GELU in place of every ReLU, whose gradient jumps where a rounding error passes its kink."""
    method = build_method(recipe)
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
    return method


def progress_at(step: int, optimizer: str) -> Progress:
    return Progress(step=step, epoch=step // 10, lr=RATES[optimizer], weight_decay=DECAY, momentum=MOMENTUM)


def views_at(step: int) -> list[Tensor]:
    """This rank's share of a batch, one (2 * B, 3, S, S) tensor a size: noise around 4 x 4 tiles of each image's own.

    Images that differ in nothing but noise give features that differ in nothing but rounding, which BatchNorm enlarges.
    """
    generator = torch.Generator().manual_seed(step)
    mine = slice(distributed.rank(), None, distributed.world())
    tiles = 2 * torch.randn(BATCH, 3, 4, 4, generator=generator)
    views = [
        F.interpolate(tiles, size) + torch.randn(2, BATCH, 3, size, size, generator=generator) for size in (32, 24)
    ]
    return [view[:, mine].flatten(0, 1) for view in views]


def train_plainly(case: Case) -> Trace:
    """One process, the whole batch, torch's AdamW or the LARS formula parameter by parameter."""
    recipe, trace = recipe_of(*case), Trace([], [])
    method = method_of(recipe)
    teacher = build_teacher(recipe, method)
    trained = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    frozen = {id(parameter) for parameter in method.frozen_parameters()}
    matrices, vectors = ([p for p in trained.values() if (p.ndim > 1) == wanted] for wanted in (True, False))
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], lr=RATES["adamw"]
    )
    buffers = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for step in range(STEPS):
        progress, views = progress_at(step, case[-1]), views_at(step)
        loss = method(views, teacher and teacher(method.teacher_views(views)), progress).total
        method.zero_grad()
        loss.backward()
        moving = {n: p for n, p in trained.items() if not (method.frozen(progress) and id(p) in frozen)}
        for parameter in set(trained.values()) - set(moving.values()):
            parameter.grad = None
        trace.losses.append(loss.item())
        trace.ratios.append({n: ratio(p) for n, p in moving.items() if p.ndim > 1} if case[-1] == "lars" else {})
        with torch.no_grad():
            if case[-1] == "adamw":
                adamw.step()
            for name, p in moving.items() if case[-1] == "lars" else ():
                decay = DECAY if p.ndim > 1 else 0.0
                new, buffers[name] = lars_by_the_paper(
                    p, p.grad, buffers[name], lr=progress.lr, decay=decay, momentum=0.9, adapts=p.ndim > 1
                )
                p.copy_(new)
            method.after_step(applied=True)
            if teacher is not None:
                for t, s in zip(teacher.branch.parameters(), method.student.parameters(), strict=True):
                    t.copy_(MOMENTUM * t + (1 - MOMENTUM) * s)
    return trace


def ratio(parameter: Tensor) -> float:
    weight, gradient = parameter.detach(), parameter.grad
    return float(0.001 * weight.norm() / (gradient + DECAY * weight).norm())


def train_on_ranks(case: Case, stage: int, folder: Path) -> Trace:
    """This rank's part of the same training, in the order of trainer.loop."""
    recipe, trace = recipe_of(*case), Trace([], [])
    method = method_of(recipe)
    synchronise_batchnorm(method, torch.device("cpu"))
    teacher = build_teacher(recipe, method)
    optimizer = build_optimizer(recipe.optim, param_groups(method, method.frozen_parameters()))
    path = folder / f"{stage}-{distributed.rank()}.json"
    path.write_text(json.dumps({"zero_optimization": STAGES[stage]}))
    ds_config = load_ds_config(path, recipe.optim, micro_batch=recipe.micro_batch(distributed.world()))
    engine = build_engine(method, optimizer, ds_config)
    for step in range(STEPS):
        progress, views = progress_at(step, case[-1]), views_at(step)
        set_progress(engine.optimizer, progress, frozen=method.frozen(progress))
        if isinstance(optimizer, LARS):
            optimizer.trust_ratios.clear()
        loss, *_ = engine(views, teacher and teacher(method.teacher_views(views)), progress)
        engine.backward(loss)
        engine.step()
        assert engine.was_step_applied()
        with rewriting(engine, method.rewritten_parameters()):
            method.after_step(applied=True)
        if teacher is not None:
            with whole(engine, method.student.parameters()):
                teacher.follow(method.student, MOMENTUM)
        trace.losses.append(float(distributed.mean_over_ranks(loss.detach())))
        trace.ratios.append(dict(named_ratios(engine, optimizer)) if isinstance(optimizer, LARS) else {})
    return trace


def named_ratios(engine: Any, optimizer: LARS) -> Iterator[tuple[str, float]]:
    """The trust ratio of every parameter that this rank holds a piece of."""
    names: dict[Tensor, list[str]] = {}
    for piece in pieces(engine):
        names.setdefault(piece.owner, []).append(piece.name)
    for owner, ratios in optimizer.trust_ratios.items():
        yield from zip(names.get(owner, []), ratios.tolist(), strict=True)


def train_cases(cases: list[tuple[Case, int]], folder: Path) -> list[Trace]:
    return [train_on_ranks(case, stage, folder) for case, stage in cases]


class Differences(NamedTuple):
    """From the reference, the largest over all steps, and over all ranks and parameters."""

    loss: float
    ratio: float


def compare(traces: list[Trace], reference: Trace) -> Differences:
    """All ranks' traces of one case with the reference; every parameter that adapts there must be some rank's."""
    seen = [set().union(*(trace.ratios[step] for trace in traces)) for step in range(STEPS)]
    assert seen == [set(ratios) for ratios in reference.ratios]
    losses = [abs(a - b) for trace in traces for a, b in zip(trace.losses, reference.losses, strict=True)]
    ratios = [
        abs(value / reference.ratios[step][name] - 1)
        for trace in traces
        for step in range(STEPS)
        for name, value in trace.ratios[step].items()
    ]
    return Differences(max(losses), max(ratios, default=0.0))


@pytest.fixture(scope="module")
def references() -> dict[Case, Trace]:
    torch.set_num_threads(1)
    return {case: train_plainly(case) for case in CASES}


@pytest.fixture(scope="module")
def two_ranks(references: dict[Case, Trace], tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Differences]]:
    """Each case's differences at stages 0, 1, 2, 3; printed as a table."""
    pairs = list(itertools.product(CASES, STAGES))
    by_rank = run_ranks(train_cases, pairs, tmp_path_factory.mktemp("parity"), timeout_s=1000)
    found: dict[Case, list[Differences]] = {case: [] for case in CASES}
    for (case, _), traces in zip(pairs, zip(*by_rank, strict=True), strict=True):
        found[case].append(compare(list(traces), references[case]))
    print("\n| network, method, optimizer | 0 | 1 | 2 | 3 | trust ratios |", "|---" * 6 + "|", sep="\n")
    for case, row in found.items():
        ratio = f"{max(d.ratio for d in row):.1e}" if case[-1] == "lars" else ""
        print(f"| {', '.join(case)} | {' | '.join(f'{d.loss:.1e}' for d in row)} | {ratio} |")
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_stage_trains_as_plain_pytorch(case: Case, two_ranks: dict[Case, list[Differences]]) -> None:
    for stage, differences in enumerate(two_ranks[case]):
        assert differences.loss <= LOSS_TOLERANCE, stage
        assert differences.ratio <= RATIO_TOLERANCE, stage


def test_four_ranks_train_as_plain_pytorch(references: dict[Case, Trace], tmp_path: Path) -> None:
    case = ("vit", "dino", "lars")
    traces = run_ranks(train_cases, [(case, 2)], tmp_path, world=4, timeout_s=600)
    for of_stage in zip(*traces, strict=True):
        differences = compare(list(of_stage), references[case])
        assert differences.loss <= LOSS_TOLERANCE
        assert differences.ratio <= RATIO_TOLERANCE


def test_the_references_learn_more_than_the_tolerance_could_hide(references: dict[Case, Trace]) -> None:
    for case, trace in references.items():
        assert max(trace.losses) - min(trace.losses) > 1e4 * LOSS_TOLERANCE, case
