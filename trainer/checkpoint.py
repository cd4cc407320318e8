"""Run state out and in: DeepSpeed's shards, the teacher, what each rank keeps to itself, and a manifest over all.

A checkpoint counts once its manifest stands, and the manifest is written when every rank has confirmed its files.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer import distributed
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.run_dir import write_json, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """Checkpoints that this run cannot continue from."""


def save(
    run_dir: Path, step: int, engine: "DeepSpeedEngine", method: Method, teacher: EMATeacher | None, *, keep: int
) -> None:
    """Write the state after `step` steps; all ranks must call it. The last `keep` checkpoints stay.

    raises: CheckpointError on every rank if any rank could not write; the previous checkpoint then still counts
    """
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that died while writing it
        folder.mkdir(parents=True)
    distributed.barrier()
    fault = _write_files(folder, engine, method, teacher)
    if not distributed.true_everywhere(fault is None):
        raise CheckpointError(f"checkpoint {folder} could not be written: {fault or 'see the other ranks'}")
    if distributed.is_main():
        write_json(folder / MANIFEST, {"step": step, "world": distributed.world(), "files": _describe(folder)})
        write_text(folder.parent / "latest", folder.name + "\n")
        for old in _complete(run_dir)[keep:]:
            shutil.rmtree(old)
    distributed.barrier()


def _write_files(folder: Path, engine: "DeepSpeedEngine", method: Method, teacher: EMATeacher | None) -> str | None:
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        torch.save(_rank_state(method, teacher), folder / f"rank_{distributed.rank():05d}.pt")
        if teacher is not None and distributed.is_main():
            torch.save(teacher.state_dict(), folder / "teacher.pt")
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _rank_state(method: Method, teacher: EMATeacher | None) -> dict[str, Any]:
    """What differs between ranks: random generators, and buffers such as unsynchronised BatchNorm statistics."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "method_buffers": _buffers(method),
        "teacher_buffers": {} if teacher is None else _buffers(teacher),
    }


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().cpu() for name, buffer in module.named_buffers()}


def resume(run_dir: Path, engine: "DeepSpeedEngine", method: Method, teacher: EMATeacher | None) -> int:
    """Load the newest sound checkpoint into everything; 0 steps if there is none.

    returns: how many steps the state has seen
    raises: CheckpointError if the job now has another number of ranks
    """
    for folder in _complete(run_dir):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        damage = _damage(folder, manifest)
        if not distributed.true_everywhere(damage is None):
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
            continue
        if manifest["world"] != distributed.world():
            raise CheckpointError(
                f"{folder} was written by {manifest['world']} ranks and this job has {distributed.world()}; start "
                f"{manifest['world']} ranks, or give another run.dir"
            )
        _load(folder, engine, method, teacher)
        return int(manifest["step"])
    return 0


def _complete(run_dir: Path) -> list[Path]:
    """Folders of checkpoints whose manifest stands, newest first."""
    return sorted((path.parent for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}")), reverse=True)


def _load(folder: Path, engine: "DeepSpeedEngine", method: Method, teacher: EMATeacher | None) -> None:
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    state = torch.load(folder / f"rank_{distributed.rank():05d}.pt", map_location="cpu", weights_only=True)
    if teacher is not None:
        teacher.load_state_dict(torch.load(folder / "teacher.pt", map_location="cpu", weights_only=True))
        teacher.load_state_dict(state["teacher_buffers"], strict=False)
    method.load_state_dict(state["method_buffers"], strict=False)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, each forced to the disk first."""
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path, sync=True)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _damage(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that is not as the manifest says."""
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
            return f"{name} is missing or not what was written"
    return None


def _sha256(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
