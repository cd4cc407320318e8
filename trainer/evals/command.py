"""`trainer evaluate`: one protocol on a run, a table for people, a JSON with everything that the numbers depend on."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer import distributed, protocols
from trainer.evals import classification, collapse, detection, knn, linear, lowshot, probe
from trainer.evals.sources import REFERENCES, Results, Source, open_source
from trainer.recipe import RecipeError
from trainer.run_dir import environment, write_json

log = logging.getLogger(__name__)


COLLAPSED_STD, COLLAPSED_RANK = 0.1, 5
"""Below either, features are called collapsed: one point has a spread of 0, one line 1 effective direction."""

Run = Callable[[Source], tuple[dict[str, Any], Results]]
CACHED: dict[str, Run] = {
    **{"knn": knn.run, "linear_cached": linear.run, "linear_online": probe.run},
    **{"lowshot": lowshot.run, "collapse": collapse.run},
}
"""Protocols that look at features only, of every network at once."""
TRAINED: dict[str, Run] = {
    **{name: partial(classification.run, protocol=name) for name in protocols.CLASSIFICATIONS},
    **{name: partial(detection.run, protocol=name) for name in protocols.DETECTIONS},
}
"""Protocols that train for hours, by default on what was trained last: the student, as published."""
EVALS = CACHED | TRAINED
"""The protocols by name; a new one is one file, one line here and its name in protocols.py."""
assert tuple(EVALS) == protocols.EVALS
CONDITIONS = ("protocol", "settings", "step", "seed", "world", "data", "environment")
"""What results must share to stand in one file; of the environment all but the command."""


def evaluate(named: Path, protocol: str, overrides: list[str], networks: Sequence[str] = ()) -> None:
    """Evaluate a run, a weights folder or a timm network: a table, and a JSON report beside the weights.

    networks: which of the source's, such as untrained; by default all, or the student where each is trained
    """
    distributed.start(distributed.local_device())
    source = open_source(named, protocol, overrides)
    if networks or protocol in TRAINED:
        source.choose(networks or [source.default])
    if protocol in TRAINED and "pixels" in source.networks:
        raise RecipeError(f"{protocol} trains networks, and pixels are none; name others in --networks")
    settings, results = EVALS[protocol](source)
    if distributed.is_main():
        source.report.parent.mkdir(exist_ok=True)
        write_json(source.report, _beside_earlier(_report(source, protocol, settings, results), source))
        source.forget_trainings()
        _print(protocol, source, settings, results)
        log.info("written to %s", source.report)
    distributed.barrier()


def _report(source: Source, protocol: str, settings: dict[str, Any], results: Results) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "settings": settings,
        "step": source.step,
        "seed": source.recipe.seed,
        "world": distributed.world(),
        "data": source.data(),
        "results": {name: {"origin": source.origins[name], **values} for name, values in results.items()},
        "environment": environment(),
    }


def _beside_earlier(report: dict[str, Any], source: Source) -> dict[str, Any]:
    """The report, with what its file said of other networks if all else is equal; otherwise that file is put aside."""
    if not source.report.is_file():
        return report
    earlier, now = json.loads(source.report.read_text(encoding="utf-8")), json.loads(json.dumps(report))
    for each in (earlier, now):
        each.get("environment", {}).pop("command", None)
    differing = [key for key in CONDITIONS if earlier.get(key) != now[key]]
    if any(source.origins.get(name) != each["origin"] for name, each in earlier["results"].items()):
        differing.append("weights")
    if not differing:
        return report | {"results": earlier["results"] | report["results"]}
    aside = next(path for i in count(1) if not (path := source.report.with_suffix(f".{i}.old")).exists())
    source.report.replace(aside)
    log.warning("%s was of another %s; it is %s now", source.report, " and ".join(differing), aside.name)
    return report


HIDDEN = ("num_images", "weight_decay", "base_lr", "_small", "_medium", "_large")
"""Measures, or how they end, that stand in the report only."""
TITLES = {"top1": "top-1 %", "top5": "top-5 %", "rank_me": "RankMe", "feature_std": "std x sqrt(D)"}


def _print(protocol: str, source: Source, settings: dict[str, Any], results: Results) -> None:
    shown = ", ".join(f"{key} {value}" for key, value in settings.items())
    data = source.recipe.data
    console = Console(width=120, highlight=False)
    console.print(f"{protocol}: {shown}; train {data.train}, val {data.val}")
    table = Table()
    every = dict.fromkeys(key for values in results.values() for key in values)
    columns = [key for key in every if not key.endswith(HIDDEN)]
    table.add_column("network")
    for key in columns:
        table.add_column(TITLES.get(key, key.replace("_", " ")), justify="right")
    for name, values in results.items():
        table.add_row(name, *(f"{values[key]:.2f}" if key in values else "" for key in columns))
    console.print(table)
    for line in verdict(results):
        log.info("%s", line)


def verdict(results: Results) -> list[str]:
    """What the table says, in words: by how much training beat what it must beat, and whether features collapsed.

    A collapse would be a spread near 0 or fewer directions than there are classes to tell apart; both are read off
    the val images' features.
    """
    lines = []
    for name in sorted(set(results) - set(REFERENCES)):
        said = [*_gains(name, results), *_collapse(results[name])]
        lines += [f"{name}: {'; '.join(said)}"] if said else []
    return lines


def _gains(name: str, results: Results) -> list[str]:
    """Points of top-1 over what is not trained, with their error."""
    mine, others = results[name], [other for other in REFERENCES if other in results]
    if "top1" not in mine or not others:
        return []
    gains = [f"{mine['top1'] - results[other]['top1']:+.2f} over {other}" for other in others]
    error = (mine["top1"] * (100 - mine["top1"]) / mine["num_images"]) ** 0.5
    return [f"{', '.join(gains)} points of top-1 (one standard error is {error:.2f})"]


def _collapse(mine: dict[str, float]) -> list[str]:
    if "rank_me" not in mine:
        return []
    collapsed = mine["feature_std"] < COLLAPSED_STD or mine["rank_me"] < COLLAPSED_RANK
    verb = "HAVE COLLAPSED" if collapsed else "have not collapsed"
    directions = f"{mine['rank_me']:.0f} effective directions (RankMe)"
    return [f"features {verb}: {directions}, spread {mine['feature_std']:.2f} of 1"]
