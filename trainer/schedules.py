"""What changes during training, as pure functions of the step: nothing here remembers anything."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where training stands at one step, and the values that hold there."""

    step: int
    epoch: int
    lr: float
    weight_decay: float
    momentum: float
    """The EMA teacher's m."""
    seed: int = 0
    """The run's, for what a method draws."""
    done: float = 0.0
    """The share of the run that lies behind."""


def cosine(start: float, final: float, step: int, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `final`, which step `num_steps` would reach."""
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * step / num_steps))


def ramp(start: float, final: float, step: int, num_steps: int) -> float:
    """A straight line from `start` at step 0 to `final` at step `num_steps` - 1, both included; then `final`."""
    if step >= num_steps:
        return final
    return start if num_steps == 1 else start + (final - start) * step / (num_steps - 1)


def warmup_cosine(start: float, peak: float, final: float, step: int, *, num_steps: int, warmup_steps: int) -> float:
    """A ramp from `start` to `peak` over the warm-up, then half a cosine towards `final`.

    The last warm-up step and the first cosine step both give `peak`, as in the SSLight code (utils/scheduler.py).
    """
    if step < warmup_steps:
        return ramp(start, peak, step, warmup_steps)
    return cosine(peak, final, step - warmup_steps, num_steps - warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedules:
    """Every per-step value of a run; `at(step)` looks them up."""

    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    warmup_lr: float
    peak_lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    momentum: float
    final_momentum: float
    seed: int = 0

    def at(self, step: int) -> Progress:
        """The values of step `step`, counted from 0."""
        return Progress(
            step=step,
            epoch=step // self.steps_per_epoch,
            lr=warmup_cosine(
                self.warmup_lr,
                self.peak_lr,
                self.final_lr,
                step,
                num_steps=self.num_steps,
                warmup_steps=self.warmup_steps,
            ),
            weight_decay=cosine(self.weight_decay, self.final_weight_decay, step, self.num_steps),
            momentum=cosine(self.momentum, self.final_momentum, step, self.num_steps),
            seed=self.seed,
            done=step / self.num_steps,
        )
