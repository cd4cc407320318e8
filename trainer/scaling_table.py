"""The table of `trainer show --nodes`: what a recipe would move, keep and reach on 1, 2, 4 ... nodes."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.table import Table

from trainer.collectives import Traffic, traffic
from trainer.methods.frozen import FrozenTeacher
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.recipe import Recipe, RecipeError
from trainer.scaling import (
    STAGES,
    Cluster,
    Collective,
    Measured,
    Memory,
    Network,
    Plan,
    communication_s,
    doubled,
    image_s,
    memory,
    sent_bytes,
    zero_collectives,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One recipe's step, as far as ranks matter: parameters, and what the method itself says."""

    num_trained: int
    num_tensors: int
    num_teacher: int
    follows: bool
    """Whether the teacher follows the student, for which ZeRO 3 gathers it once more."""
    optimizer: str
    global_batch: int
    accumulation: int
    traffic: Traffic

    def collectives(self, stage: int, ranks: int, images: float) -> tuple[list[Collective], ...]:
        """Of gradients and parameters, of BatchNorm, of the objective; images: a rank and step."""
        of_zero = zero_collectives(
            self.num_trained,
            self.num_tensors,
            num_teacher=self.num_teacher if self.follows else 0,
            stage=stage,
            ranks=ranks,
            accumulation=self.accumulation,
        )
        return of_zero, *self.traffic.at(images / self.accumulation)

    def communication_s(self, stage: int, cluster: Cluster, images: float, network: Network) -> float:
        """All of them, in seconds."""
        every = [one for part in self.collectives(stage, cluster.ranks, images) for one in part]
        return communication_s(every, cluster, network)

    def memory(self, stage: int, ranks: int) -> Memory:
        """What a rank keeps."""
        return memory(
            self.num_trained, num_teacher=self.num_teacher, optimizer=self.optimizer, stage=stage, ranks=ranks
        )


def step_of(
    recipe: Recipe, method: Method, teacher: EMATeacher | FrozenTeacher | None, *, num_classes: int | None
) -> Step:
    """The step of a recipe and of the networks that were built for it."""
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return Step(
        num_trained=sum(parameter.numel() for parameter in trained),
        num_tensors=len(trained),
        num_teacher=0 if teacher is None else sum(parameter.numel() for parameter in teacher.parameters()),
        follows=isinstance(teacher, EMATeacher),
        optimizer=recipe.optim.name,
        global_batch=recipe.optim.global_batch,
        accumulation=recipe.optim.accumulation,
        traffic=traffic(recipe, num_classes=num_classes),
    )


def scaling_table(step: Step, recipe: Recipe, plan: Plan) -> Table:
    """A block of rows for each number of nodes, a row for each ZeRO stage."""
    measured = measurement(plan, recipe)
    per_image_s = None if measured is None else seconds_an_image(step, measured, plan.network)
    title = "On more nodes, on paper: what a GPU sends a step, and keeps, in 10^6 bytes"
    table = Table(title=title, caption=caption(plan))
    sent, kept = ("gradients", "norm", "loss"), ("weights", "gradients", "optimizer", "teacher")
    headings = (*(f"sent:\n{name}" for name in sent), *(f"kept:\n{name}" for name in kept))
    for column in ("nodes", "GPUs", "images", "ZeRO", *headings, "talk ms", "efficiency"):
        table.add_column(column, justify="right", no_wrap=True)
    for nodes in doubled(plan.nodes):
        cluster = Cluster(nodes=nodes, gpus_per_node=plan.gpus_per_node)
        images = step.global_batch / (plan.gpus_per_node if plan.weak else cluster.ranks)
        if images % step.accumulation:
            table.add_row(str(nodes), str(cluster.ranks), "uneven")
        else:
            for stage in STAGES:
                table.add_row(*row(step, cluster, stage, images, plan.network, per_image_s))
        table.add_section()
    return table


def row(
    step: Step, cluster: Cluster, stage: int, images: float, network: Network, per_image_s: float | None
) -> Sequence[str]:
    """One line of the table; images: a rank and step."""
    sent = [
        sum(sent_bytes(one, cluster.ranks) for one in part) for part in step.collectives(stage, cluster.ranks, images)
    ]
    kept = step.memory(stage, cluster.ranks)
    talk_s = step.communication_s(stage, cluster, images, network)
    sizes = (*sent, kept.parameters, kept.gradients, kept.optimizer, kept.teacher)
    efficiency = "" if per_image_s is None else f"{per_image_s * images / (per_image_s * images + talk_s):.1%}"
    where = (str(cluster.nodes), str(cluster.ranks), f"{images:g}", str(stage))
    return (*where, *(f"{size / 1e6:.2f}" for size in sizes), f"{talk_s * 1e3:.2f}", efficiency)


def seconds_an_image(step: Step, measured: Measured, network: Network) -> float:
    """What a rank computes for, an image; RecipeError if the links explain more than the measured time."""
    images = measured.images / measured.cluster.ranks
    try:
        return image_s(measured, step.communication_s(measured.stage, measured.cluster, images, network))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def measurement(plan: Plan, recipe: Recipe) -> Measured | None:
    """The timed step that efficiencies follow from, if one was given."""
    if plan.run is not None:
        return of_run(plan.run, recipe)
    if plan.step_s is None:
        return None
    node = Cluster(nodes=1, gpus_per_node=plan.gpus_per_node)
    return Measured(step_s=plan.step_s, cluster=node, images=recipe.optim.global_batch, stage=0)


def of_run(run: Path, recipe: Recipe) -> Measured:
    """The median step of a run, its first record left out; the ranks of the run count as those of one node.

    raises: RecipeError if the run trained other networks on other views, or wrote too little
    """
    try:
        trained = yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))
        world = json.loads((run / "environment.json").read_text(encoding="utf-8"))["world"]
        stage = json.loads((run / "ds_config.json").read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"--measured {run}: wanted a run directory: {error}") from error
    ours = recipe.plain()
    others = [key for key in ("method", "teacher", "backbone", "views", "probe") if trained[key] != ours[key]]
    if others:
        raise RecipeError(f"--measured {run}: its {', '.join(others)} differ from the recipe's; give its own recipe")
    times = [record["step_time_s"] for record in map(json.loads, lines) if "step_time_s" in record][1:]
    if not times:
        raise RecipeError(f"--measured {run}: wanted at least 2 records of steps in metrics.jsonl; let it run longer")
    node = Cluster(nodes=1, gpus_per_node=world)
    images = trained["optim"]["global_batch"]
    return Measured(step_s=statistics.median(times), cluster=node, images=images, stage=stage)


def caption(plan: Plan) -> str:
    """What the figures stand on."""
    network = plan.network
    batch = "each node brings its own global batch" if plan.weak else "one global batch, shared by all"
    links = f"{network.gpu_gbps:g} Gbit/s a GPU within a node, {network.link_gbps:g} a node between them"
    if plan.run is None and plan.step_s is None:
        efficiency = "efficiency needs a measured step: --measured RUN or --step-time-s"
    else:
        efficiency = "efficiency is computing / (computing + talk), and nothing overlaps"
    uneven = "uneven: the GPUs do not divide the batch"
    return f"{batch}; rings over {links}; {efficiency}; {uneven}. See docs/clusters.md"
