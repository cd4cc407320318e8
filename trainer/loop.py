"""THE training loop: one function that reads from top to bottom."""

import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, distributed, run_dir, weights
from trainer.assemble import Assembly, assemble, check_backbone, check_teacher, count_steps, readable
from trainer.data.loader import Batch
from trainer.data.photometric import to_float
from trainer.engine import autocast, load_ds_config, rewriting, whole
from trainer.evals.knn import evaluate_branches
from trainer.evals.probe import evaluate_probe
from trainer.guards import FiniteGuard, watchdog
from trainer.methods.frozen import FrozenTeacher
from trainer.methods.teacher import EMATeacher
from trainer.metrics import Averages, MetricLog, StepClock
from trainer.models.backbones import num_features
from trainer.optim import set_progress
from trainer.recipe import Recipe
from trainer.run_state import capture, untrained_parameters
from trainer.schedules import Progress, Schedules
from trainer.settling import settle
from trainer.stopping import StopRequest, stop_requests

log = logging.getLogger(__name__)
SUCCESS = "finished"
"""The file that a run leaves when it has trained to its end; a launcher's exit code alone can lie."""


def pretrain(recipe: Recipe, recipe_path: Path, ds_config_path: Path | None) -> bool:
    """Train to the recipe's last epoch, from the newest checkpoint in run.dir if there is one.

    returns: whether it came to the end; False if it was asked to stop, and saved what it had
    raises: RecipeError, WeightsError, DSConfigError, BetonError, RunDirError, StateError before the first step;
    DataError and TrainingError during training; CheckpointError at any time
    """
    device = distributed.local_device()
    ds_config = load_ds_config(ds_config_path, recipe.optim, micro_batch=recipe.micro_batch(distributed.world()))
    count_steps(recipe)
    check_backbone(recipe)
    frozen = check_teacher(recipe)
    distributed.start(device)
    folder = run_dir.claim(recipe, recipe_path, ds_config)
    with run_dir.held(folder):
        run_dir.log_to(folder)
        run = assemble(recipe, ds_config, device, checkpoint.newest(folder), frozen)
        announce(recipe, run)
        with stop_requests() as request:
            finished = train(recipe, run, folder, autocast(ds_config, device), request)
        if finished and distributed.is_main():
            run_dir.write_text(folder / SUCCESS, f"{run.schedules.num_steps} steps\n")
            log.info("finished %d steps; the run is in %s", run.schedules.num_steps, folder)
    if not finished:
        log.info("asked to stop: the run is saved in %s, and the same command continues it", folder)
    return finished


def train(recipe: Recipe, run: Assembly, folder: Path, precision: torch.autocast, request: StopRequest) -> bool:
    """Every step from run.first_step on, with what belongs between them; whether it came to the last."""
    schedules, optim, device = run.schedules, recipe.optim, distributed.local_device()
    next_step = run.first_step
    export = partial(weights.save, folder, recipe, num_features=num_features(run.method.student.backbone))
    averages, clock, guard = Averages(), StepClock(optim.global_batch), FiniteGuard()
    with (
        watchdog(recipe.run.hang_timeout_s) as dog,
        closing(run.loader),
        MetricLog(folder, next_step, schedules.num_steps, tensorboard=recipe.run.tensorboard) as metrics,
        checkpoint.Checkpoints(folder, keep=recipe.run.keep_checkpoints, export=export) as checkpoints,
        distributed.Agreement() as agreement,
    ):
        while True:
            epoch, done = divmod(next_step, schedules.steps_per_epoch)
            if done == 0 and epoch > 0 and not metrics.evaluated(next_step - 1):
                dog.rest()
                accuracies = evaluate(recipe, run, epoch - 1, device)
                if accuracies:
                    metrics.write({"step": next_step - 1, "epoch": epoch - 1, **accuracies})
                    log.info("epoch %d  %s", epoch - 1, brief(accuracies))
                if (top1 := accuracies.get(f"knn/{recipe.run.keep_best}_top1")) is not None:
                    checkpoints.judge(next_step, top1)
            if next_step == schedules.num_steps:
                return True
            dog.heard()
            view_epoch = recipe.view_epoch(epoch)
            batches = run.loader.epoch(epoch, start=done * optim.global_batch, view_epoch=view_epoch)
            clock.resume()
            for step in range(next_step, (epoch + 1) * schedules.steps_per_epoch):
                progress = schedules.at(step)
                set_progress(run.engine.optimizer, progress, frozen=run.method.frozen(progress))
                for _ in range(optim.accumulation):
                    views, batch = clock.waits_for(to_device, batches, recipe, device)
                    labels = batch.labels.to(device, non_blocking=True)
                    with precision:
                        teacher_output = teach(run, views, view_epoch, batch.sample_ids)
                    loss, parts, views_finite = run.engine(
                        views, teacher_output, progress, labels, batch.sample_ids.tolist()
                    )
                    run.engine.backward(loss)
                    run.engine.step()
                    guard.see(step, loss, views_finite, teacher_output)
                    averages.add({"loss": loss, **parts, "bad_images_per_batch": batch.num_bad})
                applied = run.engine.was_step_applied()
                guard.count(applied=applied)
                with rewriting(run.engine, run.method.rewritten_parameters()):
                    run.method.after_step(applied=applied)
                if isinstance(run.teacher, EMATeacher) and applied:
                    with whole(run.engine, run.method.student.parameters()):
                        run.teacher.follow(run.method.student, progress.momentum)
                clock.tick()
                dog.heard()

                next_step = step + 1
                stop, write_failed = agreement.any_claims(request.came, checkpoints.failed)
                if write_failed:
                    checkpoints.stop_on_failure()
                if next_step == schedules.num_steps:
                    dog.rest()
                    if settled := settle(recipe, run, device):
                        metrics.write({"step": step, **settled})
                is_checkpoint = stop or is_saved(recipe, schedules, next_step)
                if next_step % recipe.run.log_every_steps == 0 or is_checkpoint:
                    record = describe(progress) | averages.read() | clock.read()
                    guard.check(record)
                    metrics.write(record)
                    metrics.show(record)
                if is_checkpoint:
                    state = capture(run.engine, run.method, run.teacher, untrained_parameters(run.plain))
                    metrics.write({"step": step, "checkpoint_s": checkpoints.save(next_step, state)})
                    clock.resume()
                if stop:
                    batches.close()
                    return False
            batches.close()


def due_evaluations(recipe: Recipe, epoch: int) -> set[str]:
    """Which evaluations follow an epoch; none without val images, all after the last."""
    every = {"knn": recipe.evals.knn.every_epochs, "probe": recipe.evals.probe.every_epochs if recipe.probe else 0}
    is_last = epoch + 1 == recipe.optim.epochs
    due = {name for name, epochs in every.items() if epochs > 0 and (is_last or (epoch + 1) % epochs == 0)}
    return set() if recipe.data.val is None else due


def is_saved(recipe: Recipe, schedules: Schedules, step: int) -> bool:
    """Whether a checkpoint is due after so many steps: at the recipe's interval, before an evaluation, at the end."""
    interval = max(1, round(recipe.run.checkpoint_every_epochs * schedules.steps_per_epoch))
    epochs, further_steps = divmod(step, schedules.steps_per_epoch)
    is_evaluated = further_steps == 0 and bool(due_evaluations(recipe, epochs - 1))
    return step % interval == 0 or is_evaluated or step == schedules.num_steps


def evaluate(recipe: Recipe, run: Assembly, epoch: int, device: torch.device) -> dict[str, float]:
    """The accuracies that are due after an epoch, under the names of metrics.jsonl; none without val images."""
    due = due_evaluations(recipe, epoch)
    accuracies: dict[str, float] = {}
    if "knn" in due:
        moving = run.teacher if isinstance(run.teacher, EMATeacher) else None  # a frozen one would never change
        accuracies |= evaluate_branches(recipe, readable(run), moving, device)
    if "probe" in due:
        accuracies |= evaluate_probe(recipe, readable(run), device)
    return accuracies


def brief(accuracies: dict[str, float]) -> str:
    """The top-1 of each network, for one line."""
    return ", ".join(
        f"{name} {value:.2f} %" for name, value in accuracies.items() if name.endswith(("top1", "accuracy"))
    )


def to_device(batches: Iterator[Batch], recipe: Recipe, device: torch.device) -> tuple[list[Tensor], Batch]:
    """The next batch's normalised views, one (V_i * B, 3, S_i, S_i) tensor per size, and the batch itself."""
    batch, views = next(batches), recipe.views
    changes = batch.params or repeat(None, len(batch.views))  # photometric ones, where the device makes them
    floats = [
        to_float(group, device, views.mean, views.std, params=params)
        for group, params in zip(batch.views, changes, strict=True)
    ]
    return floats, batch


def teach(run: Assembly, views: list[Tensor], view_epoch: int, sample_ids: Tensor) -> Tensor | None:
    """The teacher's output for its views; of a frozen one with a cache, what it said of them before."""
    if run.teacher is None:
        return None
    if run.cache is None:
        output: Tensor = run.teacher(run.method.teacher_views(views))
        return output
    assert isinstance(run.teacher, FrozenTeacher)
    embeddings = run.cache.read(view_epoch, sample_ids)
    if embeddings is None:
        embeddings = run.teacher.embed(run.method.teacher_views(views))
        run.cache.write(view_epoch, sample_ids, embeddings)
    return run.teacher.score(embeddings.to(views[0].device, non_blocking=True))


def describe(progress: Progress) -> dict[str, Any]:
    """What holds at a step, under the names of metrics.jsonl."""
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "lr": progress.lr,
        "weight_decay": progress.weight_decay,
        "momentum": progress.momentum,
    }


def announce(recipe: Recipe, run: Assembly) -> None:
    """Say at the start what runs on what."""
    if not distributed.is_main():
        return
    step = run.first_step
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
