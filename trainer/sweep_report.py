"""A finished sweep as a table for people, a table for programs, and a plot."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.run_dir import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("untrained", "pixels")
"""What every result stands beside."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run's results."""

    case: str
    x: float | None
    seed: int
    epochs: int
    gmacs_per_image: float
    """10^9 multiply-accumulates an image and step."""
    top1: dict[str, dict[str, float]]
    """protocol -> network (student, untrained, pixels ...) -> top-1 in percent."""


def write_report(
    folder: Path, question: str, equal: str, x_label: str | None, outcomes: Sequence[Outcome]
) -> tuple[Path, Path, Path]:
    """Write table.md, table.csv and plot.png; returns their paths."""
    paths = folder / "table.md", folder / "table.csv", folder / "plot.png"
    write_text(paths[0], markdown(question, equal, outcomes))
    _write_csv(paths[1], outcomes)
    plot(question, x_label, outcomes).savefig(paths[2], dpi=120)
    return paths


def by_case(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each case, in the sweep's order; seeds in theirs."""
    return {name: [o for o in outcomes if o.case == name] for name in dict.fromkeys(o.case for o in outcomes)}


def markdown(question: str, equal: str, outcomes: Sequence[Outcome]) -> str:
    """A row a case: mean and standard deviation over seeds, and the paired difference to the first case."""
    cases, protocols = by_case(outcomes), list(outcomes[0].top1)
    header = ["case", "epochs", "GMAC an image"]
    for name in protocols:
        header += [f"{name} top-1 %", "to the first, same seed"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    first = next(iter(cases.values()))
    for name, runs in cases.items():
        row = [name, str(runs[0].epochs), f"{runs[0].gmacs_per_image:.3f}"]
        for protocol in protocols:
            row += [_mean_std(_students(runs, protocol)), _difference(runs, first, protocol)]
        rows.append(row)
    for reference in REFERENCES:
        row = [reference, "", ""]
        for protocol in protocols:
            row += [_mean_std([o.top1[protocol][reference] for o in first]), ""]
        rows.append(row)
    seeds = f"{len(first)} seeds ({', '.join(str(o.seed) for o in first)})"
    lines = [f"# {question}", "", f"Equal {equal}; {seeds}; mean ± standard deviation over seeds; student.", ""]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def _students(runs: Sequence[Outcome], protocol: str) -> list[float]:
    return [o.top1[protocol]["student"] for o in runs]


def _mean_std(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _difference(runs: Sequence[Outcome], first: Sequence[Outcome], protocol: str) -> str:
    """Mean of the differences seed by seed, with its standard error."""
    if runs[0].case == first[0].case:
        return ""
    pairs = zip(_students(runs, protocol), _students(first, protocol), strict=True)
    differences = [mine - theirs for mine, theirs in pairs]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return f"{statistics.mean(differences):+.2f}" + ("" if error is None else f" (standard error {error:.2f})")


def _write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "x", "seed", "epochs", "gmacs_per_image", "protocol", "network", "top1"])
        for o in outcomes:
            for protocol, networks in o.top1.items():
                for network, top1 in networks.items():
                    writer.writerow([o.case, o.x, o.seed, o.epochs, o.gmacs_per_image, protocol, network, top1])


def plot(question: str, x_label: str | None, outcomes: Sequence[Outcome]) -> "Figure":
    """One panel a protocol: a dot a seed, the mean of each case, and what it must beat as lines."""
    import matplotlib as mpl  # half a second that no training need wait for
    from matplotlib.figure import Figure

    protocols, cases = list(outcomes[0].top1), by_case(outcomes)
    along_axis = all(o.x is not None for o in outcomes)
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(5 * len(protocols) + 1, 4.2), layout="constrained")
        for axes, protocol in zip(figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True):
            places = [runs[0].x if along_axis else place for place, runs in enumerate(cases.values())]
            means = [statistics.mean(_students(runs, protocol)) for runs in cases.values()]
            axes.plot(places, means, "o-" if along_axis else "o", color="#c03030", markersize=7, label="mean of seeds")
            for place, runs in zip(places, cases.values(), strict=True):
                axes.plot([place] * len(runs), _students(runs, protocol), "_", color="#404040", markersize=14)
            for reference, style in zip(REFERENCES, ("--", ":"), strict=True):
                level = statistics.mean(o.top1[protocol][reference] for o in outcomes)
                axes.axhline(level, linestyle=style, color="#808080", label=reference)
            if not along_axis:
                axes.set_xticks(places, list(cases), rotation=20, ha="right")
                axes.margins(x=0.3)
            axes.set_xlabel(x_label or "")
            axes.set_ylabel(f"{protocol} top-1 %")
            axes.legend(frameon=False)
        figure.suptitle(question)
    return figure
