"""What the engine costs beside plain DistributedDataParallel: the same step, on every rank of a launch, wall time.

torchrun --nproc_per_node 2 -m benchmarks.engine [--networks resnet18 ...] [--stages 0 1] [--batch 4]

DINO with 2 + 6 views of random pixels, AdamW. The loss, the centre, the teacher and the averages are ours in every
case; what differs is who sums the gradients and updates the weights: torch's DDP and fused AdamW, or DeepSpeed at each
ZeRO stage. The cases take turns in every round, and the ranks begin each together. One JSON line a network and case:
median and range of milliseconds a step, and the median over rounds of the ratio to DDP, with its range.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step import NETWORKS, ROOT, STEPS_PER_EPOCH, VIT, random_views
from trainer import distributed
from trainer.assemble import build_method
from trainer.engine import build_engine, load_ds_config
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.metrics import Averages
from trainer.models.backbones import synchronise_batchnorm
from trainer.optim import build_optimizer, param_groups, set_progress
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

Step = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    device = distributed.local_device()
    distributed.start(device)
    for network in args.networks:
        recipe = recipe_of(network, args)
        cases = {"ddp": ddp(recipe, device)}
        for stage in args.stages:
            with redirect_stdout(sys.stderr):  # DeepSpeed says there what it has compiled
                cases[f"zero{stage}"] = engine(recipe, device, stage)
        seconds = measure(cases, args.rounds)
        if distributed.is_main():
            report(network, seconds)
    distributed.stop()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_tiny_patch16_224"], choices=NETWORKS)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--batch", type=int, default=4, help="images a rank")
    parser.add_argument("--size", type=int, default=96, help="pixels of global views; local ones have half")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(argv)


def recipe_of(network: str, args: argparse.Namespace) -> Recipe:
    """The SSLight recipe with smaller views and AdamW, which ZeRO shards."""
    small = (
        f"backbone.name={network}", f"optim.global_batch={args.batch * distributed.world()}", "data.train=none",
        f"views.global_views.size={args.size}", f"views.local_views.size={args.size // 2}",
    )  # fmt: skip
    adamw = ("optim.name=adamw", "optim.base_lr=0.0005", "optim.weight_decay=0.04", "optim.final_weight_decay=0.4")
    changes = (*NETWORKS[network], *adamw, "method.num_prototypes=4096")
    if NETWORKS[network] == VIT:
        changes = (*changes, f"backbone.args={{dynamic_img_size: true, drop_path_rate: 0.1, img_size: {args.size}}}")
    return load_recipe(ROOT / "recipes/dino_resnet18_sslight.yaml", [*small, *changes])


def parts(recipe: Recipe, device: torch.device) -> tuple[Method, EMATeacher, torch.optim.Optimizer]:
    """The same on every rank and in every case."""
    method = build_method(recipe)
    synchronise_batchnorm(method, device)
    teacher = EMATeacher(method.to(device).student)
    return method, teacher, build_optimizer(recipe.optim, param_groups(method, method.frozen_parameters()))


def step_of(
    recipe: Recipe, method: Method, teacher: EMATeacher, optimizer: Any, forward: Any, update: Callable[..., object]
) -> Step:
    """The body of trainer.loop on given views, around a way to update."""
    device = distributed.local_device()
    views = rank_views(recipe)
    labels = torch.full((recipe.micro_batch(distributed.world()),), -1, device=device)
    progress, averages = recipe.schedules(STEPS_PER_EPOCH).at(2 * STEPS_PER_EPOCH), Averages()

    def step() -> None:
        set_progress(optimizer, progress, frozen=False)
        teacher_output = teacher(method.teacher_views(views))
        loss, values, _ = forward(views, teacher_output, progress, labels)
        update(loss)
        averages.add({"loss": loss, **values})
        method.after_step(applied=True)
        teacher.follow(method.student, progress.momentum)

    return step


def rank_views(recipe: Recipe) -> list[torch.Tensor]:
    """This rank's share of the views of a global batch."""
    return [group[: len(group) // distributed.world()] for group in random_views(recipe)]


def ddp(recipe: Recipe, device: torch.device) -> Step:
    method, teacher, optimizer = parts(recipe, device)
    wrapped = DistributedDataParallel(method, broadcast_buffers=False)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step_of(recipe, method, teacher, optimizer, wrapped, update)


def engine(recipe: Recipe, device: torch.device, stage: int) -> Step:
    method, teacher, optimizer = parts(recipe, device)
    path = ROOT / f"ds_configs/zero{stage}.json"
    ds_config = load_ds_config(path, recipe.optim, micro_batch=recipe.micro_batch(distributed.world()))
    wrapped = build_engine(method, optimizer, ds_config)

    def update(loss: torch.Tensor) -> None:
        wrapped.backward(loss)
        wrapped.step()

    return step_of(recipe, method, teacher, wrapped.optimizer, wrapped, update)


def measure(cases: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each round; three first ones, in which buffers are made, do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(rounds + 3):
        for name, step in cases.items():
            distributed.barrier()
            begin = time.perf_counter()
            step()
            distributed.barrier()
            if done >= 3:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(network: str, seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        ratios = sorted(value / other for value, other in zip(values, seconds["ddp"], strict=True))
        line: dict[str, Any] = {"network": network, "case": name, "ms": round(statistics.median(values) * 1000, 1)}
        line |= {"low": round(min(values) * 1000, 1), "high": round(max(values) * 1000, 1)}
        line |= {"ratio_to_ddp": round(statistics.median(ratios), 3)}
        line |= {"ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)]}
        print(json.dumps(line | {"ranks": distributed.world()}), flush=True)


if __name__ == "__main__":
    main()
