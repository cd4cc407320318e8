"""Parameters in pieces: LARS and clipping by whole parameters, skipped steps, and tables that do not fit."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import lars_by_the_paper
from tests.spawn import run_ranks
from trainer import distributed
from trainer.engine import build_engine, load_ds_config, whole
from trainer.optim import Optim, build_optimizer, param_groups, set_progress
from trainer.partitions import PartitionError, check_partitions
from trainer.schedules import Progress

STEPS, STAGES = 6, (0, 1, 2, 3)
RATES = {"adamw": 0.01, "lars": 10.0}
DECAY, CLIP = 0.05, 0.01
CASES = [(name, clip) for name in RATES for clip in (0.0, CLIP)]


class Small(nn.Module):
    """A parameter of every kind, and a group so small that ranks after the first hold nothing but its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.depthwise = nn.Conv2d(5, 5, 3, groups=5, bias=False)
        self.linear = nn.Linear(5 * 4 * 4, 7)
        self.frozen = nn.Parameter(torch.full((1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(self.depthwise(self.norm(self.conv(x)).tanh()).flatten(1)) * self.frozen
        return out.square().mean()


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()  # BatchNorm by its running statistics, so that a rank's half of a batch is half a batch


def batch(step: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def optim(name: str, clip: float) -> Optim:
    return Optim(
        name=name, epochs=1, global_batch=4, base_lr=1, final_lr=0, warmup_epochs=0, weight_decay=0,
        final_weight_decay=0, parameter_clipping=clip,
    )  # fmt: skip


def train_plainly(name: str, clip: float) -> dict[str, Tensor]:
    """The weights after six steps in one process; the first two leave `frozen` alone."""
    module = small()
    decayed = {"conv.weight", "linear.weight", "frozen"}
    adamw = {
        n: torch.optim.AdamW([p], lr=RATES[name], weight_decay=DECAY if n in decayed else 0.0)
        for n, p in module.named_parameters()
    }
    buffers = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    for step in range(STEPS):
        module.zero_grad()
        module(batch(step)).backward()
        for n, p in module.named_parameters():
            assert p.grad is not None
            if n == "frozen" and step < 2:
                continue
            if clip:
                p.grad *= min(1.0, clip / (float(p.grad.norm()) + 1e-6))
            if name == "adamw":
                adamw[n].step()
                continue
            decay = DECAY if n in decayed else 0.0
            new, buffers[n] = lars_by_the_paper(
                p.detach(), p.grad, buffers[n], lr=RATES[name], decay=decay, momentum=0.9, adapts=p.ndim > 1
            )
            p.data.copy_(new)
    return {n: p.detach() for n, p in module.named_parameters()}


def engine_of(name: str, clip: float, stage: int, folder: Path) -> Any:
    module, recipe = small(), optim(name, clip)
    path = folder / f"{stage}-{distributed.rank()}.json"
    tiny = {"reduce_bucket_size": 100, "allgather_bucket_size": 100}  # below one weight's size, as prototypes may be
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 200, **tiny}
    path.write_text(json.dumps({"zero_optimization": zero}))
    optimizer = build_optimizer(recipe, param_groups(module, [module.frozen]))
    return build_engine(module, optimizer, load_ds_config(path, recipe, micro_batch=2))


def step_of(engine: Any, name: str, step: int, *, factor: float = 1.0) -> None:
    progress = Progress(step=step, epoch=0, lr=RATES[name], weight_decay=DECAY, momentum=0)
    set_progress(engine.optimizer, progress, frozen=step < 2)
    engine.backward(engine(batch(step)[distributed.rank() :: distributed.world()] * factor))
    engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    with whole(engine, engine.module.parameters()):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


class Seen(NamedTuple):
    """What one rank saw."""

    weights: dict[tuple[str, float, int], dict[str, Any]]
    """Of every case and stage, as lists."""
    skipped: dict[int, tuple[bool, bool]]
    """By stage: whether a step with a NaN on one rank was applied, and whether it moved a weight."""
    refusals: dict[int, str]
    """By stage: what was said of originals that are not the parameters."""


def see(folder: Path) -> Seen:
    seen = Seen({}, {}, {})
    for stage in STAGES:
        for name, clip in CASES:
            engine = engine_of(name, clip, stage, folder)
            for step in range(STEPS):
                step_of(engine, name, step)
            seen.weights[name, clip, stage] = {n: p.tolist() for n, p in weights_of(engine).items()}
        before = weights_of(engine)
        with pytest.raises(PartitionError) as caught:
            check_partitions(engine, {n: p + (n == "linear.weight") for n, p in before.items()})
        seen.refusals[stage] = str(caught.value)
        if stage > 0:
            step_of(engine, name, STEPS, factor=float("nan") if distributed.rank() == 1 else 1.0)
            moved = any(not torch.equal(before[n], p) for n, p in weights_of(engine).items())
            seen.skipped[stage] = (engine.was_step_applied(), moved)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return run_ranks(see, tmp_path_factory.mktemp("partitions"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "clip"), CASES)
def test_pieces_are_updated_as_the_whole_parameters_would_be(
    seen: list[Seen], name: str, clip: float, stage: int
) -> None:
    wanted = train_plainly(name, clip)
    for rank in seen:
        for parameter, weight in rank.weights[name, clip, stage].items():
            assert torch.allclose(torch.tensor(weight), wanted[parameter], rtol=1e-4, atol=1e-5), parameter


@pytest.mark.parametrize("name", RATES)
def test_clipping_each_parameter_changes_the_training(name: str) -> None:
    free, clipped = train_plainly(name, 0.0), train_plainly(name, CLIP)
    assert not torch.allclose(free["linear.bias"], clipped["linear.bias"], rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_nan_on_one_rank_skips_the_step_on_all(seen: list[Seen], stage: int) -> None:
    assert [rank.skipped[stage] for rank in seen] == [(False, False)] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_tables_that_do_not_describe_the_parameters_are_refused_by_name_on_every_rank(
    seen: list[Seen], stage: int
) -> None:
    assert any("do not describe linear.weight" in rank.refusals[stage] for rank in seen)
    assert all("0.19.8" in rank.refusals[stage] for rank in seen)
