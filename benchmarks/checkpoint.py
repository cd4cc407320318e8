"""For how long a checkpoint holds up the training, beside the time of a step.

python -m benchmarks.checkpoint FOLDER [--networks resnet18 ...] [--batch 4] [--rounds 5] [--threads 1]

DINO with 2 x 224 + 6 x 128 views of random pixels, one process. In every round: a step with nothing else going on, the
call that saves the state, a step beside which the file is written, and the wait for the rest of the writing. FOLDER is
on the disk to write to. One JSON line a network: medians and ranges of wall milliseconds, and of the calling thread's
CPU milliseconds (`cpu`), in which a busy machine does not count; megabytes of the file.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from benchmarks.step import NETWORKS, STEPS_PER_EPOCH, random_views, recipe_of
from trainer import distributed
from trainer.assemble import build_method
from trainer.checkpoint import Checkpoints
from trainer.engine import build_engine, load_ds_config
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import synchronise_batchnorm
from trainer.optim import build_optimizer, param_groups, set_progress
from trainer.recipe import Recipe
from trainer.run_state import capture, untrained_parameters


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", default=["resnet18"], choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    distributed.start(distributed.local_device())
    for network in args.networks:
        measured = measure(recipe_of(network, args.batch), args.folder / network, args.rounds)
        (size,) = {file.stat().st_size for file in (args.folder / network).glob("checkpoints/step_*/*.pt")}
        line = {"network": network, "batch": args.batch, "threads": args.threads, "file_mb": round(size / 1e6)}
        print(json.dumps(line | {what: summary(times) for what, times in measured.items()}), flush=True)


def measure(recipe: Recipe, folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each piece of work and round; a first round, which makes buffers, does not count."""
    step, save, wait = training(recipe, folder)
    work = {"step": step, "held_up": save, "step_while_writing": step, "rest_of_writing": wait}
    measured: dict[str, list[tuple[float, float]]] = {what: [] for what in work}
    for number in range(rounds + 1):
        for what, do in work.items():
            wall, cpu = time.perf_counter(), time.thread_time()
            do()
            if torch.cuda.is_available() and do is step:
                torch.cuda.synchronize()
            if number > 0:
                measured[what].append((time.perf_counter() - wall, time.thread_time() - cpu))
    return measured


def training(recipe: Recipe, folder: Path) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """A step of the loop, a save after it, and the wait for the writing."""
    device, views = distributed.local_device(), random_views(recipe)
    method = build_method(recipe)
    synchronise_batchnorm(method, device)
    teacher = EMATeacher(method.to(device).student)
    optimizer = build_optimizer(recipe.optim, param_groups(method, method.frozen_parameters()))
    config = load_ds_config(None, recipe.optim, micro_batch=recipe.optim.global_batch)
    with redirect_stdout(sys.stderr):  # DeepSpeed says there what it has compiled
        engine = build_engine(method, optimizer, config)
    progress = recipe.schedules(STEPS_PER_EPOCH).at(2 * STEPS_PER_EPOCH)  # past the frozen first epoch
    checkpoints = Checkpoints(folder, keep=1)

    def step() -> None:
        set_progress(engine.optimizer, progress, frozen=False)
        loss, *_ = engine(views, teacher(method.teacher_views(views)), progress, None)
        engine.backward(loss)
        engine.step()
        method.after_step(applied=True)
        teacher.follow(method.student, progress.momentum)

    def save() -> None:
        checkpoints.save(engine.global_steps, capture(engine, method, teacher, untrained_parameters(method)))

    return step, save, checkpoints.wait


def summary(times: list[tuple[float, float]]) -> dict[str, float | list[float]]:
    wall, cpu = ([1000 * value for value in values] for values in zip(*times, strict=True))
    ranges = {"ms": wall, "cpu": cpu}
    return {name: round(statistics.median(values), 1) for name, values in ranges.items()} | {
        "range_ms": [round(min(wall), 1), round(max(wall), 1)]
    }


if __name__ == "__main__":
    main()
