"""THE training loop: one function that reads from top to bottom."""

import logging
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, distributed, run_dir, weights
from trainer.assemble import Assembly, assemble, check_backbone, count_steps, readable
from trainer.data.loader import Batch
from trainer.data.photometric import to_float
from trainer.engine import autocast, load_ds_config, rewriting, whole
from trainer.evals.knn import evaluate_branches
from trainer.evals.probe import evaluate_probe
from trainer.guards import FiniteGuard, watchdog
from trainer.metrics import Averages, MetricLog, StepClock
from trainer.optim import set_progress
from trainer.recipe import Recipe
from trainer.schedules import Progress

log = logging.getLogger(__name__)
SUCCESS = "finished"
"""The file that a run leaves when it has trained to its end; a launcher's exit code alone can lie."""


def pretrain(recipe: Recipe, recipe_path: Path, ds_config_path: Path | None) -> None:
    """Train to the recipe's last epoch, from the newest checkpoint in run.dir if there is one.

    raises: RecipeError, DSConfigError, BetonError, RunDirError, CheckpointError before the first step; DataError and
    TrainingError during training
    """
    device = distributed.local_device()
    ds_config = load_ds_config(ds_config_path, recipe.optim, micro_batch=recipe.micro_batch(distributed.world()))
    count_steps(recipe)
    check_backbone(recipe)
    distributed.start(device)
    folder = run_dir.claim(recipe, recipe_path, ds_config)
    run_dir.log_to(folder)
    run = assemble(recipe, ds_config, device)
    next_step = checkpoint.resume(folder, run.engine, run.method, run.teacher)
    announce(recipe, run, next_step)

    schedules, optim, keep = run.schedules, recipe.optim, recipe.run.keep_checkpoints
    precision = autocast(ds_config, device)
    checkpoint_steps = max(1, round(recipe.run.checkpoint_every_epochs * schedules.steps_per_epoch))
    averages, clock, guard = Averages(), StepClock(optim.global_batch), FiniteGuard()
    with (
        watchdog(recipe.run.hang_timeout_s) as dog,
        closing(run.loader),
        MetricLog(folder, next_step, schedules.num_steps, tensorboard=recipe.run.tensorboard) as metrics,
    ):
        while next_step < schedules.num_steps:
            epoch, done = divmod(next_step, schedules.steps_per_epoch)
            batches = run.loader.epoch(epoch, start=done * optim.global_batch)
            clock.resume()
            for step in range(next_step, (epoch + 1) * schedules.steps_per_epoch):
                progress = schedules.at(step)
                set_progress(run.engine.optimizer, progress, frozen=run.method.frozen(progress))
                for _ in range(optim.accumulation):
                    views, labels, num_bad = clock.waits_for(to_device, batches, recipe, device)
                    with precision:
                        teacher_output = run.teacher(run.method.teacher_views(views)) if run.teacher else None
                    loss, parts, views_finite = run.engine(views, teacher_output, progress, labels)
                    run.engine.backward(loss)
                    run.engine.step()
                    guard.see(step, loss, views_finite, teacher_output)
                    averages.add({"loss": loss, **parts, "bad_images_per_batch": num_bad})
                applied = run.engine.was_step_applied()
                guard.count(applied=applied)
                with rewriting(run.engine, run.method.rewritten_parameters()):
                    run.method.after_step(applied=applied)
                if run.teacher is not None and applied:
                    with whole(run.engine, run.method.student.parameters()):
                        run.teacher.follow(run.method.student, progress.momentum)
                clock.tick()
                dog.heard()

                next_step = step + 1
                is_last = next_step == schedules.num_steps
                is_checkpoint = next_step % checkpoint_steps == 0 or is_last
                if next_step % recipe.run.log_every_steps == 0 or is_checkpoint:
                    record = describe(progress) | averages.read() | clock.read()
                    guard.check(record)
                    metrics.write(record)
                    metrics.show(record)
                if is_checkpoint:
                    checkpoint.save(folder, next_step, run.engine, run.method, run.teacher, keep=keep)
                    weights.save(folder, recipe, readable(run), run.teacher)
                    clock.resume()
            batches.close()
            dog.rest()
            accuracies = evaluate(recipe, run, epoch, device, is_last=is_last)
            if accuracies:
                metrics.write({"step": step, "epoch": epoch, **accuracies})
                log.info("epoch %d  %s", epoch, brief(accuracies))
            dog.heard()
    if distributed.is_main():
        run_dir.write_text(folder / SUCCESS, f"{next_step} steps\n")
        log.info("finished %d steps; the run is in %s", next_step, folder)


def evaluate(recipe: Recipe, run: Assembly, epoch: int, device: torch.device, *, is_last: bool) -> dict[str, float]:
    """The accuracies that are due after an epoch, under the names of metrics.jsonl; none without val images."""
    if recipe.data.val is None:
        return {}

    def is_due(every_epochs: int) -> bool:
        return every_epochs > 0 and (is_last or (epoch + 1) % every_epochs == 0)

    accuracies: dict[str, float] = {}
    if is_due(recipe.evals.knn.every_epochs):
        accuracies |= evaluate_branches(recipe, readable(run), run.teacher, device)
    if recipe.probe and is_due(recipe.evals.probe.every_epochs):
        accuracies |= evaluate_probe(recipe, readable(run), device)
    return accuracies


def brief(accuracies: dict[str, float]) -> str:
    """The top-1 of each network, for one line."""
    return ", ".join(
        f"{name} {value:.2f} %" for name, value in accuracies.items() if name.endswith(("top1", "accuracy"))
    )


def to_device(batches: Iterator[Batch], recipe: Recipe, device: torch.device) -> tuple[list[Tensor], Tensor, int]:
    """The next batch: normalised views, one (V_i * B, 3, S_i, S_i) tensor per size; labels; number of bad images."""
    batch, views = next(batches), recipe.views
    changes = batch.params or repeat(None, len(batch.views))  # photometric ones, where the device makes them
    floats = [
        to_float(group, device, views.mean, views.std, params=params)
        for group, params in zip(batch.views, changes, strict=True)
    ]
    return floats, batch.labels.to(device, non_blocking=True), batch.num_bad


def describe(progress: Progress) -> dict[str, Any]:
    """What holds at a step, under the names of metrics.jsonl."""
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "lr": progress.lr,
        "weight_decay": progress.weight_decay,
        "momentum": progress.momentum,
    }


def announce(recipe: Recipe, run: Assembly, step: int) -> None:
    """Say at the start what runs on what."""
    if not distributed.is_main():
        return
    backbone = sum(parameter.numel() for parameter in run.plain.student.backbone.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in run.plain.parameters() if parameter.requires_grad) / 1e6
    groups = (recipe.views.global_views, recipe.views.local_views)
    views = " + ".join(f"{group.count} x {group.size} px" for group in groups if group.count)
    names = f"{recipe.method.name}, {recipe.backbone.name}"
    log.info("%s: %.2f M parameters in the backbone, %.2f M trained; views %s", names, backbone, trained, views)
    amount = f"{run.loader.num_samples} images, {recipe.optim.epochs} epochs of {run.schedules.steps_per_epoch} steps"
    share = f"global batch {recipe.optim.global_batch} on {distributed.world()} ranks"
    where = recipe.views.photometric_on(distributed.local_device().type)
    log.info("photometric changes on the %s; views in %d threads a rank", where, recipe.data.num_workers)
    log.info("%s, %s; %s", amount, share, f"continuing after step {step}" if step else f"a new run in {recipe.run.dir}")
    if recipe.data.val is None:
        log.info("no data.val, so no evaluation during training")
