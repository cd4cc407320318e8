"""The run directory: who owns it, what is written into it before step 1."""

import difflib
import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

from trainer import distributed
from trainer.recipe import Recipe, what_shapes_training

log = logging.getLogger(__name__)
LOCK_TIMEOUT_S = 120.0


class RunDirError(ValueError):
    """A run directory that this run may not use."""


def claim(recipe: Recipe, recipe_path: Path, ds_config: dict[str, Any]) -> Path:
    """Make the run directory, or re-enter it if it holds a run of the same recipe.

    raises: RunDirError on every rank, with the difference, if it holds another recipe's run
    """
    fault = distributed.from_main(_claim(recipe, recipe_path, ds_config) if distributed.is_main() else None)
    if fault is not None:
        raise RunDirError(fault)
    return recipe.run.dir


def _claim(recipe: Recipe, recipe_path: Path, ds_config: dict[str, Any]) -> str | None:
    run_dir, plain = recipe.run.dir, recipe.plain()
    resolved = run_dir / "resolved.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        return f"run.dir {run_dir} is a file; give another run.dir"
    if resolved.exists():
        difference = _difference(yaml.safe_load(resolved.read_text(encoding="utf-8")), recipe)
        if difference:
            return (
                f"run.dir {run_dir} holds a run of another recipe; continue that one with its own recipe, or give "
                f"another run.dir. The difference (- that run, + this recipe):\n{difference}"
            )
        return None
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe_path, run_dir / "recipe.yaml")
        write_json(run_dir / "environment.json", environment())
        write_json(run_dir / "ds_config.json", ds_config)
        write_text(resolved, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    except OSError as error:
        return f"run.dir {run_dir} cannot be written: {error}"
    return None


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other jobs out of the run directory; all ranks call it, rank 0 holds the lock, which dies with it.

    The last job's processes may still be saving when the next one starts, so it waits for them.
    raises: RunDirError on every rank if they are not gone after LOCK_TIMEOUT_S
    """
    lock = (run_dir / ".lock").open("a+", encoding="utf-8") if distributed.is_main() else None
    try:
        fault = distributed.from_main(None if lock is None else _lock(lock))
        if fault is not None:
            raise RunDirError(f"run.dir {run_dir} is in use by {fault}; end that job, or give another run.dir")
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(file: TextIO) -> str | None:
    """Who holds the file, or None once we do."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                return file.read().strip() or "another process"
            time.sleep(0.2)
        except OSError as error:
            log.warning("%s cannot be locked (%s): take care that no two jobs share this run.dir", file.name, error)
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return None


def _difference(old: dict[str, Any], recipe: Recipe) -> str:
    """A diff of what shapes the training; empty if a run of the one may be continued by the other."""
    before, now = (
        yaml.safe_dump(what_shapes_training(tree), sort_keys=True).splitlines() for tree in (old, recipe.plain())
    )
    return "\n".join(line for line in difflib.ndiff(before, now) if line[0] in "-+")


def environment() -> dict[str, Any]:
    """The software and machine that a run ran on."""
    packages = ("featherweight", "torch", "torchvision", "deepspeed", "ffcv", "timm", "numpy", "numba")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "git": _git_state(),
        "command": sys.argv,
        "world": distributed.world(),
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR")},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """The commit of this code, with -dirty behind it if files differ; None outside a git checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def log_to(run_dir: Path) -> None:
    """Let rank 0's log also go to train.log."""
    if distributed.is_main():
        handler = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("trainer").addHandler(handler)
