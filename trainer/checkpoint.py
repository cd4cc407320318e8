"""Checkpoints on the disk: written beside the training, whole or not at all, and verified when they are read.

    checkpoints/.writing_step_0001251_1f3a.../   rank_00000.pt rank_00000.json ...   what the ranks have confirmed
    checkpoints/step_0001251/                    the same, and manifest.json: sizes and hashes; complete by its name
    checkpoints/latest, best                     the names of two of them

A save copies the state to host memory and returns; a thread on every rank writes its file, forces it to the disk and
leaves a note of its size and hash. Rank 0's thread waits for all notes, writes the manifest, renames the folder and
moves `latest`. No collective runs in a thread, and no name moves before every rank has confirmed.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from trainer import distributed
from trainer.run_dir import write_json, write_text
from trainer.run_state import RunState

log = logging.getLogger(__name__)
MANIFEST, FORMAT = "manifest.json", 2
"""Format 1 held DeepSpeed's shards, which only the same number of ranks and the same ZeRO stage could read."""
WRITING = ".writing_"
CONFIRM_TIMEOUT_S, LEAVING_TIMEOUT_S = 600.0, 20.0
"""How long rank 0 waits for the other ranks' notes; and once the run has failed, when launchers kill after 30 s."""


class CheckpointError(ValueError):
    """Checkpoints that cannot be written, or that this run cannot continue from."""


class Checkpoints:
    """Writes a run's checkpoints; as a context, it ends when the last one is written, or has failed."""

    def __init__(self, run_dir: Path, *, keep: int, export: Callable[[RunState], None] | None = None) -> None:
        """All ranks must call it.

        keep: how many of the newest stay, besides the best
        export: what rank 0 makes of every complete checkpoint, such as weights for other programs
        """
        self.folder = run_dir / "checkpoints"
        self._keep, self._export = keep, export
        self._job = distributed.from_main(uuid.uuid4().hex)  # a rank left over from another job writes elsewhere
        self._thread: threading.Thread | None = None
        self._fault: str | None = None
        self._leaving = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether this rank's last write has failed."""
        return self._fault is not None

    def save(self, step: int, state: dict[str, Any]) -> float:
        """Begin to write this rank's state after `step` steps, once the write before has ended; all ranks call it.

        returns: seconds for which the caller was held up
        raises: CheckpointError on every rank if the write before failed on any
        """
        began = time.monotonic()
        self.wait()
        copied = _Copied(state)
        self._thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self._thread.start()
        return time.monotonic() - began

    def wait(self) -> None:
        """Until this rank's last write has ended, and to learn how it went on all ranks.

        raises: CheckpointError on every rank if it failed on any
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not distributed.true_everywhere(not self.failed):
            self.stop_on_failure()

    def stop_on_failure(self) -> None:
        """End the run, for those who know that a write has failed on some rank."""
        raise CheckpointError(
            f"a checkpoint could not be written: {self._fault or 'see the other ranks'}; the one before it still "
            "counts. Make room on the disk, or find out why it does not answer, and start the same command again"
        )

    def judge(self, step: int, accuracy: float) -> None:
        """Call the checkpoint of that step the best if none was better; rank 0 decides, all ranks call it."""
        self.wait()
        if not distributed.is_main():
            return
        best = _best(self.folder)
        if best is None or accuracy > best["accuracy"]:
            write_json(self.folder / "best", {"checkpoint": _name(step), "accuracy": accuracy})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        if fault is None:
            self.wait()
        elif self._thread is not None:  # other ranks may be gone: no collective, and no long wait for their notes
            self._leaving.set()
            self._thread.join()

    def _write(self, step: int, state: "_Copied") -> None:
        """The thread: this rank's file and note; on rank 0 the rest."""
        part = self.folder / f"{WRITING}{_name(step)}_{self._job}"
        note = part / f"rank_{distributed.rank():05d}.json"
        try:
            part.mkdir(parents=True, exist_ok=True)
            write_json(note, _write_file(note.with_suffix(".pt"), state.ready()))
            if distributed.is_main():
                self._complete(part, step)
        except Exception as error:  # whatever it is, the training process must end with it, not this thread alone
            self._fault = f"{type(error).__name__}: {error}"
            _leave_note(note, {"fault": self._fault})

    def _complete(self, part: Path, step: int) -> None:
        facts = self._confirmations(part)
        files = {f"rank_{rank:05d}.pt": fact for rank, fact in enumerate(facts)}
        write_json(part / MANIFEST, {"format": FORMAT, "step": step, "world": len(facts), "files": files})
        _sync(part)
        folder = self.folder / _name(step)
        if folder.exists():  # damaged, or this run would have continued from it
            _remove(folder)
        part.rename(folder)
        _sync(self.folder)
        write_text(self.folder / "latest", folder.name + "\n")
        _sync(self.folder)
        if self._export is not None:
            self._export(read(folder))
        _forget_old(self.folder, self._keep)

    def _confirmations(self, part: Path) -> list[dict[str, Any]]:
        """Every rank's note, in rank order."""
        began = time.monotonic()
        missing = [part / f"rank_{rank:05d}.json" for rank in range(distributed.world())]
        notes: dict[str, dict[str, Any]] = {}
        while missing:
            for path in [path for path in missing if path.exists()]:
                notes[path.name] = json.loads(path.read_text(encoding="utf-8"))
                missing.remove(path)
            for name, note in notes.items():
                if "fault" in note:
                    raise CheckpointError(f"{part / name}: {note['fault']}")
            patience_s = LEAVING_TIMEOUT_S if self._leaving.is_set() else CONFIRM_TIMEOUT_S
            if missing and time.monotonic() - began > patience_s:
                raise CheckpointError(f"no note of {', '.join(path.stem for path in missing)} after {patience_s:.0f} s")
            time.sleep(0.02 if missing else 0)
        return [notes[name] for name in sorted(notes)]


class _Copied:
    """A tree of state in host memory; on a GPU the copies run in the stream's order, and only the thread waits."""

    def __init__(self, tree: Any) -> None:
        with torch.no_grad():
            self._tree = _to_host(tree)
        self._done = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None

    def ready(self) -> Any:
        """The tree, once it is all there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tree


def _to_host(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _to_host(value) for key, value in tree.items()}
    if not isinstance(tree, Tensor):
        return tree
    if tree.device.type == "cpu":
        return tree.detach().clone()
    host = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=True)
    return host.copy_(tree.detach(), non_blocking=True)


def _write_file(path: Path, state: Any) -> dict[str, Any]:
    torch.save(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _leave_note(note: Path, content: dict[str, Any]) -> None:
    try:
        write_json(note, content)
    except OSError:
        log.warning("%s could not be written either; rank 0 will wait for it in vain", note)


def _name(step: int) -> str:
    return f"step_{step:07d}"


def _sync(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete_ones(folder: Path) -> list[Path]:
    """Checkpoints whose manifest stands, newest first."""
    return sorted((path.parent for path in folder.glob(f"step_*/{MANIFEST}")), reverse=True)


def _best(folder: Path) -> dict[str, Any] | None:
    path = folder / "best"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _forget_old(folder: Path, keep: int) -> None:
    best = _best(folder)
    for old in _complete_ones(folder)[keep:]:
        if best is None or old.name != best["checkpoint"]:
            _remove(old)


def _remove(folder: Path) -> None:
    """Take a checkpoint's name away before its files, so that no half of it can be taken for a damaged one."""
    part = folder.with_name(f"{WRITING}{folder.name}_removed")
    folder.rename(part)
    shutil.rmtree(part)


def newest(run_dir: Path) -> RunState | None:
    """The newest sound checkpoint, or None if there is none; half-written ones are removed. All ranks call it.

    raises: CheckpointError if it is of a format that cannot be read
    """
    folder = run_dir / "checkpoints"
    if distributed.is_main():
        for part in folder.glob(f"{WRITING}*"):
            shutil.rmtree(part, ignore_errors=True)  # another host may still be writing there
    for path in distributed.from_main(_complete_ones(folder)):
        damage = _damage(path)
        if damage is not None:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", path, damage)
        if distributed.true_everywhere(damage is None):
            return read(path)
    return None


def _damage(folder: Path) -> str | None:
    """The first file that is not as the manifest says; the ranks share the files, and the work of hashing them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        return f"{MANIFEST}: {error}"
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is of format {manifest.get('format', 1)} and this version reads format {FORMAT}; continue with "
            f"the version that the run began with ({folder.parents[1]}/environment.json), or give another run.dir"
        )
    for name, facts in list(manifest["files"].items())[distributed.rank() :: distributed.world()]:
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
            return f"{name} is missing or not what was written"
    return None


def read(folder: Path) -> RunState:
    """A complete checkpoint; its tensors are mapped from the files, and read where they are used."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = sorted(manifest["files"])
    ranks = [torch.load(folder / name, map_location="cpu", mmap=True, weights_only=True) for name in files]
    return RunState(int(manifest["step"]), ranks)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
