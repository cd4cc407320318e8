"""Finds what `teacher.source` names: a network, its head if it has one, and what it was trained to see."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from trainer import published, weights
from trainer.methods.frozen import Frozen
from trainer.models.heads import FrozenHead, PlainMLP
from trainer.recipe_file import read_yaml
from trainer.teachers import layouts
from trainer.teachers.heads import ACTIVATIONS, head_of
from trainer.weights import HeadSpec, WeightsError

Colours = tuple[float, ...]


@dataclass
class Found:
    """A teacher as its source has it."""

    backbone: nn.Module
    head: FrozenHead | None
    mean: Colours
    std: Colours
    origin: str
    """What it is, for the log."""


def find(config: Frozen) -> Found:
    """The network that the recipe's source names, wherever it lies.

    raises: WeightsError if it is not there, or not what it should be
    """
    scheme, _, place = config.source.partition(":")
    if scheme == "timm":
        return _timm(place, config)
    path = Path(place).expanduser()
    if scheme == "run":
        return _run(path, config)
    if path.is_dir():
        return _folder(path, config)
    if not path.exists():
        raise WeightsError(f"teacher.source file:{path}: no such file or folder")
    network, head, std, origin = layouts.read(path, config)
    return Found(network, head, published.MEAN, std, f"{origin}, {_describe(head)}")


def _run(run_dir: Path, config: Frozen) -> Found:
    """A run of ours: the weights of its newest checkpoint, its head as its method has it."""
    if not (run_dir / "resolved.yaml").is_file():
        raise WeightsError(
            f"teacher.source run:{run_dir}: no resolved.yaml; wanted the run.dir of a `trainer pretrain`"
        )
    folder = _choose(run_dir / "weights", config)
    method = read_yaml(run_dir / "resolved.yaml")["method"]
    plain = method.get("mlp_head")
    return _read(folder, HeadSpec(method["name"], plain and PlainMLP(**plain)))


def _folder(path: Path, config: Frozen) -> Found:
    """A weights folder, or one with several; a head in it says which method it is of."""
    folder = path if (path / weights.MODEL).is_file() else _choose(path, config)
    return _read(folder, weights.spec_of_head(folder))


def _choose(root: Path, config: Frozen) -> Path:
    """The branch that is asked for; without a word the teacher, or the only one."""
    there = sorted(path.parent.name for path in root.glob(f"*/{weights.MODEL}"))
    name = config.branch or ("teacher" if "teacher" in there or len(there) != 1 else there[0])
    if name not in there:
        what = f"has {', '.join(there)}; set teacher.branch to one of them" if there else "has no weights yet"
        raise WeightsError(f"teacher.source {config.source}: wanted the branch {name}, and {root} {what}")
    return root / name


def _read(folder: Path, spec: HeadSpec | None) -> Found:
    network, facts = weights.load_backbone(folder)
    mean, std = weights.normalisation(folder, facts)
    state = weights.load_head(folder)
    if state and spec is None:
        raise WeightsError(
            f"{folder}: {weights.HEAD} does not say which method it is of; give the run itself, run:DIR, or a copy of "
            f"the folder without {weights.HEAD} for the backbone alone"
        )
    of_network = f"{facts['architecture']} of {folder}"
    if spec is not None and spec.method not in ACTIVATIONS:
        return Found(network, None, mean, std, f"{of_network}, without a head: {spec.method}'s gives no scores")
    head = head_of(spec, state, str(folder)) if state and spec is not None else None
    return Found(network, head, mean, std, f"{of_network}, {_describe(head)}")


def _describe(head: FrozenHead | None) -> str:
    if head is None:
        return "without a head"
    return "with a head" if head.prototypes is None else f"with a head and {len(head.prototypes)} prototypes"


def _timm(name: str, config: Frozen) -> Found:
    """A network with timm's own pre-trained weights, which never have a head."""
    known = name in timm.list_pretrained() or name in timm.list_models(pretrained=True)
    usual = timm.get_pretrained_cfg(name) if known else None
    if usual is None or not usual.has_weights:
        raise WeightsError(f"teacher.source timm:{name}: timm has no weights of that name; see timm.list_pretrained()")
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, **config.args)
    except TypeError as error:
        raise WeightsError(f"teacher.args: timm's {name} refused {config.args}: {error}") from error
    except Exception as error:  # the hub's client raises what it likes: OSError, RuntimeError, errors of its own
        raise WeightsError(
            f"teacher.source timm:{name}: timm could not fetch its weights ({' '.join(str(error).split())[:300]}); "
            "fetch them where there is a network, save a weights folder, and give file:FOLDER"
        ) from error
    facts: dict[str, Any] = {"pretrained_cfg": {"mean": usual.mean, "std": usual.std}}
    mean, std = weights.normalisation(Path(name), facts)
    return Found(network, None, mean, std, f"{name}, timm {timm.__version__}, {usual.tag}, without a head")
