"""What a run is after a step: taken from its objects, and put back on any number of ranks and under any ZeRO stage.

Every rank gives what it alone holds: its pieces of the trained parameters and of their optimizer state, by name, its
generators, and BatchNorm statistics that count its own rows only. Rank 0 adds what all ranks hold alike. The pieces of
all ranks together are the whole parameters, so nothing in a checkpoint depends on who wrote it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer import distributed
from trainer.generators import read_generators, seed_everything, set_generators
from trainer.methods.frozen import FrozenTeacher
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.models.norm import statistics_of_this_rank
from trainer.partitions import pieces

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Teacher = EMATeacher | FrozenTeacher | None
COUNTERS = ("global_steps", "skipped_steps", "micro_steps", "global_samples")
"""What DeepSpeed counts; accumulation and its own log follow them."""
STEP = "step"
"""The one state of our optimizers that is a number a tensor instead of a number an element: AdamW's count of steps."""


class StateError(ValueError):
    """State that does not belong to this run's networks."""


@torch.no_grad()
def capture(
    engine: "DeepSpeedEngine", method: Method, teacher: Teacher, untrained: Mapping[str, Tensor]
) -> dict[str, Any]:
    """This rank's share of the state, as views into what goes on changing: copy it before the next step.

    untrained: the method's parameters that nothing trains, whole; ZeRO 3 cuts up the method's own
    """
    mine = {
        "pieces": _pieces(engine) if distributed.is_main() or engine.zero_optimization_stage() > 0 else {},
        "generators": read_generators(),
        "method_statistics": statistics_of_this_rank(method),
        "teacher_statistics": statistics_of_this_rank(teacher) if isinstance(teacher, EMATeacher) else {},
    }
    if not distributed.is_main():
        return mine
    whole = method.state_dict()
    parameters = {name for name, _ in method.named_parameters()}
    scaler = _grad_scaler(engine)
    return mine | {
        "names": list(whole),
        "method": {name: value for name, value in whole.items() if name not in parameters} | dict(untrained),
        "teacher": dict(teacher.state_dict()) if isinstance(teacher, EMATeacher) else None,
        "frozen_teacher": teacher.digest if isinstance(teacher, FrozenTeacher) else None,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "grad_scaler": None if scaler is None else scaler.state_dict(),
    }


def _pieces(engine: "DeepSpeedEngine") -> dict[str, dict[str, Any]]:
    """By parameter: where this rank's piece starts, its weights, and its slice of every optimizer state."""
    found: dict[str, dict[str, Any]] = {}
    for piece in pieces(engine):
        state = engine.basic_optimizer.state.get(piece.owner, {})
        slices = {key: value if key == STEP else piece.of(value) for key, value in state.items()}
        found[piece.name] = {
            "start": piece.start,
            "shape": tuple(piece.shape),
            "weights": piece.of(piece.owner),
            "optimizer": slices,
        }
    return found


def untrained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters without gradient, of a module that no ZeRO has cut up."""
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


@dataclass(frozen=True)
class RunState:
    """The state after `step` steps, as the ranks of that time gave it."""

    step: int
    ranks: list[dict[str, Any]]

    def method(self) -> dict[str, Any]:
        """The method's whole state_dict, in its order.

        raises: StateError if an element of a parameter is there twice or not at all
        """
        shared = self.ranks[0]["method"]
        return {name: shared[name] if name in shared else self._whole(name) for name in self.ranks[0]["names"]}

    def teacher(self) -> dict[str, Tensor] | None:
        """The teacher's state_dict."""
        state: dict[str, Tensor] | None = self.ranks[0]["teacher"]
        return state

    def frozen_teacher(self) -> str | None:
        """The hash of a teacher that is not in the checkpoint, since nothing changes it."""
        digest: str | None = self.ranks[0].get("frozen_teacher")
        return digest

    def optimizer(self, name: str, start: int, size: int) -> dict[str, Tensor]:
        """Elements [start, start + size) of every optimizer state of one parameter; its STEP as it is."""
        found = self._of(name)
        state = {key: torch.cat([piece["optimizer"][key] for piece in found]) for key in _keys(found, name) - {STEP}}
        return {key: value[start : start + size] for key, value in state.items()} | _steps(found, name)

    def _of(self, name: str) -> list[dict[str, Any]]:
        """A parameter's pieces in their order, each element once."""
        found = [rank["pieces"][name] for rank in self.ranks if name in rank["pieces"]]
        found.sort(key=lambda piece: int(piece["start"]))
        end = 0
        for piece in found:
            if piece["start"] != end:
                raise StateError(f"{name}: elements {end} to {piece['start']} are there twice or not at all")
            end += len(piece["weights"])
        wanted = torch.Size(found[0]["shape"]).numel() if found else 0
        if not found or end != wanted:
            raise StateError(f"{name}: {end} of {wanted} elements are there")
        return found

    def _whole(self, name: str) -> Tensor:
        found = self._of(name)
        return torch.cat([piece["weights"] for piece in found]).view(found[0]["shape"])


def _keys(found: list[dict[str, Any]], name: str) -> set[str]:
    keys = {frozenset(piece["optimizer"]) for piece in found}
    if len(keys) != 1:
        raise StateError(f"{name}: its pieces have different optimizer states: {[sorted(each) for each in keys]}")
    return set(keys.pop())


def _steps(found: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    steps = [piece["optimizer"][STEP] for piece in found if STEP in piece["optimizer"]]
    if any(not torch.equal(step, steps[0]) for step in steps):
        raise StateError(f"{name}: its pieces were not updated equally often: {[float(step) for step in steps]}")
    return {STEP: steps[0]} if steps else {}


def load_networks(state: RunState, method: Method, teacher: Teacher) -> None:
    """Give method and teacher their weights and buffers, before an engine takes its own copies of them.

    raises: StateError if they are other networks
    """
    saved_teacher = state.teacher()
    try:
        method.load_state_dict(state.method())
        if isinstance(teacher, EMATeacher):
            teacher.load_state_dict(saved_teacher or {})
    except RuntimeError as error:
        raise StateError(f"the checkpoint's networks are not this run's: {error}") from error
    if isinstance(teacher, FrozenTeacher) and teacher.digest != state.frozen_teacher():
        raise StateError(
            f"the run was trained with a frozen teacher of hash {state.frozen_teacher()}, and its source now gives "
            f"{teacher.digest}; bring the old one back, or start a new run.dir"
        )


@torch.no_grad()
def load_engine(state: RunState, engine: "DeepSpeedEngine", method: Method, teacher: Teacher) -> None:
    """Give the engine its optimizer state and counters; after it, statistics that ranks kept to themselves."""
    optimizer = engine.basic_optimizer
    optimizer.state.clear()
    for piece in pieces(engine):
        mine = optimizer.state[piece.owner]
        for key, value in state.optimizer(piece.name, piece.start, piece.size).items():
            if key == STEP:
                _set_step(mine, value.to(piece.owner.device), piece.name)
            else:
                piece.of(mine.setdefault(key, torch.zeros_like(piece.owner, requires_grad=False))).copy_(value)
    main = state.ranks[0]
    for name, count in main["counters"].items():
        setattr(engine, name, count)
    scaler = _grad_scaler(engine)
    if scaler is not None and main["grad_scaler"] is not None:
        scaler.load_state_dict(main["grad_scaler"])
    own = state.ranks[distributed.rank() % len(state.ranks)]
    method.load_state_dict(own["method_statistics"], strict=False)
    if isinstance(teacher, EMATeacher):
        teacher.load_state_dict(own["teacher_statistics"], strict=False)


def _set_step(state: dict[str, Any], step: Tensor, name: str) -> None:
    """A flat tensor of several parameters has one count of steps for all of them."""
    if not torch.equal(state.setdefault(STEP, step.clone()), step):
        raise StateError(f"{name} was updated {float(step)} times and its neighbour {float(state[STEP])} times")


def load_generators(state: RunState | None, seed: int) -> None:
    """Each rank's generators as they were; fresh ones at the start, and where the number of ranks has changed."""
    if state is None:
        seed_everything(seed, distributed.rank())
    elif len(state.ranks) == distributed.world():
        set_generators(state.ranks[distributed.rank()]["generators"])
    else:
        seed_everything(seed, distributed.rank(), state.step)


def _grad_scaler(engine: "DeepSpeedEngine") -> Any:
    """The scaler of float16 autocast, wherever the ZeRO stage keeps it; None in every other precision."""
    if engine.zero_optimization_stage() == 0:
        return engine.torch_autocast_z0_gradscaler
    return getattr(engine.optimizer, "torch_autocast_gradscaler", None)
