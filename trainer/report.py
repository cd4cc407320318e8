"""`trainer report`: the evaluations of many runs as one table, in Markdown, CSV and LaTeX, beside published figures."""

import csv
import json
import logging
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from trainer.published_results import PUBLISHED, published_for
from trainer.recipe_file import read_yaml
from trainer.run_dir import write_text

log = logging.getLogger(__name__)
HEADLINES = {"detection": "box_AP", "segmentation": "mask_AP", "collapse": "rank_me"}
"""The measure of a protocol that a table shows; top1 for the others, or for each number of images a class."""
REFERENCES = ("pixels", "untrained")


class ReportError(ValueError):
    """Results that cannot stand in one table."""


@dataclass(frozen=True)
class Evaluation:
    """One protocol on one run."""

    path: Path
    run: str
    """What names the run's row; runs that differ by their seed alone share it."""
    recipe: dict[str, Any]
    seed: int
    protocol: str
    step: int | None
    """After how many steps of training; None where nobody knows."""
    data: tuple[str, str]
    """The data set's name and content; results on others stand in other columns."""
    conditions: dict[str, Any]
    """Everything that must be equal before two numbers may be compared."""
    results: dict[str, dict[str, Any]]
    """network -> measure -> value."""


def report(sources: Sequence[Path], out: Path) -> None:
    """Write out.md, out.csv and out.tex, and print the first.

    raises: ReportError if there is nothing to report, or one protocol was run in different ways
    """
    once = {source.resolve(): source for source in sources}.values()
    evaluations = [each for source in once for each in read(source)]
    check_alike(evaluations)
    rows = table(evaluations)
    paths = [out.with_suffix(suffix) for suffix in (".md", ".csv", ".tex")]
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, evaluations)
    write_text(paths[0], text)
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(every_number(evaluations))
    write_text(paths[2], latex(rows))
    print(text)
    log.info("written to %s", ", ".join(map(str, paths)))


def read(source: Path) -> Iterator[Evaluation]:
    """The newest result of each protocol on each data set, in a run directory or beside weights.

    raises: ReportError if there is none
    """
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in (source / "evals").glob("*.json")]
    found.sort(key=lambda each: (each[1]["step"] or 0, each[0].stat().st_mtime))
    newest = {(tree["protocol"], _content(tree["data"]["train"])): (path, tree) for path, tree in found}
    if not newest:
        raise ReportError(f"{source}: no evals/*.json; run `trainer evaluate {source} --protocol ...` first")
    recipe_path = source / "resolved.yaml"
    recipe = read_yaml(recipe_path) if recipe_path.is_file() else {}
    for path, tree in sorted(newest.values()):
        yield Evaluation(
            path=path,
            run=_row_name(source, recipe) if recipe else str(source),
            recipe=recipe,
            seed=tree["seed"],
            protocol=tree["protocol"],
            step=tree["step"],
            data=(Path(tree["data"]["train"]["path"]).stem, _content(tree["data"]["train"])),
            conditions={"settings": tree["settings"], "data": {k: _content(v) for k, v in tree["data"].items()}},
            results=tree["results"],
        )


def _content(data: dict[str, Any]) -> str:
    """What tells one file's content from another's."""
    return data["sha256"] or f"{data['path']} of {data['bytes']} bytes"


def _row_name(source: Path, recipe: dict[str, Any]) -> str:
    """The run's folder without its seed, so that seeds meet in one row."""
    seed = recipe.get("seed", 0)
    for ending in (f"-seed{seed}", f"_seed{seed}"):
        if source.name.endswith(ending):
            return source.name.removesuffix(ending)
    return source.name


def check_alike(evaluations: Sequence[Evaluation]) -> None:
    """raises: ReportError that names the first setting in which two results of one protocol differ"""
    first: dict[tuple[str, tuple[str, str]], Evaluation] = {}
    for each in evaluations:
        other = first.setdefault((each.protocol, each.data), each)
        if each.conditions != other.conditions:
            raise ReportError(
                f"{each.protocol} was not run alike, so its numbers do not go into one column: "
                f"{_difference(other.conditions, each.conditions)} in {other.path} and {each.path}. Evaluate both with "
                "the same settings and data, or report them apart"
            )


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first key whose values differ, dotted."""
    for key in a.keys() | b.keys():
        mine, theirs = a.get(key), b.get(key)
        if mine != theirs:
            if isinstance(mine, dict) and isinstance(theirs, dict):
                return f"{key}.{_difference(mine, theirs)}"
            return f"{key} is {mine!r} and {theirs!r}"
    return ""


def headlines(evaluation: Evaluation) -> list[str]:
    """The measures of an evaluation that a table shows."""
    usual = HEADLINES.get(evaluation.protocol, "top1")
    names = dict.fromkeys(name for result in evaluation.results.values() for name in result)
    shots = [name for name in names if name.startswith("top1_") and not name.endswith("_std")]
    return [usual] if usual in names else shots


Column = tuple[str, tuple[str, str], str]
"""Protocol, data set, measure."""


def table(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Header and rows: a row a run and network, a column a protocol; mean ± standard deviation over seeds.

    raises: ReportError if a row would mix different trainings
    """
    columns = sorted({(each.protocol, each.data, measure) for each in evaluations for measure in headlines(each)})
    rows = [["run", "network", *(_title(column, columns) for column in columns)]]
    for run in dict.fromkeys(each.run for each in evaluations):
        mine = [each for each in evaluations if each.run == run]
        _check_one_training(run, mine)
        networks = dict.fromkeys(name for each in mine for name in each.results)
        for network in sorted(networks, key=lambda name: name in REFERENCES):
            rows.append([run, network, *(_cell(mine, network, *column) for column in columns)])
    return rows


def _title(column: Column, columns: Sequence[Column]) -> str:
    """The protocol, and of data set and measure what it takes to tell columns apart."""
    protocol, data, measure = column
    shared = len({other[1] for other in columns if other[0] == protocol}) == 1
    name = [] if shared else [_data_name(data, {other[1] for other in columns})]
    return " ".join([protocol, *name, *([] if measure == "top1" else [measure])])


def _data_name(data: tuple[str, str], sets: Collection[tuple[str, str]]) -> str:
    """The data set's name, and of its content what it takes to tell it from its namesakes among the sets."""
    name, content = data
    namesakes = {other for stem, other in sets if stem == name}
    if len(namesakes) == 1:
        return name
    short = len({other[:6] for other in namesakes}) == len(namesakes)
    return f"{name} ({content[:6] if short else content})"


def _check_one_training(run: str, evaluations: Sequence[Evaluation]) -> None:
    shaping = [{k: v for k, v in each.recipe.items() if k not in ("seed", "run", "evals")} for each in evaluations]
    for each, shape in zip(evaluations, shaping, strict=True):
        if shape != shaping[0]:
            raise ReportError(
                f"{run}: {_difference(shaping[0], shape)} in {evaluations[0].path} and {each.path}, which would share "
                "a row; give the runs different names"
            )
    seen: dict[tuple[Path, int | None, str], tuple[Any, Path]] = {}
    for each in evaluations:
        for network in sorted(set(each.results) - set(REFERENCES)):
            origin = each.results[network].get("origin")
            before, path = seen.setdefault((each.path.parent, each.step, network), (origin, each.path))
            if before != origin:
                raise ReportError(
                    f"{path} and {each.path} were measured on different weights of {network}; evaluate the older anew"
                )


def _cell(evaluations: Sequence[Evaluation], network: str, protocol: str, data: tuple[str, str], measure: str) -> str:
    alike = [each for each in evaluations if (each.protocol, each.data) == (protocol, data) and network in each.results]
    for pair in combinations(alike, 2):
        _check_another_seed(*pair)
    results = [each.results[network] for each in alike]
    values = [result[measure] for result in results if measure in result]
    if len(values) > 1:
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)} seeds)"
    spreads = [f" ± {result[f'{measure}_std']:.2f}" for result in results if f"{measure}_std" in result]
    return f"{values[0]:.2f}{''.join(spreads)}" if values else ""


def _check_another_seed(one: Evaluation, other: Evaluation) -> None:
    """raises: ReportError if the two are not seeds of one training, equally long"""
    if one.step != other.step:
        raise ReportError(
            f"{one.path} is of step {one.step} and {other.path} of step {other.step}, so no mean is taken; train both "
            "to the same step, or give the runs different names"
        )
    if one.seed == other.seed:
        raise ReportError(
            f"{one.path} and {other.path} are both of seed {one.seed}, so no mean is taken; give the runs different "
            "names, or report one of them"
        )


def markdown(rows: Sequence[Sequence[str]], evaluations: Sequence[Evaluation]) -> str:
    """The table, how each protocol was run, and what has been published for these methods and networks."""
    lines = _markdown_table(rows)
    lines += ["", "How they were measured:", ""]
    sets = {each.data for each in evaluations}
    for (protocol, on), each in sorted({(each.protocol, each.data): each for each in evaluations}.items()):
        settings = ", ".join(f"{key} {value}" for key, value in each.conditions["settings"].items())
        data = ", ".join(f"{name} {content[:12]}" for name, content in each.conditions["data"].items())
        lines.append(f"- {protocol} on {_data_name(on, sets)}: {settings}; data {data}")
    for run in dict.fromkeys(each.run for each in evaluations):
        mine = [each for each in evaluations if each.run == run]
        if len({each.step for each in mine}) > 1:
            steps = sorted({f"{each.protocol} on {_data_name(each.data, sets)} {each.step}" for each in mine})
            lines.append(f"- {run}, after how many steps: {', '.join(steps)}")
    kinds = dict.fromkeys(_kind(each) for each in evaluations)
    if published := [row for kind in kinds if kind for row in published_for(*kind)]:
        lines += ["", f"Published ({PUBLISHED}), a column of its own since data and schedules are others:", ""]
        lines += _markdown_table([["method", "network", "views", "measure", "published"], *published])
    return "\n".join(lines) + "\n"


def _kind(evaluation: Evaluation) -> tuple[str, str] | None:
    recipe = evaluation.recipe
    return (recipe["method"]["name"], recipe["backbone"]["name"]) if recipe else None


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = rows
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular of the booktabs package."""
    header, *body = [[cell.replace("_", r"\_").replace("±", r"$\pm$") for cell in row] for row in rows]
    lines = [
        rf"\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
    ]
    return "\n".join([*lines, *(" & ".join(row) + r" \\" for row in body), r"\bottomrule", r"\end{tabular}", ""])


def every_number(evaluations: Sequence[Evaluation]) -> Iterator[list[Any]]:
    """Header and one row a measure."""
    yield ["run", "seed", "protocol", "data", "network", "measure", "value", "file"]
    sets = {each.data for each in evaluations}
    for each in evaluations:
        data = _data_name(each.data, sets)
        for network, result in each.results.items():
            for measure, value in result.items():
                if isinstance(value, int | float):
                    yield [each.run, each.seed, each.protocol, data, network, measure, value, each.path]
