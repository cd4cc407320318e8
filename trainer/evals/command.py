"""`trainer evaluate`: one protocol on a run, a table for people, a JSON with everything that the numbers depend on."""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.schema import read_manifest
from trainer import distributed
from trainer.evals import knn
from trainer.evals.sources import Source, open_run
from trainer.run_dir import environment, write_json

log = logging.getLogger(__name__)


def run_knn(source: Source) -> dict[str, dict[str, float]]:
    """k-NN of every network of the source."""
    recipe = source.recipe
    device = distributed.local_device()
    networks = {name: network.to(device) for name, network in source.networks.items()}
    return knn.evaluate(networks, recipe.data, recipe.evals.knn, knn.reader_of(recipe, device))


COLLAPSED_STD, COLLAPSED_RANK = 0.1, 5
"""Below either, features are called collapsed: one point has a spread of 0, one line 1 effective direction."""

EVALS = {"knn": run_knn}
"""The protocols by name; a new one is one file and one line here."""


def evaluate(run: Path, protocol: str, overrides: list[str]) -> None:
    """Evaluate, print the table and write evals/PROTOCOL-step.json into the run."""
    distributed.start(distributed.local_device())
    source = open_run(run, overrides)
    results = EVALS[protocol](source)
    if distributed.is_main():
        step = _last_step(run)
        path = run / "evals" / f"{protocol}-{step:07d}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, _report(source, protocol, step, results))
        _print(protocol, source, results)
        log.info("written to %s", path)


def _last_step(run: Path) -> int:
    latest = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    return int(latest.removeprefix("step_"))


def _report(source: Source, protocol: str, step: int, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    plain = source.recipe.plain()
    return {
        "protocol": protocol,
        "settings": plain["evals"][protocol],
        "step": step,
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


def _print(protocol: str, source: Source, results: dict[str, dict[str, float]]) -> None:
    settings = source.recipe.evals.knn
    table = Table(
        title=f"{protocol}, k {settings.k}, T {settings.temperature}, {settings.size} px; "
        f"val {source.recipe.data.val}, bank {source.recipe.data.train}"
    )
    for column in ("features", "top-1 %", "top-5 %", "RankMe", "std x sqrt(D)"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name, values in results.items():
        table.add_row(name, *(f"{values[key]:.2f}" for key in ("top1", "top5", "rank_me", "feature_std")))
    Console(width=120).print(table)
    for line in verdict(results):
        log.info("%s", line)


def verdict(results: dict[str, dict[str, float]]) -> list[str]:
    """What the table says, in words: by how much training beat what it must beat, and whether features collapsed.

    A collapse would be a spread near 0 or fewer directions than there are classes to tell apart; both are read off
    the val images' features.
    """
    lines = []
    for name in sorted(set(results) - {"pixels", "untrained"}):
        mine = results[name]
        gains = [f"{mine['top1'] - results[other]['top1']:+.2f} over {other}" for other in ("pixels", "untrained")]
        error = (mine["top1"] * (100 - mine["top1"]) / mine["num_images"]) ** 0.5
        collapsed = mine["feature_std"] < COLLAPSED_STD or mine["rank_me"] < COLLAPSED_RANK
        lines.append(
            f"{name}: {', '.join(gains)} points of top-1 (one standard error is {error:.2f}); features "
            + ("HAVE COLLAPSED" if collapsed else "have not collapsed")
            + f": {mine['rank_me']:.0f} effective directions (RankMe), spread {mine['feature_std']:.2f} of 1"
        )
    return lines
