"""`trainer evaluate`: one protocol on a run, a table for people, a JSON with everything that the numbers depend on."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.schema import read_manifest
from trainer import distributed
from trainer.evals import knn, linear
from trainer.evals.sources import Source, open_source
from trainer.run_dir import environment, write_json

log = logging.getLogger(__name__)


Results = dict[str, dict[str, float]]
"""network -> measure -> value."""


def run_knn(source: Source) -> tuple[dict[str, Any], Results]:
    """k-NN of every network of the source, and its settings."""
    recipe = source.recipe
    device = distributed.local_device()
    networks = {name: network.to(device) for name, network in source.networks.items()}
    settings = dataclasses.asdict(recipe.evals.knn)
    return settings, knn.evaluate(networks, recipe.data, recipe.evals.knn, knn.reader_of(recipe, device))


def run_linear_cached(source: Source) -> tuple[dict[str, Any], Results]:
    """A linear classifier on cached features of every network of the source; images are read as k-NN reads them."""
    recipe = source.recipe
    device = distributed.local_device()
    networks = {name: network.to(device) for name, network in source.networks.items()}
    train, val = knn.labelled_features(networks, recipe.data, knn.reader_of(recipe, device))
    settings = {key: getattr(recipe.evals.knn, key) for key in ("size", "resize")}
    settings |= {
        "solver": "L-BFGS",
        "weight_decays": linear.WEIGHT_DECAYS,
        "chosen_on": f"1/{linear.HELD_OUT} of train",
    }
    return settings, {name: linear.linear_accuracy(train[name], val[name]) for name in networks}


COLLAPSED_STD, COLLAPSED_RANK = 0.1, 5
"""Below either, features are called collapsed: one point has a spread of 0, one line 1 effective direction."""

EVALS = {"knn": run_knn, "linear_cached": run_linear_cached}
"""The protocols by name; a new one is one file and one line here."""


def evaluate(named: Path, protocol: str, overrides: list[str]) -> None:
    """Evaluate a run, a weights folder or a timm network: a table, and a JSON report beside the weights."""
    distributed.start(distributed.local_device())
    source = open_source(named, protocol, overrides)
    settings, results = EVALS[protocol](source)
    if distributed.is_main():
        source.report.parent.mkdir(exist_ok=True)
        write_json(source.report, _report(source, protocol, settings, results))
        _print(protocol, source, settings, results)
        log.info("written to %s", source.report)


def _report(source: Source, protocol: str, settings: dict[str, Any], results: Results) -> dict[str, Any]:
    plain = source.recipe.plain()
    return {
        "protocol": protocol,
        "settings": settings,
        "step": source.step,
        "seed": source.recipe.seed,
        "data": {name: _data_id(Path(plain["data"][name])) for name in ("train", "val")},
        "results": {name: {"origin": source.origins[name], **values} for name, values in results.items()},
        "environment": environment(),
    }


def _data_id(beton: Path) -> dict[str, Any]:
    """The file's path and size, and the hash that its manifest states."""
    manifest = read_manifest(beton)
    sha256 = None if manifest is None else manifest.beton_sha256
    return {"path": str(beton), "bytes": beton.stat().st_size, "sha256": sha256}


COLUMNS = {"top1": "top-1 %", "top5": "top-5 %", "rank_me": "RankMe", "feature_std": "std x sqrt(D)"}


def _print(protocol: str, source: Source, settings: dict[str, Any], results: Results) -> None:
    shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("every_epochs", "batch_size"))
    data = source.recipe.data
    table = Table(title=f"{protocol} ({shown}); train {data.train}, val {data.val}")
    columns = {key: title for key, title in COLUMNS.items() if key in next(iter(results.values()))}
    for column in ("features", *columns.values()):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name, values in results.items():
        table.add_row(name, *(f"{values[key]:.2f}" for key in columns))
    Console(width=120).print(table)
    for line in verdict(results):
        log.info("%s", line)


def verdict(results: Results) -> list[str]:
    """What the table says, in words: by how much training beat what it must beat, and whether features collapsed.

    A collapse would be a spread near 0 or fewer directions than there are classes to tell apart; both are read off
    the val images' features.
    """
    lines = []
    for name in sorted(set(results) - {"pixels", "untrained"}):
        mine = results[name]
        gains = [f"{mine['top1'] - results[other]['top1']:+.2f} over {other}" for other in ("pixels", "untrained")]
        error = (mine["top1"] * (100 - mine["top1"]) / mine["num_images"]) ** 0.5
        line = f"{name}: {', '.join(gains)} points of top-1 (one standard error is {error:.2f})"
        lines.append(line + _collapse(mine) if "rank_me" in mine else line)
    return lines


def _collapse(mine: dict[str, float]) -> str:
    collapsed = mine["feature_std"] < COLLAPSED_STD or mine["rank_me"] < COLLAPSED_RANK
    verb = "HAVE COLLAPSED" if collapsed else "have not collapsed"
    directions = f"{mine['rank_me']:.0f} effective directions (RankMe)"
    return f"; features {verb}: {directions}, spread {mine['feature_std']:.2f} of 1"
