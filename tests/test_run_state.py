"""One run's state on other numbers of ranks and under other ZeRO stages, with the engine and without the loop."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.spawn import run_ranks
from trainer.run_state import RunState, StateError

STEPS, GLOBAL_BATCH, PAUSE = 8, 8, 4
JOURNEY = ((2, 1, 2), (1, 3, 4), (4, 0, 6), (2, 2, 8))
"""Ranks, ZeRO stage, and the step up to which they train."""


class Net(nn.Module):
    """Sizes that no number of ranks divides, a group that is frozen at first, a buffer, an untrained parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(7, 11), nn.LayerNorm(11), nn.Linear(11, 3, bias=False)
        self.gain = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.outer(self.norm(self.inner(x))) * self.gain - x[:, :3]) ** 2).mean()


def build(stage: int, saved: RunState | None, name: str = "adamw") -> tuple[Any, Net, dict[str, Tensor]]:
    """The engine around a Net, as `assemble` does it."""
    from trainer.engine import build_engine, load_ds_config
    from trainer.optim import Optim, build_optimizer, param_groups
    from trainer.run_state import load_engine, load_networks, untrained_parameters

    recipe = Optim(
        name=name, epochs=1, global_batch=GLOBAL_BATCH, base_lr=1, final_lr=0, warmup_epochs=0,  # type: ignore[arg-type]
        weight_decay=0.1, final_weight_decay=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    net: Any = Net()
    if saved is not None:
        load_networks(saved, net, None)
    untrained = untrained_parameters(copy.deepcopy(net))
    optimizer = build_optimizer(recipe, param_groups(net, net.outer.parameters()))
    config = load_ds_config(None, recipe, micro_batch=GLOBAL_BATCH) | {"zero_optimization": {"stage": stage}}
    engine: Any = build_engine(net, optimizer, config)
    if saved is not None:
        load_engine(saved, engine, net, None)
    return engine, net, untrained


def train(engine: Any, net: Net, first: int, last: int, lr: float = 0.05) -> list[float]:
    """The losses of some steps, each of a global batch that its number decides."""
    from trainer import distributed

    losses = []
    for step in range(first, last):
        for group in engine.optimizer.param_groups:
            group |= {"lr": lr, "weight_decay": 0.1, "frozen": group["name"] == "frozen" and step < 3}
        batch = torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(step))
        loss = engine(batch.chunk(distributed.world())[distributed.rank()])
        engine.backward(loss)
        engine.step()
        net.seen += 1
        losses.append(distributed.mean_over_ranks(loss.detach()).item())
    return losses


def leg(folder: Path, stage: int, first: int, last: int) -> list[float]:
    """On one rank: a part of a run's life, from its newest checkpoint to a new one."""
    from trainer.checkpoint import Checkpoints, newest
    from trainer.run_state import capture

    saved = newest(folder)
    assert (0 if saved is None else saved.step) == first
    engine, net, untrained = build(stage, saved)
    losses = train(engine, net, first, last)
    with Checkpoints(folder, keep=9) as checkpoints:
        checkpoints.save(last, capture(engine, net, None, untrained))  # type: ignore[arg-type]
    assert engine.global_steps == last
    return losses


def pauses(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """On one rank: under every stage and optimizer, the losses after a pause, and without one."""
    from trainer.checkpoint import Checkpoints, newest
    from trainer.run_state import capture

    found = {}
    for name, stage in (("adamw", 0), ("adamw", 1), ("adamw", 2), ("adamw", 3), ("lars", 0)):
        run, lr = folder / f"{name}{stage}", 0.05 if name == "adamw" else 5.0
        engine, net, untrained = build(stage, None, name)
        train(engine, net, 0, PAUSE, lr)
        with Checkpoints(run, keep=1) as checkpoints:
            checkpoints.save(PAUSE, capture(engine, net, None, untrained))  # type: ignore[arg-type]
            straight = train(engine, net, PAUSE, STEPS, lr)  # while the state is being written
        engine, net, untrained = build(stage, newest(run), name)
        assert net.seen == PAUSE
        found[f"{name}-zero{stage}"] = train(engine, net, PAUSE, STEPS, lr), straight
    return found


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run's folder after the journey, and all its losses."""
    folder, losses = tmp_path_factory.mktemp("journey"), []
    for (_, _, first), (ranks, stage, last) in pairwise(((0, 0, 0), *JOURNEY)):
        every = run_ranks(leg, folder, stage, first, last, world=ranks, timeout_s=600)
        assert every == [every[0]] * ranks
        losses += every[0]
    return folder, losses


def test_a_life_on_2_1_4_and_2_ranks_under_zero_1_3_0_and_2_is_the_straight_one_to_1e_5(
    journey: tuple[Path, list[float]], tmp_path: Path
) -> None:
    (straight,) = run_ranks(leg, tmp_path, 0, 0, STEPS, world=1, timeout_s=600)
    assert journey[1] == pytest.approx(straight, abs=1e-5)
    assert straight[-1] < 0.9 * straight[0], "it trained"


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    return run_ranks(pauses, tmp_path_factory.mktemp("pauses"), timeout_s=600)[0]


@pytest.mark.parametrize("case", ["adamw-zero0", "adamw-zero1", "adamw-zero2", "adamw-zero3", "lars-zero0"])
def test_a_pause_on_the_same_ranks_and_stage_changes_no_bit(
    paused: dict[str, tuple[list[float], list[float]]], case: str
) -> None:
    resumed, straight = paused[case]
    assert resumed == straight
    assert len(set(straight)) == STEPS - PAUSE


def state_of_two_ranks() -> RunState:
    """A parameter of five elements, of which the ranks hold three and two."""

    def piece(start: int, size: int) -> dict[str, Any]:
        numbers = torch.arange(start, start + size, dtype=torch.float32)
        optimizer = {"exp_avg": 10 * numbers, "step": torch.tensor(7.0)}
        return {"start": start, "shape": (5, 1), "weights": numbers, "optimizer": optimizer}

    first = {"pieces": {"weight": piece(0, 3)}, "names": ["weight", "seen"], "method": {"seen": torch.tensor(2)}}
    return RunState(7, [first, {"pieces": {"weight": piece(3, 2)}}])


@pytest.mark.parametrize("turned", [False, True])
def test_pieces_come_together_in_the_modules_order_whatever_rank_held_them(turned: bool) -> None:
    state = state_of_two_ranks()
    first, second = state.ranks
    if turned:
        first["pieces"], second["pieces"] = second["pieces"], first["pieces"]
    assert list(state.method()) == ["weight", "seen"]
    assert torch.equal(state.method()["weight"], torch.arange(5.0)[:, None])
    assert state.optimizer("weight", 2, 2)["exp_avg"].tolist() == [20, 30]
    assert state.optimizer("weight", 2, 2)["step"] == 7


@pytest.mark.parametrize(
    ("start", "said"), [(4, "elements 3 to 4 are there twice or not"), (2, "elements 3 to 2 are there twice or not")]
)
def test_a_missing_or_doubled_element_is_an_error(start: int, said: str) -> None:
    state = state_of_two_ranks()
    state.ranks[1]["pieces"]["weight"]["start"] = start
    with pytest.raises(StateError, match=said):
        state.method()


def test_a_missing_rank_is_an_error() -> None:
    state = state_of_two_ranks()
    with pytest.raises(StateError, match="weight: 3 of 5 elements"):
        RunState(7, state.ranks[:1]).method()
    state.ranks[0]["pieces"], state.ranks[1]["pieces"] = {}, {}
    with pytest.raises(StateError, match="weight: 0 of 0 elements"):
        state.method()
