"""What a step moves and keeps on many ranks: bytes, memory, seconds and efficiency, on paper.

Nothing here has been compared with a cluster. The bytes are those that runs of two ranks on a CPU really moved
(tests/test_scaling.py); the seconds are a model's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
FP32 = 4
"""Bytes a number. Parameters, gradients and optimizer states are fp32 in every precision that the engine allows."""
OPTIMIZER_STATES = {"adamw": 2, "lars": 1}
"""Numbers that an optimizer keeps for each parameter: two moments, or one momentum."""
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of call of a step, as often as it is made with that size."""

    kind: Kind
    num_bytes: float
    """What each rank brings; of an all_gather, therefore, its own part of the result."""
    times: float = 1


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links of a cluster; the defaults are NVLink of an A100 and one 100 Gbit/s adapter a node."""

    gpu_gbps: float = 1880
    """Gbit/s that a GPU sends to its neighbour in the node; 235 GB/s is where NCCL caps its ring on such a machine."""
    link_gbps: float = 100
    """Gbit/s that a node sends, all its adapters together: a ring leaves each node once."""
    gpu_latency_us: float = 0.85
    """A step of a ring within a node; NCCL's 0.47 us for small messages on NVLink, times its 1.8 for several nodes."""
    link_latency_us: float = 2.7
    """A step between nodes, from the same table."""
    call_us: float = 3.6
    """A call's own time, from the same table (NCCL, src/graph/tuning.cc, ring, protocol LL)."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How many GPUs there are; a rank on each."""

    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank keeps between steps. Activations, buffers of DeepSpeed and the views are not among them."""

    parameters: float
    gradients: float
    optimizer: float
    """Its states and, from stage 1 on, DeepSpeed's own fp32 copy of what the rank updates."""
    teacher: float

    @property
    def total(self) -> float:
        """All four."""
        return self.parameters + self.gradients + self.optimizer + self.teacher


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A step that was timed: the only thing here that cannot be derived."""

    step_s: float
    cluster: Cluster
    images: int
    """Of the step, over all ranks."""
    stage: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for on the command line."""

    nodes: int
    """The most; 1, 2, 4 ... are shown up to it."""
    gpus_per_node: int = 8
    network: Network = Network()
    weak: bool = False
    """Every node brings a global batch of its own, instead of a share of one."""
    step_s: float | None = None
    """A step's time on one such node, measured."""
    run: Path | None = None
    """A run directory with the time of a step, in place of step_s."""

    def check(self) -> str | None:
        """What is wrong with it, or None."""
        if min(self.nodes, self.gpus_per_node) < 1:
            return f"--nodes and --gpus-per-node must be at least 1, got {self.nodes} and {self.gpus_per_node}"
        if min(self.network.gpu_gbps, self.network.link_gbps) <= 0 or (self.step_s is not None and self.step_s <= 0):
            return "--gpu-gbps, --link-gbps and --step-time-s must be above 0"
        if self.step_s is not None and self.run is not None:
            return "--step-time-s and --measured are two answers to one question; give one of them"
        return None


def sent_bytes(collective: Collective, ranks: int) -> float:
    """What a rank sends in a ring; it receives as much.

    source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009
    """
    n, others = collective.num_bytes, ranks - 1
    each = {"all_reduce": 2 * n * others / ranks, "reduce_scatter": n * others / ranks, "all_gather": n * others}
    return collective.times * each[collective.kind]


def seconds(collective: Collective, cluster: Cluster, network: Network) -> float:
    """How long a ring takes: the call, a latency for each of its steps, and the bytes over the slowest link.

    An all-reduce takes 2 (W - 1) steps, of which 2 (N - 1) go between nodes; the others half as many.
    source: the alpha-beta model (Hockney 1994) with the step counts of NCCL, src/graph/tuning.cc. NCCL reduces small
    tensors in trees instead, with fewer steps: on many nodes this is an upper estimate.
    """
    if cluster.ranks == 1:
        return 0.0
    rounds = 2 if collective.kind == "all_reduce" else 1
    within, between = rounds * (cluster.ranks - cluster.nodes), rounds * (cluster.nodes - 1)
    latency_us = network.call_us + within * network.gpu_latency_us + between * network.link_latency_us
    gbps = network.gpu_gbps if cluster.nodes == 1 else min(network.gpu_gbps, network.link_gbps)
    return collective.times * latency_us * 1e-6 + 8 * sent_bytes(collective, cluster.ranks) / (gbps * 1e9)


def zero_collectives(
    num_trained: int, num_tensors: int, *, num_teacher: int, stage: int, ranks: int, accumulation: int
) -> list[Collective]:
    """What DeepSpeed 0.19.8 moves of gradients and parameters in a step, as counted in runs of two ranks.

    Stages 1 and 2 all-reduce whole gradients too, and then gather what every rank has updated: half as much again as
    stage 0. Stage 2 reduces at every micro-batch. Stage 3 gathers every tensor once a micro-batch and keeps it from the
    forward pass to the backward one, since small networks stay below stage3_max_reuse_distance; and once more where a
    teacher follows. Tensors below stage3_param_persistence_threshold it gathers once a step, which is left out here.
    """
    whole = FP32 * num_trained
    if stage == 0:
        return [Collective(kind="all_reduce", num_bytes=whole)]
    if stage in (1, 2):
        reduced = Collective(kind="all_reduce", num_bytes=whole, times=accumulation if stage == 2 else 1)
        return [reduced, Collective(kind="all_gather", num_bytes=whole / ranks)]
    if stage == 3:
        gathered = Collective(
            kind="all_gather", num_bytes=whole / ranks / num_tensors, times=num_tensors * accumulation
        )
        followed = Collective(kind="all_gather", num_bytes=FP32 * num_teacher / ranks, times=1 if num_teacher else 0)
        return [gathered, followed, Collective(kind="reduce_scatter", num_bytes=whole, times=accumulation)]
    raise ValueError(f"wanted a ZeRO stage of {STAGES}, got {stage}")


def memory(num_trained: int, *, num_teacher: int, optimizer: str, stage: int, ranks: int) -> Memory:
    """What a rank keeps for a student of `num_trained` parameters; the teacher is whole on every rank.

    source: ZeRO, arXiv 1910.02054, section 3, in fp32; the copy of stages 1 to 3 as DeepSpeed 0.19.8 makes it
    raises: ValueError if it is not known what the optimizer keeps
    """
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"wanted an optimizer of {', '.join(OPTIMIZER_STATES)}, got {optimizer}")
    whole = FP32 * num_trained
    copies = OPTIMIZER_STATES[optimizer] + (1 if stage > 0 else 0)
    return Memory(
        parameters=whole / (ranks if stage == 3 else 1),
        gradients=whole / (ranks if stage >= 2 else 1),
        optimizer=copies * whole / (ranks if stage >= 1 else 1),
        teacher=FP32 * num_teacher,
    )


def communication_s(collectives: Iterable[Collective], cluster: Cluster, network: Network) -> float:
    """All collectives of a step, one after the other: nothing is assumed to hide behind computation."""
    return sum(seconds(collective, cluster, network) for collective in collectives)


def image_s(measured: Measured, communication: float) -> float:
    """Seconds that one rank computes for one image, from a timed step and what of it was communication.

    raises: ValueError if communication alone would take longer than the whole step did
    """
    if communication >= measured.step_s:
        raise ValueError(
            f"the measured step took {measured.step_s:.4g} s, and communication alone should take {communication:.4g} "
            "s of it on these links: give the links of the machine that it was measured on"
        )
    return (measured.step_s - communication) * measured.cluster.ranks / measured.images


def doubled(nodes: int) -> list[int]:
    """1, 2, 4 ... up to the number of nodes, and that number itself."""
    powers = [2**power for power in range(nodes.bit_length()) if 2**power < nodes]
    return [*powers, nodes]
