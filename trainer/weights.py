"""Backbone weights as timm loads them: a folder with model.safetensors and config.json (`local-dir:` in timm)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.models.backbones import Backbone, build_backbone, num_features
from trainer.models.gates import Gates
from trainer.models.gating import always_hard, dense_state, is_gated
from trainer.models.heads import PlainMLP
from trainer.models.slicing import first_channels, narrow
from trainer.recipe import Recipe
from trainer.run_dir import write_json
from trainer.run_state import RunState

MODEL, HEAD, PROBE, CONFIG = "model.safetensors", "head.safetensors", "probe.safetensors", "config.json"


class WeightsError(ValueError):
    """Weights that are not what they were taken for."""


@dataclass(frozen=True)
class HeadSpec:
    """What the tensors of a projection head do not show."""

    method: str
    mlp_head: PlainMLP | None = None
    """Which stood in the place of the method's own head."""


def save(run_dir: Path, recipe: Recipe, state: RunState, *, num_features: int) -> None:
    """Write weights/student and weights/teacher of a checkpoint; `timm.create_model("local-dir:...")` loads either.

    The student of a gated run is its dense network; weights/gated has gates and both sets of norms, for us alone.
    The joint probe, where there is one, lies beside the student.
    """
    views, teacher = recipe.views, state.teacher()
    method = state.method()
    prototypes = {f"head.{name}": value for name, value in method.items() if name.startswith("prototypes.")}
    branches = {"student": _under("student.", method) | prototypes}
    if teacher is not None:
        branches["teacher"] = _under("branch.", teacher) | prototypes
    config = _config(recipe.backbone, num_features, size=views.global_views.size, mean=views.mean, std=views.std)
    for name, branch in branches.items():
        folder = run_dir / "weights" / name
        _save_network(folder, dense_state(_under("backbone.", branch)), config)
        spec = HeadSpec(recipe.method.name, getattr(recipe.method, "mlp_head", None))
        save_head(folder, _under("head.", branch), spec)
    if recipe.probe:
        _save_tensors(run_dir / "weights/student" / PROBE, _under("probe.", method))
    if recipe.backbone.gates is not None:
        gates = {"gates": dataclasses.asdict(recipe.backbone.gates)}
        _save_network(run_dir / "weights" / "gated", _under("backbone.", branches["student"]), config | gates)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def save_backbone(
    folder: Path, network: nn.Module, spec: Backbone, *, size: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write one backbone in fp32, each file whole or not at all."""
    _save_network(folder, network.state_dict(), _config(spec, num_features(network), size=size, mean=mean, std=std))


def save_sliced(folder: Path, network: nn.Module, like: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    """Write a sliced network with its widths; timm's own architecture is wider, so `load_backbone` reads it back.

    like: the config of the gated network that it was cut from
    """
    config = {key: value for key, value in like.items() if key != "gates"}
    _save_network(folder, network.state_dict(), config | {"widths": dict(widths)})


def _save_network(folder: Path, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(folder / MODEL, state)
    write_json(folder / CONFIG, config)


def _config(
    spec: Backbone, num_features: int, *, size: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """What timm reads beside the weights."""
    return {
        "architecture": spec.name,
        "num_classes": 0,
        "num_features": num_features,
        "model_args": spec.args,
        "pos_embed": spec.pos_embed,  # ours, as the next two; timm passes over them
        "stem": spec.stem,
        "inner_width": spec.inner_width,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "num_classes": 0,
        },
    }


def save_head(folder: Path, state: Mapping[str, Tensor], spec: HeadSpec) -> None:
    """Write a branch's projection head beside its backbone, where timm does not look."""
    plain = json.dumps(None if spec.mlp_head is None else dataclasses.asdict(spec.mlp_head))
    facts = {"order": json.dumps(list(state)), "method": spec.method, "mlp_head": plain}
    _save_tensors(folder / HEAD, state, facts)


def load_head(folder: Path) -> dict[str, Tensor]:
    """The projection head's tensors in the module's order, which the file's own is not; none if it was not kept.

    raises: WeightsError if another program wrote the file
    """
    if not (folder / HEAD).is_file():
        return {}
    with _damage_named(folder / HEAD), safe_open(folder / HEAD, framework="pt") as file:
        order = (file.metadata() or {}).get("order")
        if order is None:
            raise WeightsError(
                f"{folder / HEAD}: wanted a projection head as a run writes it, with its tensors' order beside them, "
                "and there is none; take the run's own file, or remove this one to go without a head"
            )
        return {key: file.get_tensor(key) for key in json.loads(order)}


def spec_of_head(folder: Path) -> HeadSpec | None:
    """What the folder's head is; None if there is none, or one of the time before heads said so."""
    if not (folder / HEAD).is_file():
        return None
    with _damage_named(folder / HEAD), safe_open(folder / HEAD, framework="pt") as file:
        facts = file.metadata() or {}
    plain = json.loads(facts.get("mlp_head", "null"))
    return HeadSpec(facts["method"], plain and PlainMLP(**plain)) if "method" in facts else None


def _save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    temporary.replace(path)


def sha256(path: Path) -> str:
    """What identifies a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_backbone(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a weights folder, and its timm config; every key must fit. A gated one runs with hard gates.

    raises: WeightsError if the folder is none, or its tensors and its architecture differ
    """
    config = read_config(folder)
    network = build(config)
    where = f"{folder}: {config['architecture']} {config.get('model_args', {})}"
    load_strictly(network, read_tensors(folder / MODEL), where)
    if is_gated(network):
        always_hard(network)
    return network, config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; WeightsError if it is damaged."""
    with _damage_named(path):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """safetensors' own error does not say which file."""
    try:
        yield
    except SafetensorError as error:
        raise WeightsError(f"{path}: wanted safetensors, got a damaged file ({error}); copy it anew") from None


def build(config: dict[str, Any], *, init: Literal["reference", "timm"] = "timm") -> nn.Module:
    """The freshly initialised network that a weights folder's config describes, as narrow as it says."""
    network = build_backbone(dataclasses.replace(spec_of(config), init=init))
    if "widths" in config:
        narrow(network, first_channels(network, config["widths"]))
    return network


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give the module its tensors, each by name and shape, none missing and none left over.

    raises: WeightsError that names the first few that do not fit
    """
    expected = module.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, wanted {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    found = [f"{kind}: {_first_few(names)}" for kind, names in faults.items() if names]
    if found:
        raise WeightsError(f"{where}: the tensors do not fit; {'; '.join(found)}")
    module.load_state_dict(dict(state))


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def normalisation(folder: Path, config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels that the network was trained with; WeightsError if its config says none."""
    usual = config.get("pretrained_cfg", {})
    for name in ("mean", "std"):
        if name not in usual:
            raise WeightsError(
                f"{folder}: {CONFIG} says no pretrained_cfg.{name}; write there what the network was trained with"
            )
    return tuple(usual["mean"]), tuple(usual["std"])


def read_config(folder: Path) -> dict[str, Any]:
    """A weights folder's timm config; WeightsError if the folder is none."""
    for name in (MODEL, CONFIG):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder}: no {name}; wanted a folder such as runs/NAME/weights/student")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WeightsError(f"{folder / CONFIG}: wanted JSON, got a damaged file ({error}); copy it anew") from None
    return config


def spec_of(config: dict[str, Any]) -> Backbone:
    """The backbone that a weights folder's config describes; timm's own folders resample positions as timm does."""
    return Backbone(
        name=config["architecture"],
        init="timm",
        pos_embed=config.get("pos_embed", "timm"),
        stem=config.get("stem", "timm"),
        inner_width=config.get("inner_width", 1.0),
        args=config.get("model_args", {}),
        gates=Gates(**config["gates"]) if "gates" in config else None,
    )
