"""Latency of a gated network in its forms, in torch and in ONNX Runtime: one thread, one process, rounds in turn.

python -m benchmarks.gated_latency [--run RUN] [--budget 0.3] [--size 224] [--batches 1 64] [--rounds 9] [--multiple 8]

dense: the plain network; masked: hard gates, closed channels multiplied by 0; dynamic: open channels only, image by
image (batch 1 alone); sliced: an ordinary network of the channels that meet the budget, widths in multiples.
Without RUN, timm's ResNet-18 with random weights, whose gates are set on noise: a channel's open rate is drawn from a
Beta distribution, most near 0 or 1 as those of trained gates, so that the gated network meets the budget on average.
Every round runs all forms once, in an order that turns, so that what else the machine does meets them alike; a round's
ratio is dense's time over a form's. It prints Markdown: median times, and ratios as median and quartiles over rounds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from trainer import onnx_files, weights
from trainer.models.backbones import Backbone, build_backbone
from trainer.models.dynamic import dynamic_network
from trainer.models.gates import Gates
from trainer.models.gating import always_hard, cost_at, gates_of
from trainer.models.macs import uniform_density
from trainer.models.slicing import calibrate, slice_network, widths, within_budget

DENSE, MASKED, DYNAMIC, SLICED = "dense", "masked", "dynamic", "sliced"
CONCENTRATION = 0.4
"""alpha + beta of the rates' distribution; the paper's channels are 72 to 84 % always or never open."""
Forward = Callable[[], object]


@dataclass
class Forms:
    """One gated network in its forms, what each costs, and the widths of the sliced one."""

    networks: dict[str, nn.Module]
    macs: dict[str, float]
    kept: dict[str, int]


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gated, plain = of_run(args.run) if args.run else drawn(args.budget, args.size)
    forms = make(gated, plain, args.budget, args.size, args.multiple)
    describe(forms, args)
    for batch in args.batches:
        with tempfile.TemporaryDirectory() as folder:
            cases = forwards(forms, torch.randn(batch, 3, args.size, args.size), Path(folder))
            print(table(rounds(cases, args.rounds), batch), flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished gated run, instead of random gates")
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--multiple", type=int, default=8, help="of which the sliced network's widths are")
    return parser.parse_args(argv)


def of_run(run: Path) -> tuple[nn.Module, nn.Module]:
    """A run's gated network, and a plain one of its architecture."""
    gated, config = weights.load_backbone(run / "weights/gated")
    return gated.eval(), build_backbone(replace(weights.spec_of(config), gates=None)).eval()


def drawn(budget: float, size: int) -> tuple[nn.Module, nn.Module]:
    """ResNet-18 with gates whose biases give each channel the open rate that was drawn for it, on noise."""
    spec = Backbone(name="resnet18", init="timm", gates=Gates(target=budget))
    gated = build_backbone(spec).eval()
    always_hard(gated)
    density = uniform_density(cost_at(gated, size), budget)
    rates = torch.distributions.Beta(CONCENTRATION * density, CONCENTRATION * (1 - density))
    hooks = [gate.expand.register_forward_hook(lambda layer, args, logits: shifted(layer, logits, rates))
             for gate in gates_of(gated)]  # fmt: skip
    with torch.no_grad():
        gated(torch.randn(64, 3, size, size))
    for hook in hooks:
        hook.remove()
    return gated, build_backbone(replace(spec, gates=None)).eval()


def shifted(layer: nn.Module, logits: Tensor, rates: torch.distributions.Beta) -> Tensor:
    """The logits (B, C) with new biases, above 0 for each channel's share of the batch."""
    wanted = rates.sample((logits.shape[1],))
    falling = logits.sort(0, descending=True).values
    last_open = (wanted * len(logits)).round().long()
    above, below = (
        falling[(last_open - 1).clamp(0), range(len(wanted))],
        falling[last_open.clamp(max=len(logits) - 1), range(len(wanted))],
    )
    threshold = (above + below) / 2
    threshold = torch.where(last_open == 0, above + 1, torch.where(last_open == len(logits), below - 1, threshold))
    assert isinstance(layer, nn.Linear)
    layer.bias -= threshold
    return logits - threshold


def make(gated: nn.Module, plain: nn.Module, budget: float, size: int, multiple: int) -> Forms:
    """The forms; open rates are those on 64 images of noise."""
    found, cost = calibrate(gated, [torch.randn(64, 3, size, size)]), cost_at(gated, size)
    masks = within_budget(found.rates, cost, budget, multiple=multiple)
    sliced = slice_network(gated, plain, masks)
    networks = {DENSE: plain, MASKED: gated, DYNAMIC: dynamic_network(gated), SLICED: sliced}
    kept = widths(masks)
    cut = float(cost.open_macs(torch.tensor(list(kept.values()))))
    macs = {DENSE: cost.dense, MASKED: cost.dense + cost.gate_macs, DYNAMIC: found.macs, SLICED: cut}
    return Forms({name: network.eval() for name, network in networks.items()}, macs, kept)


def describe(forms: Forms, args: argparse.Namespace) -> None:
    shares = ", ".join(
        f"{name} {macs / 1e6:.0f} M ({macs / forms.macs[DENSE]:.3f})" for name, macs in forms.macs.items()
    )
    print(f"{args.run or 'random gates'}, {args.size} px, budget {args.budget}, widths in multiples of {args.multiple}")
    print(f"multiply-accumulates: {shares}")
    print(f"widths: {', '.join(f'{name} {width}' for name, width in forms.kept.items())}\n")


def forwards(forms: Forms, images: Tensor, folder: Path) -> dict[str, Forward]:
    """What one round runs, by form and runtime."""
    cases: dict[str, Forward] = {}
    for name, network in forms.networks.items():
        if name == DYNAMIC and (len(images) > 1 or has_depth_wise(network)):
            continue
        file, free = folder / f"{name}.onnx", name != DYNAMIC
        onnx_files.write(network, file, size=images.shape[-1], free_batch=free, facts={})
        session = onnx_files.session_of(file, num_threads=1)
        cases[f"{name}, torch"] = lambda network=network: network(images)  # type: ignore[misc]
        cases[f"{name}, ONNX Runtime"] = lambda session=session: onnx_files.run(session, images)  # type: ignore[misc]
    return cases


def has_depth_wise(network: nn.Module) -> bool:
    return any(getattr(module, "depth_wise", False) for module in network.modules())


@dataclass(frozen=True)
class Timed:
    """One pass; on one thread the two differ by what other programs took."""

    wall_s: float
    cpu_s: float


@torch.inference_mode()
def rounds(cases: dict[str, Forward], count: int) -> dict[str, list[Timed]]:
    """What each case took in each round, after one that does not count."""
    names, times = list(cases), {name: [] for name in cases}
    for number in range(count + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            cases[name]()
            took = Timed(time.perf_counter() - wall, time.process_time() - cpu)
            if number:
                times[name].append(took)
    return times


def table(times: dict[str, list[Timed]], batch: int) -> str:
    lines = [f"| batch {batch} | ms | CPU ms | dense / it | quartiles | by CPU time | quartiles |", "|---" * 7 + "|"]
    for name, own in times.items():
        dense = times[f"{DENSE}, {name.split(', ')[1]}"]
        wall = [reference.wall_s / each.wall_s for reference, each in zip(dense, own, strict=True)]
        cpu = [reference.cpu_s / each.cpu_s for reference, each in zip(dense, own, strict=True)]
        middle = [f"{1e3 * median(seconds):.1f}" for seconds in ([t.wall_s for t in own], [t.cpu_s for t in own])]
        lines.append(f"| {' | '.join([name, *middle, *spread(wall), *spread(cpu)])} |")
    return "\n".join(lines) + "\n"


def spread(ratios: list[float]) -> tuple[str, str]:
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.2f}", f"{low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
