"""How the published code trains a step, for comparison: written from its description, around our networks.

Its structure, and what costs time in it: a loss that goes over pairs of views in Python, LARS and the teacher's average
one tensor at a time, a reading of the loss from the device in every step, and the mean magnitude of every weight and
gradient in every log.
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from trainer.models.backbones import Branch
from trainer.optim import param_groups
from trainer.recipe import Recipe

LR, WEIGHT_DECAY, MOMENTUM, TEACHER_TEMP = 0.1, 1e-6, 0.996, 0.07


class PublishedLoop:
    """Student, teacher, centre and optimizer, stepped as the published trainer does."""

    def __init__(self, student: Branch, recipe: Recipe, folder: Path) -> None:
        self.student, self.recipe = student, recipe
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        groups = param_groups(student)
        self.optimizer: Any = PerTensorLARS(groups) if recipe.optim.name == "lars" else torch.optim.AdamW(groups, lr=LR)
        self.center = torch.zeros(1, recipe.method.num_prototypes, device=next(student.parameters()).device)
        self.writer, self.steps, self.losses = SummaryWriter(str(folder / "published")), 0, 0.0

    def step(self, images: list[Tensor]) -> None:
        """One step on a list of views, globals first."""
        num_globals = self.recipe.views.global_views.count
        with torch.no_grad():
            teacher = multi_crop(self.teacher, images[:num_globals])
        student = multi_crop(self.student, images)
        loss = self.loss(student, teacher, num_globals, len(images))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                theirs.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * mine.detach().data)
        self.losses += loss.item()
        self.steps += 1

    def loss(self, student: Tensor, teacher: Tensor, num_globals: int, num_views: int) -> Tensor:
        """Cross-entropies pair by pair, weighted as the recipe says; then the centre moves."""
        method = self.recipe.method
        students = (student / method.student_temp).chunk(num_views)
        teachers = F.softmax((teacher - self.center) / TEACHER_TEMP, dim=-1).detach().chunk(num_globals)
        of_globals, of_locals = [], []
        for i, target in enumerate(teachers):
            for v, logits in enumerate(students):
                if i != v:
                    pair = torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    (of_globals if v < num_globals else of_locals).append(pair)
        with torch.no_grad():
            self.center = self.center * 0.9 + teacher.sum(0, keepdim=True) / len(teacher) * 0.1
        weighted: Tensor = method.global_weight * sum(of_globals) / len(of_globals)
        return weighted + method.local_weight * sum(of_locals) / len(of_locals)

    def log(self) -> None:
        """The mean magnitude of every weight and gradient, each read from the device by itself."""
        self.writer.add_scalar("loss", self.losses / max(1, self.steps), self.steps)
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                self.writer.add_scalar(name + ".data", parameter.data.abs().mean().item(), self.steps)
                gradient = 0.0 if parameter.grad is None else parameter.grad.abs().mean().item()
                self.writer.add_scalar(name + ".grad", gradient, self.steps)


def multi_crop(branch: Branch, images: list[Tensor]) -> Tensor:
    """Consecutive views of one size together through the backbone, all of them together through the head."""
    starts = [i for i, image in enumerate(images) if i == 0 or image.shape[-1] != images[i - 1].shape[-1]]
    embeds = torch.cat([branch.backbone(torch.cat(images[a:b])) for a, b in pairwise([*starts, len(images)])])
    output: Tensor = branch.head(embeds)
    return output


class PerTensorLARS(torch.optim.Optimizer):
    """LARS with a Python loop over tensors."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": LR, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """p <- p - lr m, with m <- mu m + eta |p| / |g| g, one tensor after the other."""
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if group["decays"]:
                    update = update.add(p, alpha=WEIGHT_DECAY)
                if group["adapts"]:
                    size, step = torch.norm(p), torch.norm(update)
                    one = torch.ones_like(size)
                    update = update.mul(torch.where(size > 0, torch.where(step > 0, 0.001 * size / step, one), one))
                buffer = self.state[p].setdefault("mu", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def memory(field: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field + ":"))
