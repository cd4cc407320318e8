"""What a training step costs beyond the networks themselves: ours against the bare networks and against others' loops.

python -m benchmarks.step [--networks resnet18 ...] [--batch 4] [--rounds 7] [--threads 1] [--lightly-python PYTHON]

DINO with 2 x 224 + 6 x 128 views of random pixels. "bare" is the student forward and backward on all views and the
teacher forward on the globals, heads included: what no trainer can leave out. Ours is the loop's whole step: both
networks, the loss, the centre, DeepSpeed's engine, optimizer, teacher and logging. The published loop and lightly's
building blocks do the same work their way. The cases take turns in every round; measured is CPU time, all threads
together, so that waiting for a busy core does not count (on a GPU: wall time). Logging is timed by itself and counted
at a twentieth, once in 20 steps as published. Peak memory is that of a process of its own, above what it held before.
One JSON line a network and case: median and range of milliseconds, the median over rounds of the ratio to bare, of
ours to each other case, and peak megabytes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_peers as peers
from trainer import distributed
from trainer.assemble import build_method
from trainer.engine import autocast, build_engine, load_ds_config, rewriting
from trainer.loop import describe
from trainer.methods.teacher import EMATeacher
from trainer.metrics import Averages, MetricLog, StepClock
from trainer.models.backbones import synchronise_batchnorm
from trainer.optim import build_optimizer, param_groups, set_progress
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

ROOT = Path(__file__).parents[1]
VIT = (
    "backbone.args={dynamic_img_size: true, drop_path_rate: 0.1}", "method.num_prototypes=65536",
    "method.head_norm=false", "method.norm_last_layer=false", "optim.name=adamw", "optim.base_lr=0.0005",
    "optim.weight_decay=0.04", "optim.final_weight_decay=0.4",
)  # fmt: skip
NETWORKS = {"resnet18": (), "mobilenetv2_100": (), "vit_tiny_patch16_224": VIT}
"""What each published recipe changes of the ResNet's; the views stay 2 x 224 + 6 x 128 for all."""
LOG_EVERY = 20
STEPS_PER_EPOCH = 1251


@dataclass
class Case:
    """One way to train: a step, and what it does when it logs, in seconds; and the megabytes it has held at most."""

    step: Callable[[], float]
    log: Callable[[], float]
    peak: Callable[[], float] = lambda: peers.memory("VmHWM")


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    distributed.start(distributed.local_device())
    if args.peak_of:
        print(json.dumps(peak_megabytes(args.peak_of, args.networks[0], args)))
        return
    for network in args.networks:
        with all_cases(network, args) as cases:
            seconds = measure(cases, args.rounds)
        for line in report(network, seconds):
            line |= {
                "batch": args.batch,
                "threads": args.threads,
                "peak_mb": peak_in_own_process(line["case"], network, args),
            }
            print(json.dumps(line), flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cases", nargs="*", help="besides bare and ours, of those named in the output; all without it"
    )
    parser.add_argument("--lightly-python", type=Path, help="an interpreter that has lightly, torch and timm")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@contextmanager
def all_cases(network: str, args: argparse.Namespace) -> Iterator[dict[str, Case]]:
    recipe = recipe_of(network, args.batch)
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"bare", "ours", *(args.cases or MAKERS)}  # the two that all others are compared with
        cases = {name: make(recipe, Path(folder)) for name, make in MAKERS.items() if name in wanted}
        if args.lightly_python is None:
            yield cases
            return
        with lightly(args.lightly_python, recipe, args.threads) as case:
            yield cases | {"lightly": case}


def recipe_of(network: str, batch: int) -> Recipe:
    sizes = (f"backbone.name={network}", f"optim.global_batch={batch}", "data.train=none")
    return load_recipe(ROOT / "recipes/dino_resnet18_sslight.yaml", [*sizes, *NETWORKS[network]])


def random_views(recipe: Recipe) -> list[Tensor]:
    """Normalised views as the loop gets them: one tensor a size, channels-last."""
    torch.manual_seed(0)
    groups, batch = (recipe.views.global_views, recipe.views.local_views), recipe.optim.global_batch
    shapes = [(group.count * batch, 3, group.size, group.size) for group in groups]
    device = distributed.local_device()
    return [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for shape in shapes]


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """CPU seconds of a piece of work; on a GPU wall seconds until it is done there."""
    if torch.cuda.is_available():

        def wall() -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        return wall

    def cpu() -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    return cpu


def bare(recipe: Recipe, folder: Path) -> Case:
    """Student forward and backward on all views, teacher forward on the globals; no loss worth the name."""
    device, views = distributed.local_device(), random_views(recipe)
    student = build_method(recipe).student.to(device)
    teacher = EMATeacher(student)

    def step() -> None:
        teacher(views[:1])
        student(views).mean().backward()
        student.zero_grad(set_to_none=True)

    return Case(timed(step), lambda: 0.0)


def ours(recipe: Recipe, folder: Path) -> Case:
    """The body of trainer.loop, on given views."""
    device, views = distributed.local_device(), random_views(recipe)
    ds_config = load_ds_config(None, recipe.optim, micro_batch=recipe.optim.global_batch)
    precision, schedules = autocast(ds_config, device), recipe.schedules(STEPS_PER_EPOCH)
    method = build_method(recipe)
    synchronise_batchnorm(method, device)
    teacher = EMATeacher(method.to(device).student)
    optimizer = build_optimizer(recipe.optim, param_groups(method, method.frozen_parameters()))
    with redirect_stdout(sys.stderr):  # DeepSpeed says there what it has compiled
        engine = build_engine(method, optimizer, ds_config)
    averages, clock = Averages(), StepClock(recipe.optim.global_batch)
    metrics = MetricLog(folder, 0, schedules.num_steps, tensorboard=True)
    labels = torch.full((recipe.optim.global_batch,), -1, device=device)
    progress = schedules.at(2 * STEPS_PER_EPOCH)  # past the frozen first epoch, so that everything is updated

    def step() -> None:
        set_progress(engine.optimizer, progress, frozen=method.frozen(progress))
        with precision:
            teacher_output = teacher(method.teacher_views(views))
        loss, parts, _ = engine(views, teacher_output, progress, labels, range(recipe.optim.global_batch))
        engine.backward(loss)
        engine.step()
        averages.add({"loss": loss, **parts, "bad_images_per_batch": 0})
        applied = engine.was_step_applied()
        with rewriting(engine, method.rewritten_parameters()):
            method.after_step(applied=applied)
        if applied:
            teacher.follow(method.student, progress.momentum)
        clock.tick()

    def log() -> None:
        metrics.write(describe(progress) | averages.read() | clock.read())

    return Case(timed(step), timed(log))


def published(recipe: Recipe, folder: Path, *, channels_last: bool = False) -> Case:
    """The published code's loop around the same networks; its views come in a list."""
    method, views = build_method(recipe), random_views(recipe)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    each = [view for group in views for view in group.split(recipe.optim.global_batch)]
    listed = [view.contiguous(memory_format=layout) for view in each]
    loop = peers.PublishedLoop(method.student.to(views[0].device), recipe, folder)
    return Case(timed(lambda: loop.step(listed)), timed(loop.log))


MAKERS: dict[str, Callable[[Recipe, Path], Case]] = {
    "bare": bare,
    "ours": ours,
    "published loop": published,
    "published loop, channels-last": partial(published, channels_last=True),
}


@contextmanager
def lightly(python: Path, recipe: Recipe, threads: int) -> Iterator[Case]:
    """Another process and interpreter, which does a step whenever it is asked and tells its own time."""
    settings = {
        "network": recipe.backbone.name, "args": recipe.backbone.args, "batch": recipe.optim.global_batch,
        "sizes": [recipe.views.global_views.size] * 2 + [recipe.views.local_views.size] * recipe.views.counts[1],
        "num_prototypes": recipe.method.num_prototypes, "head_norm": recipe.method.head_norm,
        "optimizer": recipe.optim.name, "threads": threads,
    }  # fmt: skip
    command = [str(python), str(Path(__file__).with_name("step_lightly.py")), json.dumps(settings)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    assert worker.stdout is not None

    def ask(what: str) -> float:
        worker.stdin.write(what + "\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
        answer = worker.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            raise RuntimeError(f"{python} ended without an answer; wanted an interpreter with lightly, torch and timm")
        return float(answer)

    with worker:  # closes its input, at which it ends
        yield Case(lambda: ask("step"), lambda: ask("log"), lambda: ask("peak"))


def measure(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds a step and round; two first rounds, in which buffers are made, do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(rounds + 2):
        for name, case in cases.items():
            value = case.step() + case.log() / LOG_EVERY
            if done >= 2:
                seconds[name].append(value)
    return seconds


def report(network: str, seconds: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    for name, values in seconds.items():
        line: dict[str, Any] = {"network": network, "case": name, "ms": round(statistics.median(values) * 1000, 1)}
        line |= {"low": round(min(values) * 1000, 1), "high": round(max(values) * 1000, 1)}
        line["ratio_to_bare"] = ratio(values, seconds["bare"])
        line["ours_to_this"] = ratio(seconds["ours"], values)
        yield line


def ratio(values: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(values, others, strict=True)), 3)


def peak_in_own_process(case: str, network: str, args: argparse.Namespace) -> float:
    options = ["--networks", network, "--batch", str(args.batch), "--threads", str(args.threads), "--peak-of", case]
    options += ["--lightly-python", str(args.lightly_python)] if args.lightly_python else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *options], check=True, capture_output=True, text=True
    )
    return float(done.stdout.splitlines()[-1])


def peak_megabytes(name: str, network: str, args: argparse.Namespace) -> float:
    """The most that a few steps of one case hold, above what the process held before it was built."""
    recipe, before = recipe_of(network, args.batch), peers.memory("VmRSS")
    if name == "lightly":
        with lightly(args.lightly_python, recipe, args.threads) as case:
            return after_three_steps(case)
    with tempfile.TemporaryDirectory() as folder:
        peak = after_three_steps(MAKERS[name](recipe, Path(folder)))
    return round(torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak - before, 1)


def after_three_steps(case: Case) -> float:
    for _ in range(3):
        case.step()
    return case.peak()


if __name__ == "__main__":
    main()
