"""What a frozen teacher of ViT-B's size costs a step, with the cache of its outputs and without.

python -m benchmarks.teacher_cache [--network resnet18] [--batch 2] [--rounds 5] [--threads 1] [--prototypes 4096]

DINO with 2 x 224 + 6 x 128 views of random pixels. "self-supervised" is the student with its running average as
teacher; "frozen" has a ViT-B/16 with a DINO head instead, of random weights, as time does not depend on them; "frozen,
cached" reads what that said from the files of the cache, checksums included; "frozen, filling" computes and writes
them. Each is the loop's step: both networks, the loss, DeepSpeed's engine and optimizer. The cases take turns in every
round; measured is CPU time, all threads together (on a GPU: wall time). Peak memory is that of a process of its own,
above what it held before. One JSON line a case: median and range of milliseconds, the median over rounds of its ratio
to "self-supervised" and of "frozen" to it, and peak megabytes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from torch import Tensor

from benchmarks.step import Case, after_three_steps, measure, random_views, ratio, timed
from benchmarks.step_peers import memory
from trainer import distributed
from trainer.assemble import build_method
from trainer.engine import build_engine, load_ds_config
from trainer.methods.frozen import FrozenTeacher
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Branch, synchronise_batchnorm
from trainer.models.heads import FrozenHead, mlp
from trainer.optim import build_optimizer, param_groups, set_progress
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.teachers.cache import EmbeddingCache, create_files

ROOT = Path(__file__).parents[1]
Kind = Literal["self-supervised", "frozen", "frozen, cached", "frozen, filling"]
KINDS: tuple[Kind, ...] = ("self-supervised", "frozen", "frozen, cached", "frozen, filling")
BOTTLENECK = 256


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    distributed.start(distributed.local_device())
    with tempfile.TemporaryDirectory() as folder:
        if args.peak_of:
            before = memory("VmRSS")
            peak = after_three_steps(case_of(args.peak_of, args, Path(folder)))
            print(json.dumps(round(peak - before, 1)))
            return
        cases = {kind: case_of(kind, args, Path(folder, str(place))) for place, kind in enumerate(KINDS)}
        seconds = measure(cases, args.rounds)
    for kind, values in seconds.items():
        line: dict[str, Any] = {"case": kind, "network": args.network, "batch": args.batch, "threads": args.threads}
        for name, value in (("ms", statistics.median(values)), ("low", min(values)), ("high", max(values))):
            line[name] = round(value * 1000, 1)
        line["to_self_supervised"] = ratio(values, seconds["self-supervised"])
        line["frozen_to_this"] = ratio(seconds["frozen"], values)
        print(json.dumps(line | {"peak_mb": peak_in_own_process(kind, args)}), flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="the student")
    parser.add_argument("--batch", type=int, default=2, help="images a step")
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def recipe_of(args: argparse.Namespace, *, frozen: bool) -> Recipe:
    settings = [f"backbone.name={args.network}", f"optim.global_batch={args.batch}", "data.train=none"]
    settings += [f"method.num_prototypes={args.prototypes}"]
    settings += ["method.pairing=same_view"] if frozen else []
    return load_recipe(ROOT / "recipes/dino_resnet18_sslight.yaml", settings)


def vit_b(prototypes: int) -> FrozenTeacher:
    """ViT-B/16 with DINO's head, of random weights."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    projection = mlp([768, 2048, 2048, BOTTLENECK], activation=torch.nn.GELU, norm=False)
    colours = dict.fromkeys(("mean", "std", "student_mean", "student_std"), (0.5, 0.5, 0.5))
    head = FrozenHead(projection, torch.randn(prototypes, BOTTLENECK))
    return FrozenTeacher(Branch(backbone, head), **colours)


def case_of(kind: Kind, args: argparse.Namespace, folder: Path) -> Case:
    """The body of trainer.loop, on given views."""
    device, recipe = distributed.local_device(), recipe_of(args, frozen=kind != "self-supervised")
    method, views = build_method(recipe), random_views(recipe)
    synchronise_batchnorm(method, device)
    method.to(device)
    average = EMATeacher(method.student) if kind == "self-supervised" else None
    frozen = None if average is not None else vit_b(args.prototypes).to(device)
    ids = torch.arange(args.batch)
    cache = cache_in(folder, frozen, method.teacher_views(views), ids) if frozen is not None else None
    optimizer = build_optimizer(recipe.optim, param_groups(method, method.frozen_parameters()))
    with redirect_stdout(sys.stderr):  # DeepSpeed says there what it has compiled
        engine = build_engine(method, optimizer, load_ds_config(None, recipe.optim, micro_batch=args.batch))
    progress = recipe.schedules(1000).at(2000)  # past the frozen first epoch, so that everything is updated

    def target() -> Tensor:
        if average is not None:
            output: Tensor = average(method.teacher_views(views))
            return output
        assert frozen is not None
        assert cache is not None
        found = cache.read(0, ids) if kind == "frozen, cached" else None
        if found is None:
            found = frozen.embed(method.teacher_views(views))
        if kind == "frozen, filling":
            cache.write(0, ids, found)
        return frozen.score(found.to(device))

    def step() -> None:
        set_progress(engine.optimizer, progress, frozen=False)
        loss, *_ = engine(views, target(), progress)
        engine.backward(loss)
        engine.step()
        method.after_step(applied=True)
        if average is not None:
            average.follow(method.student, progress.momentum)

    return Case(timed(step), lambda: 0.0)


def cache_in(folder: Path, teacher: FrozenTeacher, views: list[Tensor], ids: Tensor) -> EmbeddingCache:
    """A cache that holds the batch."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (sum(len(group) for group in views) // len(ids), BOTTLENECK)
    create_files(folder, epochs=1, num_samples=len(ids), shape=shape)
    cache = EmbeddingCache(folder, epochs=1, sample_ids=np.asarray(ids), shape=shape)
    cache.write(0, ids, torch.randn(shape[0] * len(ids), BOTTLENECK))
    return cache


def peak_in_own_process(kind: Kind, args: argparse.Namespace) -> float:
    options = [f"--{name}={getattr(args, name)}" for name in ("network", "batch", "prototypes", "threads")]
    command = [sys.executable, "-m", "benchmarks.teacher_cache", *options, f"--peak-of={kind}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
