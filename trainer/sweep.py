"""`trainer sweep`: a study as data. Every case with every seed is trained and evaluated, then tabulated and plotted.

Started again, it continues where it stopped.
"""

import json
import logging
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trainer.assemble import build_method, build_teacher, check_backbone, count_steps
from trainer.loop import SUCCESS
from trainer.metrics import clock
from trainer.recipe import Recipe, RecipeError
from trainer.recipe_file import load_recipe, read_yaml
from trainer.show import cost_of
from trainer.sweep_report import Outcome, write_report

log = logging.getLogger(__name__)


class SweepError(RuntimeError):
    """A run of a sweep that failed; the others stay as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One setting: the recipe with some keys changed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    x: float | None = None
    """Its place on the plot's axis; without one, cases stand side by side."""
    set: dict[str, Any]
    """Dotted recipe keys and their values."""

    @property
    def folder(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.]+", "_", self.name).strip("_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What a sweep's YAML says."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    question: str
    recipe: Path
    """As seen from the sweep's file."""
    set: dict[str, Any] = field(default_factory=dict)
    """Recipe keys that all cases change alike."""
    seeds: tuple[int, ...]
    equal: Literal["steps", "compute"]
    """steps: every case trains as long as the recipe says; compute: a case whose step costs more than the first case's
    trains for fewer epochs, so that all spend the same multiply-accumulates."""
    protocols: tuple[str, ...]
    x_label: str | None = None
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        for name in ("seeds", "cases", "protocols"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        names = [case.folder for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError(f"cases must have different names, got {', '.join(names)}")


@dataclass(frozen=True)
class Run:
    """One case with one seed."""

    case: Case
    seed: int
    recipe: Recipe
    recipe_path: Path
    overrides: tuple[str, ...]
    gmacs_per_image: float

    @property
    def last_step(self) -> int:
        """The step that its evaluations are named after."""
        return self.recipe.optim.epochs * count_steps(self.recipe)

    def result_path(self, protocol: str) -> Path:
        """Where `trainer evaluate` writes."""
        return self.recipe.run.dir / "evals" / f"{protocol}-{self.last_step:07d}.json"


def sweep(path: Path, overrides: Sequence[str], *, out: Path | None, launcher: str | None) -> None:
    """Carry the study out; every recipe is checked before the first run begins.

    out: folder for the runs, table.md, table.csv and plot.png; runs/sweeps/NAME by default
    launcher: what starts `trainer`, such as 'deepspeed --num_gpus 8 --module'; one process of this Python by default
    raises: RecipeError, BetonError before anything is trained; SweepError if a run fails
    """
    plan, folder = read_sweep(path), out or Path("runs/sweeps") / path.stem
    runs = planned_runs(plan, path, overrides, folder)
    start = [*shlex.split(launcher or f"{shlex.quote(sys.executable)} -m"), "trainer"]
    began, done = time.monotonic(), 0
    for number, run in enumerate(runs, 1):
        name = f"[{number}/{len(runs)}] {run.case.name}, seed {run.seed}"
        if (run.recipe.run.dir / SUCCESS).exists() and all(run.result_path(p).exists() for p in plan.protocols):
            log.info("%s: done before", name)
            continue
        eta = _eta(began, done, left=len(runs) - number + 1)
        log.info("%s: %d epochs in %s%s", name, run.recipe.optim.epochs, run.recipe.run.dir, eta)
        carry_out(run, plan.protocols, start)
        done += 1
    outcomes = [outcome_of(run, plan.protocols) for run in runs]
    for written in write_report(folder, plan.question, plan.equal, plan.x_label, outcomes):
        log.info("written to %s", written)


def _eta(began: float, done: int, *, left: int) -> str:
    if not done:
        return ""
    return f"; ETA {clock((time.monotonic() - began) / done * left)}"


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep. raises: RecipeError with one line a fault."""
    tree = read_yaml(path)
    try:
        return TypeAdapter(Sweep).validate_python(tree)
    except ValidationError as error:
        faults = (f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise RecipeError("\n".join(faults)) from None


def planned_runs(plan: Sweep, path: Path, overrides: Sequence[str], folder: Path) -> list[Run]:
    """Every case with every seed, seeds outermost, so that an unfinished sweep already compares all cases."""
    runs = [_plan(plan, path, case, seed, overrides, folder) for seed in plan.seeds for case in plan.cases]
    costs = {case.name: _cost(run) for case, run in zip(plan.cases, runs, strict=False)}
    runs = [replace(run, gmacs_per_image=costs[run.case.name]) for run in runs]
    return runs if plan.equal == "steps" else [_at_equal_compute(run, costs[plan.cases[0].name]) for run in runs]


def _plan(plan: Sweep, path: Path, case: Case, seed: int, overrides: Sequence[str], folder: Path) -> Run:
    """raises: RecipeError for a recipe that cannot be run, or not be evaluated afterwards"""
    recipe_path = path.parent / plan.recipe
    changes = [f"{key}={json.dumps(value)}" for key, value in (plan.set | case.set).items()]
    run_dir = folder / f"{case.folder}-seed{seed}"
    every = (*changes, *overrides, f"seed={seed}", f"run.dir={run_dir}")
    recipe = load_recipe(recipe_path, every)
    if recipe.data.val is None:
        raise RecipeError(f"{path}: a sweep evaluates what it trains; give labelled images as data.val=VAL.beton")
    return Run(case, seed, recipe, recipe_path, every, 0.0)


def _cost(run: Run) -> float:
    """10^9 multiply-accumulates an image and step. raises: RecipeError that names a case that cannot be trained"""
    recipe = run.recipe
    try:
        count_steps(recipe)
        check_backbone(recipe)
    except RecipeError as error:
        raise RecipeError(f"case {run.case.name}: {error}") from error
    method = build_method(recipe)
    return cost_of(recipe, method, build_teacher(recipe, method)).step / 1e9


def _at_equal_compute(run: Run, budget: float) -> Run:
    epochs = max(1, round(run.recipe.optim.epochs * budget / run.gmacs_per_image))
    overrides = (*run.overrides, f"optim.epochs={epochs}")
    return replace(run, overrides=overrides, recipe=load_recipe(run.recipe_path, overrides))


def carry_out(run: Run, protocols: Sequence[str], start: Sequence[str]) -> None:
    """Train (or go on training) and evaluate one run, its console in console.log. raises: SweepError."""
    run_dir = run.recipe.run.dir
    run_dir.mkdir(parents=True, exist_ok=True)
    commands = [[*start, "pretrain", str(run.recipe_path), *run.overrides]]
    commands += [[*start, "evaluate", str(run_dir), "--protocol", name] for name in protocols]
    for command in commands:
        with (run_dir / "console.log").open("a", encoding="utf-8") as console:
            code = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise SweepError(
                f"`{shlex.join(command)}` ended with code {code}; {run_dir / 'console.log'} says why. Mend it and "
                "start the sweep again: what is done stays done"
            )


def outcome_of(run: Run, protocols: Sequence[str]) -> Outcome:
    """What the evaluations of a finished run say, in the sweep's terms."""
    results = {name: json.loads(run.result_path(name).read_text(encoding="utf-8"))["results"] for name in protocols}
    return Outcome(
        case=run.case.name,
        x=run.case.x,
        seed=run.seed,
        epochs=run.recipe.optim.epochs,
        gmacs_per_image=run.gmacs_per_image,
        top1={
            name: {network: values["top1"] for network, values in result.items()} for name, result in results.items()
        },
    )
