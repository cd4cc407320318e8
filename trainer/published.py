"""Checkpoints in the layout of the published SSLight code: read into weights folders of ours, and written from them.

Such a file is a dict with `state_dict` (prefixed `module.`), `epoch`, `steps`, and what we leave out: `config`,
`optimizer`, DINO's `loss` with the centre. In the state_dict a branch has `BRANCH.backbone.[encoder.]...` and
`BRANCH.head...`; beside the branches lie `classifier` (the joint probe), `queue` and `queue_ptr`. The names of a CNN's
tensors are torchvision's, in timm's order; those of a ViT are timm's.
source: SSLight engine/trainer.py save_checkpoint, classification/utils/load_pretrained_models.py
"""

import json
import logging
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from trainer import distributed, weights
from trainer.models.backbones import Backbone, build_backbone
from trainer.pickles import PickleError, load_without_code
from trainer.recipe_file import load_recipe
from trainer.run_dir import write_json
from trainer.weights import WeightsError

log = logging.getLogger(__name__)

METHODS = {
    "dino": {"student": "student", "teacher": "teacher"},
    "moco": {"student": "encoder_q", "teacher": "encoder_k"},
    "swav": {"student": "network"},
}
"""What the published code calls our branches."""

BACKBONES: dict[str, dict[str, Any]] = {
    "mobilenetv2_100": {},
    "resnet18": {},
    "resnet34": {},
    "resnet50": {},
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
    "vit_small_patch16_224": {"dynamic_img_size": True},
    "vit_base_patch16_224": {"dynamic_img_size": True},
}
"""The published networks as timm names them, and the arguments with which they take the published views."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCE = "source.json"
"""Stands beside imported weights and says where they came from."""


@dataclass
class Checkpoint:
    """What we use of a published checkpoint."""

    method: str
    epoch: int | None
    steps: int | None
    backbones: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By our name of the branch; keys as in the file, in its order, without the branch's prefix."""
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def import_weights(source: Path, folder: Path, backbone: str | None = None) -> None:
    """Write the branches of a published checkpoint as folder/student and, if there is one, folder/teacher.

    backbone: the timm name; without it the published network that every tensor fits
    raises: WeightsError if the file is none, or a tensor has no place or the wrong shape; nothing is written then
    """
    if folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder}: wanted a new or empty folder for the weights; give another, or remove it")
    checkpoint = read(source)
    name = backbone or recognise(source, checkpoint.backbones["student"])
    spec = Backbone(name=name, init="timm", args=BACKBONES.get(name, {}))
    networks = {branch: fill(spec, state, f"{source}: {branch}") for branch, state in checkpoint.backbones.items()}
    for branch, network in networks.items():
        weights.save_backbone(folder / branch, network, spec, size=224, mean=MEAN, std=STD)
        weights.save_head(folder / branch, checkpoint.heads[branch], weights.HeadSpec(checkpoint.method))
    origin = {"file": source.name, "sha256": weights.sha256(source)}
    facts = {name: getattr(checkpoint, name) for name in ("method", "epoch", "steps", "left_out")}
    write_json(folder / SOURCE, origin | facts)
    log.info("%s: %s, %s, %s epochs", source, checkpoint.method, name, checkpoint.epoch)
    log.info(
        "written to %s: %s; left out: %s", folder, ", ".join(networks), ", ".join(checkpoint.left_out) or "nothing"
    )


def as_folder(source: Path) -> Path:
    """What to evaluate: a published checkpoint's file is imported once, into a folder beside it."""
    if not source.is_file():
        return source
    folder = source.with_name(f"{source.name.split('.')[0]}.weights")
    if distributed.is_main() and not (folder / SOURCE).is_file():
        import_weights(source, folder)
    distributed.barrier()
    return folder


def read(path: Path) -> Checkpoint:
    """The branches of a published checkpoint; no code of the file runs.

    raises: WeightsError if it is no such file, or holds tensors that we do not know
    """
    try:
        tree, classes = load_without_code(path)
    except PickleError as error:
        raise WeightsError(str(error)) from error
    state = tree.get("state_dict") if isinstance(tree, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: wanted a dict with a `state_dict` of tensors, as the published code writes")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    method, ours = _method(path, state)
    epoch, steps = (tree[name] if isinstance(tree.get(name), int) else None for name in ("epoch", "steps"))
    checkpoint = Checkpoint(method, epoch, steps, left_out=sorted(set(tree) - {"state_dict", "epoch", "steps"}))
    for key, value in state.items():
        branch, _, rest = key.partition(".")
        if branch in ours and rest.startswith("backbone."):
            name = rest.removeprefix("backbone.").removeprefix("encoder.")
            checkpoint.backbones.setdefault(ours[branch], {})[name] = value
        elif branch in ours and rest.startswith("head."):
            name = rest.removeprefix("head.").removeprefix("projection.")  # SwAV's prototypes stand beside it
            checkpoint.heads.setdefault(ours[branch], {})[name] = value
        elif key in ("classifier.weight", "classifier.bias", "queue", "queue_ptr"):
            checkpoint.left_out.append(key)
        else:
            raise WeightsError(f"{path}: {key} has no place; wanted {_wanted()} with backbone and head")
    if set(checkpoint.heads) != set(checkpoint.backbones):
        raise WeightsError(f"{path}: heads of {sorted(checkpoint.heads)}, backbones of {sorted(checkpoint.backbones)}")
    if classes:
        log.info("%s: objects of %s stand in the file and were not made", path, ", ".join(sorted(classes)))
    return checkpoint


def _method(path: Path, state: dict[str, Tensor]) -> tuple[str, dict[str, str]]:
    """The method whose branches the file has, all of them and no others, and our names of them."""
    found = {match[1] for key in state if (match := re.match(r"(.*?)\.backbone\.", key))}
    for method, names in METHODS.items():
        if found == set(names.values()):
            return method, {theirs: ours for ours, theirs in names.items()}
    came = ", ".join(sorted(found)) or "no backbone; " + ", ".join(sorted({key.partition(".")[0] for key in state}))
    raise WeightsError(f"{path}: wanted {_wanted()}, each with a `backbone`; the file has {came}")


def _wanted() -> str:
    return " or ".join(f"{' + '.join(names.values())} ({method})" for method, names in METHODS.items())


def recognise(path: Path, state: dict[str, Tensor]) -> str:
    """The one published network that every tensor of a backbone fits; WeightsError if there is none."""
    fitting = [name for name in BACKBONES if fault(_expected(name), state) is None]
    if len(fitting) != 1:
        known = ", ".join(f"{name} ({len(_expected(name))})" for name in BACKBONES)
        raise WeightsError(
            f"{path}: its {len(state)} backbone tensors fit none of {known}; name the network with --backbone (of a "
            "teacher: teacher.name), which then says what does not fit"
        )
    return fitting[0]


@cache
def _expected(name: str) -> dict[str, Tensor]:
    """Names and shapes of a published network's tensors, without their memory."""
    with torch.device("meta"):
        return build_backbone(Backbone(name=name, init="timm", args=BACKBONES[name])).state_dict()


def fill(spec: Backbone, state: dict[str, Tensor], where: str) -> nn.Module:
    """The timm network with the tensors of `state`, matched by position; every one must fit."""
    network = build_backbone(spec)
    problem = fault(network.state_dict(), state)
    if problem:
        raise WeightsError(f"{where}: does not fit {spec.name}: {problem}")
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network


def fault(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
    """The first tensor of `state` that is not what stands at its position in `expected`.

    By position weight and running_var of a norm could change places unseen, so the last part of the name counts too;
    variances below 0 and values that are not finite give other mix-ups away.
    """
    counts = "" if len(expected) == len(state) else f"wanted {len(expected)} tensors, got {len(state)}; "
    for place, (ours, theirs) in enumerate(zip_longest(expected, state)):
        if ours is None or theirs is None:
            return f"{counts}the first without a partner is {ours or theirs}"
        value, shape = state[theirs], tuple(expected[ours].shape)
        if tuple(value.shape) != shape or value.dtype != expected[ours].dtype:
            came = f"{tuple(value.shape)} {value.dtype}"
            return f"{counts}tensor {place}: wanted {ours} {shape} {expected[ours].dtype}, got {theirs} {came}"
        if theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            return f"{counts}tensor {place}: wanted {ours}, got {theirs}"
        if not bool(value.isfinite().all()) or (ours.endswith("running_var") and bool((value < 0).any())):
            return f"{counts}tensor {place}: {theirs} holds values that are not finite, or variances below 0"
    return None


def export(source: Path, file: Path) -> None:
    """Write a run's or weights folder's branches as a checkpoint that the published loaders read.

    Those loaders filter by prefix and then map by position; names, order and prefixes are the published ones, so that
    loading by name works too. It holds config (ours, as plain values), epoch, steps and state_dict; no optimizer.
    raises: WeightsError if there are no weights, or the published code does not know the network
    """
    method, facts = _describe(source)
    root = source / "weights" if (source / "weights").is_dir() else source
    state: dict[str, Tensor] = {}
    for ours, theirs in METHODS[method].items():
        network, config = weights.load_backbone(root / ours)
        prefix = f"module.{theirs}."
        names = published_names(config["architecture"], network)
        tensors = network.state_dict().values()
        state |= {f"{prefix}backbone.{name}": value for name, value in zip(names, tensors, strict=True)}
        nested = "projection." if method == "swav" else ""
        for name, value in weights.load_head(root / ours).items():
            state[f"{prefix}head.{nested if name.startswith('mlp.') else ''}{name}"] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    torch.save({**facts, "state_dict": OrderedDict(state)}, temporary)
    temporary.replace(file)
    log.info("written to %s: %s", file, ", ".join(f"module.{theirs}" for theirs in METHODS[method].values()))


def _describe(source: Path) -> tuple[str, dict[str, Any]]:
    """The method of a run or of imported weights, and what else goes into the file."""
    if (source / "resolved.yaml").is_file():
        recipe = load_recipe(source / "resolved.yaml")
        name, latest = recipe.method.name, source / "checkpoints/latest"
        steps = int(latest.read_text(encoding="utf-8").strip().removeprefix("step_")) if latest.is_file() else None
        facts: dict[str, Any] = {"config": recipe.plain(), "epoch": None, "steps": steps}
    elif (source / SOURCE).is_file():
        origin = json.loads((source / SOURCE).read_text(encoding="utf-8"))
        name, facts = origin["method"], {"config": origin, "epoch": origin["epoch"], "steps": origin["steps"]}
    else:
        raise WeightsError(f"{source}: wanted the run.dir of a `trainer pretrain`, or what `import-weights` wrote")
    if name not in METHODS:
        raise WeightsError(f"{source}: the published code has {', '.join(METHODS)}, and this was trained by {name}")
    return name, facts


def published_names(name: str, network: nn.Module) -> list[str]:
    """What the published code calls the tensors of a timm network, in their order, below `backbone.`."""
    if name not in BACKBONES:
        raise WeightsError(f"the published code knows {', '.join(BACKBONES)}, not {name}")
    if name.startswith("vit"):
        return list(network.state_dict())
    with torch.device("meta"):
        if name == "mobilenetv2_100":
            encoder: nn.Module = torchvision.models.mobilenet_v2().features
        else:
            encoder = nn.Sequential(*list(getattr(torchvision.models, name)().children())[:-2])
    problem = fault(encoder.state_dict(), network.state_dict())
    if problem:
        raise WeightsError(f"the published code's {name} has other tensors than this one: {problem}")
    return [f"encoder.{key}" for key in encoder.state_dict()]
