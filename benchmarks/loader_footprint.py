"""What a loader of SSLight's views costs besides time for each image; run by `benchmarks.loader`, a process a case.

python -m benchmarks.loader_footprint ours|ffcv BETON

Prints one JSON line: seconds from making the loader to its first batch of 256 (imports not counted, the compiler's time
is), the growth of resident memory, at its peak, and of allocated memory over six such batches, and for ours the wall
time of one worker over that of two.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_peers import VIEWS, ffcv_loader
from data_prep.schema import open_beton
from trainer.data.loader import ViewLoader

BATCH_SIZE, NUM_BATCHES, SCALING_ROUNDS = 256, 6, 3
MIB = 2**20


def main() -> None:
    kind, beton = sys.argv[1], Path(sys.argv[2])
    import_module("trainer.data.multicrop")  # imports ffcv and numba: seconds, and not the loader's
    line = footprint(kind, beton)
    if kind == "ours":
        line["one_worker_to_two"] = scaling(beton)
    print(json.dumps(line))


def batches(kind: str, beton: Path) -> Iterator[Any]:
    total = open_beton(beton).num_samples
    ids = np.resize(np.arange(total), BATCH_SIZE * NUM_BATCHES)
    if kind == "ffcv":
        yield from ffcv_loader(beton, VIEWS, BATCH_SIZE, ids)
        return
    loader = ViewLoader(beton, VIEWS, batch_size=BATCH_SIZE, subset=ids.tolist())
    yield from loader.epoch(0)
    loader.close()


def footprint(kind: str, beton: Path) -> dict[str, Any]:
    allocated, resident = memory()
    begin, begin_cpu, first = time.perf_counter(), time.process_time(), (0.0, 0.0)
    for _ in batches(kind, beton):
        if not first[0]:
            first = time.perf_counter() - begin, time.process_time() - begin_cpu
        peak = memory()[0]
    peak_resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "first_batch_s": round(first[0], 2),
        "first_batch_cpu_s": round(first[1], 2),
        "resident_mib": round(peak_resident - resident),
        "allocated_mib": round(peak - allocated),
    }


def memory() -> tuple[float, float]:
    """(allocated, resident) MiB of this process; threads' stacks, of which little is used, are not counted."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    stacks = 8 * (threading.active_count() - 1)
    page = os.sysconf("SC_PAGE_SIZE") / MIB
    return int(fields[5]) * page - stacks, int(fields[1]) * page


def scaling(beton: Path) -> float:
    """How many times faster two workers are than one, by the wall clock, the best of some rounds that take turns."""
    ids = np.resize(np.arange(open_beton(beton).num_samples), 4 * BATCH_SIZE).tolist()
    loaders = [ViewLoader(beton, VIEWS, batch_size=64, subset=ids, num_workers=workers) for workers in (1, 2)]
    seconds = [[wall(loader) for loader in loaders] for _ in range(SCALING_ROUNDS)]
    return round(min(one for one, _ in seconds) / min(two for _, two in seconds), 2)


def wall(loader: ViewLoader) -> float:
    begin = time.perf_counter()
    for _ in loader.epoch(0):
        pass
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
