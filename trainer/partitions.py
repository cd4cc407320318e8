"""Which elements of which parameter this rank's optimizer updates, under every ZeRO stage.

The only reader of DeepSpeed's private tables (0.19.8): ZeRO 1 and 2 hand the optimizer one flat tensor a group, ZeRO 3
one a sub-group, and neither says in public which parameter lies where. `check_partitions` compares what was read with
the parameters themselves, so that another version of DeepSpeed is an error at the start and no wrong training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer import distributed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class PartitionError(RuntimeError):
    """DeepSpeed's tables do not describe the parameters."""


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A run of elements of one parameter that this rank's optimizer updates.

    Without ZeRO, and at stage 0, that is the whole parameter, and `owner` is the parameter itself.
    """

    name: str
    """The parameter's, in the wrapped module."""
    shape: torch.Size
    """The whole parameter's."""
    start: int
    """Its first element within the flattened parameter."""
    size: int
    owner: Tensor
    """What the optimizer calls a parameter: the key of its state, of any shape."""
    offset: int
    """The first element within the flattened owner."""

    def of(self, tensor: Tensor) -> Tensor:
        """The piece (size,) of the owner, or of its gradient or its moments; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The piece (size,) of a tensor that is shaped as the parameter; a view."""
        return tensor.detach().view(-1).narrow(0, self.start, self.size)


def pieces(engine: "DeepSpeedEngine") -> list[Piece]:
    """Everything that this rank's optimizer updates, in the optimizer's order; padding is nobody's and left out."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        found = _of_stage_3(zero)
    elif hasattr(zero, "round_robin_bit16_groups"):
        found = _of_stages_1_and_2(zero)
    else:
        found = ((p, 0, p.numel(), p, 0) for group in zero.param_groups for p in group["params"])
    return [
        Piece(names[id(parameter)], _shape(parameter), start, size, owner, offset)
        for parameter, start, size, owner, offset in found
        if size > 0
    ]


Found = Iterator[tuple[nn.Parameter, int, int, Tensor, int]]


def _of_stages_1_and_2(zero: Any) -> Found:
    """A group's parameters lie one after the other, and the ranks share the whole row equally."""
    rows = zip(
        zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.single_partition_of_fp32_groups, strict=True
    )
    for parameters, offsets, owner in rows:
        first = distributed.rank() * owner.numel()
        for parameter, offset in zip(parameters, offsets, strict=True):
            begin, end = max(offset, first), min(offset + parameter.numel(), first + owner.numel())
            yield parameter, begin - offset, end - begin, owner, begin - first


def _of_stage_3(zero: Any) -> Found:
    """The ranks share every parameter equally, the last ones' shares padded; a sub-group's shares lie in a row."""
    for parameters, owner in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for parameter in parameters:
            _, offset, share = zero.grad_position[zero.get_param_id(parameter)]
            start = distributed.rank() * share
            yield parameter, start, min(share, parameter.ds_numel - start), owner, offset


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; ZeRO 3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def check_partitions(engine: "DeepSpeedEngine", originals: dict[str, Tensor]) -> None:
    """Whether the ranks' pieces are the parameters, each element once.

    originals: the trainable parameters by name, whole, as they were when the engine took them
    raises: PartitionError, on every rank
    """
    counts = torch.zeros(len(originals), dtype=torch.long, device=distributed.local_device())
    numbers = {name: number for number, name in enumerate(originals)}
    wrong = set()
    for piece in pieces(engine):
        counts[numbers[piece.name]] += piece.size
        if not torch.equal(piece.of(piece.owner).cpu(), piece.of_whole(originals[piece.name]).cpu()):
            wrong.add(piece.name)
    whole = distributed.sum_over_ranks(counts).cpu().tolist()
    copies = distributed.world() if engine.zero_optimization_stage() == 0 else 1
    wrong |= {name for (name, p), n in zip(originals.items(), whole, strict=True) if n != copies * p.numel()}
    if not distributed.true_everywhere(not wrong):
        raise PartitionError(
            f"DeepSpeed's tables do not describe {', '.join(sorted(wrong)) or 'the parameters of another rank'}; this "
            "version of DeepSpeed is not the one that trainer/partitions.py was written for (0.19.8): install that one"
        )
