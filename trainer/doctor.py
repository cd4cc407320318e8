"""Says what this machine has and lacks for a run, and builds the one thing that DeepSpeed compiles.

Without a GPU, `deepspeed.initialize` compiles `deepspeed_shm_comm` into torch's cache of extensions; here that happens
once, before any run. With a GPU nothing is compiled (read in DeepSpeed's source; not run on a GPU).
"""

import argparse
import ctypes
import fcntl
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import machinery, metadata
from pathlib import Path
from typing import Any

from trainer import toolchain

PROJECT = "featherweight"
EXTENSION = "deepspeed_shm_comm"
GIB = 1024**3
MIN_MEMORY_GIB = 3  # two ranks that only import torch and DeepSpeed and train one layer take 0.8 GiB each
MIN_DISK_GIB = 2  # converted data, checkpoints, logs of the demo
MIN_OPEN_FILES = 1024  # Debian's default; threads' files, sockets between ranks
QUIET_MINUTES = 30  # the longest single step of a build, one C++ file, takes about a minute on one core


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the report: what was looked at, what was found, and what to do if that is not enough."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of checks; 0 if a run can start, 1 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m trainer doctor", description="what this machine has and lacks")
    parser.add_argument("--build", action="store_true", help=f"first build {EXTENSION}, which a CPU run needs")
    parser.add_argument("--clear-locks", action="store_true", help="first remove a build lock that no process holds")
    options = parser.parse_args(argv)
    toolchain.use_own()
    if options.clear_locks:
        print(clear_lock(extension_folder()))
    built = build() if options.build else True
    machine = (view_kernel(), extension(), threading_layer(), cores_and_memory(), open_files(), disk(), devices())
    return 0 if report([python(), *packages(), *machine]) and built else 1


def report(checks: Sequence[Check]) -> bool:
    """Print one row a check; whether all are ok."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok' if check.ok else 'missing':8} {check.name:{width}}  {check.found}")
        if not check.ok:
            print(f"{'':8} {'':{width}}  -> {check.advice}")
    return all(check.ok for check in checks)


def python() -> Check:
    """The version that the packages need."""
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    return Check("python", sys.version_info >= (3, 11), found, "use Python 3.11 or newer: make setup PYTHON=python3.11")


def packages() -> list[Check]:
    """The packages whose exact version matters, against the pins in setup.cfg."""
    try:
        requirements = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return [Check(PROJECT, False, "is not installed in this environment", "make setup")]
    pins = (line.split("==") for line in requirements if "==" in line and ";" not in line)  # extras follow a semicolon
    return [package(name, wanted) for name, wanted in pins]


def package(name: str, wanted: str) -> Check:
    """One package in exactly this version, and importable: torchvision is not, if it was compiled for another torch."""
    try:
        found = metadata.version(name)
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return Check(name, False, f"{wanted} is wanted, but: {error}", "make setup; it names missing system libraries")
    # +cpu or +cu130 tells how it was built, not what it is
    return Check(name, found.split("+")[0] == wanted, found, f"only {wanted} is tested: make setup")


def view_kernel(folder: Path = Path(__file__).parent / "data") -> Check:
    """The C library that decodes a JPEG once and cuts every view from it."""
    libraries = [path for suffix in machinery.EXTENSION_SUFFIXES if (path := folder / f"_views{suffix}").exists()]
    if not libraries:
        return Check("view kernel", False, "trainer/data/_views is not compiled", "make setup")
    try:
        ctypes.CDLL(str(libraries[0]))
    except OSError as error:
        return Check("view kernel", False, f"{libraries[0].name} does not load: {error}", "make setup")
    newest = max((path.stat().st_mtime for path in (folder / "csrc").glob("*")), default=0.0)
    if newest > libraries[0].stat().st_mtime:
        return Check("view kernel", False, f"{libraries[0].name} is older than its source", "make setup")
    return Check("view kernel", True, libraries[0].name)


def threading_layer() -> Check:
    """Numba's layer must be safe when several loader threads enter it at once; `workqueue` aborts the process."""
    for layer, module in (("tbb", "tbbpool"), ("omp", "omppool")):
        with suppress(ImportError):
            importlib.import_module(f"numba.np.ufunc.{module}")
            return Check("numba threads", True, layer)
    return Check("numba threads", False, "workqueue only", "install OpenMP: apt-get install libgomp1")


def cores_and_memory() -> Check:
    """What this process may use, a container's limit included."""
    meminfo = Path("/proc/meminfo").read_text().split()
    free_gib = int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024 / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(limit.with_name("memory.current").read_text())
        free_gib = min(free_gib, (int(text) - used) / GIB)
    found = f"{len(os.sched_getaffinity(0))} cores, {free_gib:.1f} GiB of memory free"
    return Check("cores, memory", free_gib >= MIN_MEMORY_GIB, found, f"two ranks want {MIN_MEMORY_GIB} GiB")


def open_files() -> Check:
    """The soft limit of this shell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    return Check("open files", enough, f"{soft} (at most {hard})", f"ulimit -n {MIN_OPEN_FILES}")


def disk() -> Check:
    """Room for converted data and checkpoints where the command runs."""
    free_gib = shutil.disk_usage(Path.cwd()).free / GIB
    return Check("disk", free_gib >= MIN_DISK_GIB, f"{free_gib:.1f} GiB free here", f"free {MIN_DISK_GIB} GiB")


def devices() -> Check:
    """GPUs that torch can use; none is fine, one that torch cannot use is not."""
    import torch

    if torch.cuda.is_available():
        return Check("devices", True, ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))))
    unused = Path("/dev/nvidia0").exists()
    found = "a GPU that torch cannot use" if unused else "no GPU: gloo on the CPU"
    return Check("devices", not unused, found, f"torch wants a driver for CUDA {torch.version.cuda}; see nvidia-smi")


def extension_folder() -> Path:
    """Where torch builds the extension; torch is asked, since only it knows."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(EXTENSION, verbose=False))


def builder() -> Any | None:
    """DeepSpeed's recipe for the extension; None where runs do without it, as with a GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would choose anyway, with a warning
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().create_op_builder("ShareMemCommBuilder")
    return found if found is not None and deepspeed.ops.__compatible_ops__.get(EXTENSION, False) else None


def extension() -> Check:
    """Whether the next run on this CPU starts at once, or compiles first, or waits for somebody's build."""
    if builder() is None:
        return Check("extension", True, "none is needed here")
    folder = extension_folder()
    if is_held(folder / "lock"):
        return Check("extension", False, *lock_report(folder))
    reason = rebuild_reason(folder)
    advice = "python -m trainer doctor --build (or the first run compiles it)"
    return Check("extension", not reason, reason or f"{EXTENSION} in {folder}", advice)


def rebuild_reason(folder: Path) -> str:
    """Why the next run would compile; empty if it would not."""
    import torch

    if not (folder / f"{EXTENSION}.so").exists() or not (folder / "build.ninja").exists():
        return f"{EXTENSION} is not built"
    if shutil.which("ninja") is None:
        return "ninja is missing from this environment, and a run dies without it (pip install ninja)"
    if str(Path(torch.__file__).parent) not in (folder / "build.ninja").read_text():
        return f"{folder} was built by another Python environment, and every change of environment builds it again"
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)  # ninja may replace a log that it cannot read
        plan = subprocess.run(["ninja", "-n"], cwd=copy, capture_output=True, text=True, check=False)
    return "" if "no work to do" in plan.stdout else f"{EXTENSION} is older than its sources, or of another ninja"


def build() -> bool:
    """Compile the extension here and now, or say why not; never waits for another process's lock."""
    if (found := builder()) is None:
        return True
    folder = extension_folder()
    if is_held(folder / "lock"):
        print("not built: " + "; ".join(lock_report(folder)), file=sys.stderr)
        return False
    try:
        with progress(f"building {EXTENSION} in {folder}"):
            found.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        print(f"{error}\n{EXTENSION} was not built; it wants a C++ compiler and Python.h: make setup", file=sys.stderr)
        return False
    return True


@contextmanager
def progress(label: str) -> Iterator[None]:
    """Say what takes long, and that it still goes on."""
    start, done = time.monotonic(), threading.Event()

    def tick() -> None:
        while not done.wait(10):
            print(f"  {time.monotonic() - start:.0f} s, usually one to two minutes", flush=True)

    print(label, flush=True)
    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        done.set()
    print(f"  done after {time.monotonic() - start:.0f} s", flush=True)


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock now; the file alone says nothing, since torch leaves it behind.

    It is an flock, which ends with its process. In torch before 2.14 a file that a killed build left stopped every run.
    """
    if not lock.exists():
        return False
    with lock.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_holders(lock: Path) -> list[int]:
    """The processes of this machine that hold the lock; by inode alone, since overlays report another device."""
    inode = str(lock.stat().st_ino)
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(row[4]) for row in rows if "->" not in row and row[5].split(":")[2] == inode and int(row[4]) > 0]


def lock_report(folder: Path) -> tuple[str, str]:
    """Who holds the build lock, and what to do."""
    if pids := " ".join(map(str, lock_holders(folder / "lock"))):
        return f"process {pids} holds {folder / 'lock'}", f"wait, it is building; if it hangs: kill {pids}"
    advice = f"wait; if {folder} does not change for {QUIET_MINUTES} minutes: python -m trainer doctor --clear-locks"
    return f"a process outside this machine or container holds {folder / 'lock'}", advice


def may_clear(holders: Sequence[int], quiet_s: float) -> bool:
    """Whether a held lock is that of a dead machine: nobody here holds it, and its folder has long not changed."""
    return not holders and quiet_s > QUIET_MINUTES * 60


def clear_lock(folder: Path) -> str:
    """Remove the lock file unless a build may be under way; says what was done."""
    lock = folder / "lock"
    if not lock.exists():
        return f"no lock in {folder}"
    quiet_s = time.time() - max(path.stat().st_mtime for path in folder.iterdir())
    if is_held(lock) and not may_clear(lock_holders(lock), quiet_s):
        return "kept: " + "; ".join(lock_report(folder))
    lock.unlink()
    return f"removed {lock}"


if __name__ == "__main__":
    sys.exit(main())
