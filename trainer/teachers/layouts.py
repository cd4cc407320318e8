"""Published checkpoints by the patterns of their keys: which method, which backbone, which head.

    MSN        target_encoder (module.: a ViT's names, fc.fc1 ... fc3), prototypes
    DINO       teacher, student (module.): backbone..., head.mlp.N, head.last_layer.weight_g and _v
    iBOT       the same, and head.last_layer2 as another name of last_layer
    SSLight    state_dict: module.{student,teacher} or {encoder_q,encoder_k} or network: backbone..., head...
    SwAV       flat or state_dict (module.): torchvision's names, projection_head.N, prototypes.weight
    DeepCluster-v2  the same, with prototypes.prototypes0.weight, 1, 2; we take the first
    backbone   flat or state_dict: a network's names only; there is no head then
source: the repositories' own code; spec of issue 7, section 6
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import published
from trainer.methods.frozen import Frozen
from trainer.models.backbones import Backbone
from trainer.models.heads import FrozenHead
from trainer.pickles import PickleError, load_without_code
from trainer.teachers.heads import head_of
from trainer.teachers.networks import network_of
from trainer.weights import HeadSpec, WeightsError

STD = (0.229, 0.224, 0.225)
SWAV_STD = (0.228, 0.224, 0.225)
"""SwAV's own code divides the red channel by 0.228."""
PUBLISHED_BRANCHES = ("student.", "teacher.", "encoder_q.", "encoder_k.", "network.")
Tensors = dict[str, Tensor]


@dataclass
class Layout:
    """A branch of a file, sorted out."""

    method: str | None
    """None where there is no head."""
    backbone: Tensors
    head: Tensors
    """mlp.N..., and last_layer... or prototypes.weight."""
    std: tuple[float, ...] = STD
    note: str = ""


def read(path: Path, config: Frozen) -> tuple[nn.Module, FrozenHead | None, tuple[float, ...], str]:
    """The network and head of a checkpoint, what its pixels were divided by, and what to say of it.

    raises: WeightsError if it is no layout that we know, or not all of its tensors fit
    """
    try:
        tree, _ = load_without_code(path)
    except PickleError as error:
        raise WeightsError(f"teacher.source: {error}") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{path}: wanted a dict of tensors, got {type(tree).__name__}")
    flat = _strip(_tensors(tree.get("state_dict", tree)))
    if any(name.startswith(PUBLISHED_BRANCHES) and ".backbone." in name for name in flat):
        return _sslight(path, config)
    layout = _recognise(tree, flat, config, path)
    network = network_of(layout.backbone, config, f"{path}: backbone")
    head = None if layout.method is None else head_of(HeadSpec(layout.method), layout.head, str(path))
    return network, head, layout.std, f"{path}, {layout.method or 'a backbone'}{layout.note}"


def _recognise(tree: dict[str, Any], flat: Tensors, config: Frozen, path: Path) -> Layout:
    if "target_encoder" in tree:
        return _msn(tree, path)
    if any(isinstance(tree.get(branch), dict) for branch in ("teacher", "student")):
        return _dino(tree, config, path)
    if any(name.startswith(("projection_head.", "prototypes.")) for name in flat):
        return _swav(flat, path)
    flat.pop("mask_token", None)  # DINOv2's
    if flat:
        return Layout(None, flat, {})
    came = ", ".join(str(key) for key in list(tree)[:6]) or "nothing"
    raise WeightsError(
        f"{path}: wanted a checkpoint of DINO, iBOT, MSN, SwAV or SSLight, or a backbone's tensors; its top level has "
        f"{came}"
    )


def _msn(tree: dict[str, Any], path: Path) -> Layout:
    encoder, prototypes = _strip(_tensors(tree["target_encoder"])), tree.get("prototypes")
    names = {"fc1": "0", "bn1": "1", "fc2": "3", "bn2": "4", "fc3": "6"}
    head: Tensors = {}
    for name in [name for name in encoder if name.startswith("fc.")]:
        layer, _, rest = name.removeprefix("fc.").partition(".")
        head[f"mlp.{names.get(layer, layer)}.{rest}"] = encoder.pop(name)
    if not head:
        raise WeightsError(f"{path}: MSN's target_encoder has no head fc.fc1 ... fc.fc3; wanted the full checkpoint")
    if isinstance(prototypes, Tensor):
        head["prototypes.weight"] = prototypes
    return Layout("msn", encoder, head)


def _dino(tree: dict[str, Any], config: Frozen, path: Path) -> Layout:
    branch = config.branch or ("teacher" if "teacher" in tree else "student")
    if not isinstance(tree.get(branch), dict):
        raise WeightsError(f"{path}: has no {branch}; set teacher.branch to teacher or student, whichever it has")
    state = _strip(_tensors(tree[branch]))
    state = {_old_name(name.removeprefix("backbone.")): value for name, value in state.items()}
    state.pop("masked_embed", None)  # an iBOT student's mask token, for which a teacher has no use
    head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    backbone = {name: value for name, value in state.items() if not name.startswith("head.")}
    is_ibot = "ibot_loss" in tree or any(name.startswith("last_layer2.") for name in head)
    _drop_alias(head, path)
    method = "ibot" if is_ibot else "dino"
    return Layout(method if head else None, backbone, head, note=f"'s {branch}")


def _old_name(name: str) -> str:
    """DINO's first uploads called the head's parts otherwise (issues 30 and 65 of its repository)."""
    return re.sub(
        r"^(head\.)?prototypes\.", "head.last_layer.", re.sub(r"^(head\.)?projection_head\.", "head.mlp.", name)
    )


def _drop_alias(head: Tensors, path: Path) -> None:
    """iBOT's shared head stands in the file twice; one that is not shared would need two sets of prototypes."""
    for name in [name for name in head if name.startswith("last_layer2.")]:
        other = name.replace("last_layer2.", "last_layer.")
        if other not in head or not torch.equal(head[other], head[name]):
            raise WeightsError(
                f"{path}: {name} is not {other}: its head for patches is another than that for the class token; wanted "
                "a checkpoint with a shared head, as the published ones are"
            )
        del head[name]


def _swav(flat: Tensors, path: Path) -> Layout:
    head = {re.sub(r"^projection_head\.(?=\D)", "mlp.0.", name): value for name, value in flat.items()}
    head = {name.replace("projection_head.", "mlp."): value for name, value in head.items()}
    backbone = {name: value for name, value in head.items() if not name.startswith(("mlp.", "prototypes."))}
    head = {name: value for name, value in head.items() if name not in backbone}
    several = [name for name in head if re.fullmatch(r"prototypes\.prototypes\d+\.weight", name)]
    note = ""
    if several:
        first = head["prototypes.prototypes0.weight"]
        head = {name: value for name, value in head.items() if name not in several} | {"prototypes.weight": first}
        note = f", the first of {len(several)} sets of prototypes"
    if not any(name.startswith("mlp.") for name in head):
        raise WeightsError(f"{path}: prototypes without a projection_head; wanted the full checkpoint")
    return Layout("swav", backbone, head, SWAV_STD, note)


def _sslight(path: Path, config: Frozen) -> tuple[nn.Module, FrozenHead | None, tuple[float, ...], str]:
    checkpoint = published.read(path)
    names = list(checkpoint.backbones)
    branch = config.branch or ("teacher" if "teacher" in names else names[0])
    if branch not in names:
        raise WeightsError(f"{path}: has {', '.join(names)}, no {branch}; set teacher.branch")
    state = checkpoint.backbones[branch]
    name = config.name or published.recognise(path, state)
    spec = Backbone(name=name, init="timm", args=published.BACKBONES.get(name, {}) | config.args)
    network = published.fill(spec, state, f"{path}: {branch}")
    head = head_of(HeadSpec(checkpoint.method), checkpoint.heads[branch], f"{path}: {branch}")
    return network, head, published.STD, f"{path}, SSLight's {checkpoint.method}, {branch}"


def _tensors(tree: Any) -> Tensors:
    """The tensors of a dict; none if it is something else."""
    found: Mapping[Any, Any] = tree if isinstance(tree, dict) else {}
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _strip(state: Tensors) -> Tensors:
    """Without the `module.` of DistributedDataParallel."""
    return {name.removeprefix("module."): value for name, value in state.items()}
