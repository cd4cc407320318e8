"""DINO from lightly's building blocks, as its example puts them together; benchmarks/step.py runs it elsewhere.

PYTHON step_lightly.py SETTINGS: for every line "step" or "log" on its input it does that and prints the seconds that it
took; for "peak" the megabytes that it has held at most, above what it held before it built anything.
"""

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.lars import LARS


def main(settings: dict[str, Any]) -> None:
    torch.set_num_threads(settings["threads"])
    before, (step, log) = memory("VmRSS"), build(settings)
    for line in sys.stdin:
        if line.strip() == "peak":
            peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else memory("VmHWM") - before
            print(round(peak, 1), flush=True)
        else:
            print(timed(step if line.strip() == "step" else log), flush=True)


def timed(work: Any) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    begin = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin


def build(settings: dict[str, Any]) -> tuple[Any, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = timm.create_model(settings["network"], num_classes=0, **settings["args"]).to(device)
    norm, prototypes = settings["head_norm"], settings["num_prototypes"]
    head, teacher_head = (
        DINOProjectionHead(backbone.num_features, 2048, 256, prototypes, batch_norm=norm, norm_last_layer=norm).to(
            device
        )
        for _ in range(2)
    )  # two, as in its example: weight_norm forbids a deep copy
    teacher = copy.deepcopy(backbone).requires_grad_(False)
    teacher_head.requires_grad_(False)
    criterion = DINOLoss(output_dim=prototypes, teacher_temp=0.07, warmup_teacher_temp_epochs=50).to(device)
    params = [p for part in (backbone, head) for p in part.parameters() if p.requires_grad]
    lars = settings["optimizer"] == "lars"
    optimizer: Any = LARS(params, lr=0.1, momentum=0.9) if lars else torch.optim.AdamW(params, lr=0.001)
    views = [torch.randn(settings["batch"], 3, size, size, device=device) for size in settings["sizes"]]
    losses = [0.0]

    def step() -> None:
        update_momentum(backbone, teacher, m=0.996)
        update_momentum(head, teacher_head, m=0.996)
        with torch.no_grad():
            teacher_out = [teacher_head(teacher(view).flatten(start_dim=1)) for view in views[:2]]
        student_out = [head(backbone(view).flatten(start_dim=1)) for view in views]
        loss = criterion(teacher_out, student_out, epoch=2)
        losses[0] += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def log() -> None:
        float(losses[0])

    return step, log


def memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
