"""Recipes from YAML: the only reader, which reports every fault at once and names the nearest known key."""

import difflib
import os
import typing
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from trainer.methods import AnyMethod
from trainer.methods.frozen import Frozen
from trainer.recipe import ADAPTER, EVALUATION, Evaluation, Recipe, RecipeError, dataclasses_in

Settings = TypeVar("Settings")
TAGGED = ("method", "teacher")
"""Blocks that are one of several dataclasses; pydantic puts which one behind their name in a fault's location."""
METHODS = {typing.get_args(typing.get_type_hints(kind)["name"])[0]: kind for kind in typing.get_args(AnyMethod)}


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: Sequence[str] = (), *, train_if_missing: Path | None = None) -> Recipe:
    """Read a recipe, apply dotted `key=value` overrides, and check all of it.

    train_if_missing: stands for data.train where nothing gives one, for those who only look at a recipe
    raises: RecipeError with one line a fault: the file, the key, what was wanted, what came
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    if isinstance(tree.get("run"), dict):
        tree["run"].setdefault("dir", f"runs/{path.stem}")
    if train_if_missing is not None and isinstance(tree.setdefault("data", {}), dict):
        tree["data"].setdefault("train", str(train_if_missing))
    recipe = _validate(ADAPTER, tree, path)
    fault = _cross_check(recipe)
    if fault:
        raise RecipeError(f"{path}: {fault}")
    return recipe


def load_evaluation(source: Path, mean: Sequence[float], std: Sequence[float], overrides: Sequence[str]) -> Evaluation:
    """The settings to evaluate ready weights with: defaults and `key=value` as for a recipe, data.train= among them.

    raises: RecipeError with one line a fault
    """
    tree: dict[str, Any] = {
        "data": {"num_workers": len(os.sched_getaffinity(0))},
        "evals": {"knn": {"every_epochs": 0}},
        "views": {"mean": list(mean), "std": list(std)},
    }
    for override in overrides:
        _apply(tree, override)
    return _validate(EVALUATION, tree, source)


def _validate(adapter: TypeAdapter[Settings], tree: dict[str, Any], path: Path) -> Settings:
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {fault}" for fault in _faults(error))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. raises: RecipeError where there is none."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; wanted the path of a YAML file, such as those in recipes/")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: wanted a mapping of recipe keys, got {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: wanted key.sub=value, such as optim.epochs=10")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"override {override!r}: {parent} holds a value, not further keys")
    try:
        tree[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from None


def _cross_check(recipe: Recipe) -> str | None:
    """Faults that lie between two blocks, each of which is right in itself."""
    fault = recipe.method.check(
        recipe.views.counts, teacher=recipe.teacher.kind, global_batch=recipe.optim.global_batch
    )
    if fault is not None:
        return f"method.{recipe.method.name}: {fault}"
    if recipe.backbone.gates is not None and not getattr(recipe.method, "takes_gates", False):
        others = ", ".join(name for name, config in METHODS.items() if getattr(config, "takes_gates", False))
        return f"backbone.gates: method.{recipe.method.name} does not train gates; take one of {others}, or gates=null"
    if recipe.probe and recipe.optim.gradient_clipping > 0:
        return (
            f"optim.gradient_clipping {recipe.optim.gradient_clipping} cuts the norm of all gradients, the probe's "
            "among them, which must not change the student; set probe=false, or optim.gradient_clipping=0"
        )
    if isinstance(recipe.teacher, Frozen) and recipe.teacher.cache_epochs >= recipe.optim.epochs:
        epochs = f"optim.epochs {recipe.optim.epochs}"
        return f"teacher.cache_epochs {recipe.teacher.cache_epochs} must be below {epochs}, or nothing is read; set 0"
    if recipe.run.keep_best == "teacher" and recipe.teacher.kind != "ema":
        return (
            f"run.keep_best teacher: teacher.kind {recipe.teacher.kind} has none that learns; set run.keep_best=student"
        )
    return None


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        location = tuple(str(part) for part in fault["loc"])
        key = ".".join(location[:1] + location[2:] if location[0] in TAGGED else location)
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            yield f"{key}: unknown key; {_hint(location)}"
        elif fault["type"] in ("missing", "missing_argument", "union_tag_not_found"):
            yield f"{key}: {message}; give it in the recipe or as {key}=..."
        elif fault["type"] == "value_error":
            yield f"{key}.{message}"  # a block's own check, whose message begins with the field
        elif fault["type"] == "union_tag_invalid":
            facts = fault["ctx"]
            tag = facts["discriminator"].strip("'")
            yield f"{key}.{tag} must be one of {facts['expected_tags']}, got {facts['tag']!r}"
        else:
            yield f"{key}: {message}, got {fault['input']!r}"


def _hint(location: tuple[str, ...]) -> str:
    """What the place takes, and the known key nearest to the unknown one."""
    *parents, unknown = location
    names = [field.name for field in fields(_block(parents))]
    near = difflib.get_close_matches(unknown, names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known here: {', '.join(names)}"


def _block(parents: list[str]) -> Any:
    """The dataclass that a path of keys leads to; in a tagged block the second part is the tag."""
    kind: Any = Recipe
    tagged: list[type] = []
    for depth, part in enumerate(parents):
        if depth == 1 and tagged:
            kind = next(m for m in tagged if any(part in typing.get_args(h) for h in typing.get_type_hints(m).values()))
            continue
        members = dataclasses_in(typing.get_type_hints(kind, include_extras=True).get(part))
        tagged = members if depth == 0 and part in TAGGED else []
        kind = members[0]
    return kind
