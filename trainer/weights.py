"""Backbone weights as timm loads them: a folder with model.safetensors and config.json (`local-dir:` in timm)."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import distributed
from trainer.methods.joint_embedding import Method
from trainer.methods.teacher import EMATeacher
from trainer.models.backbones import Backbone, build_backbone, num_features
from trainer.recipe import Recipe
from trainer.run_dir import write_json

MODEL, CONFIG = "model.safetensors", "config.json"


class WeightsError(ValueError):
    """Weights that are not what they were taken for."""


def save(run_dir: Path, recipe: Recipe, method: Method, teacher: EMATeacher | None) -> None:
    """Write weights/student and weights/teacher; `timm.create_model("local-dir:...")` loads either."""
    if not distributed.is_main():
        return
    branches = {"student": method.student} | ({} if teacher is None else {"teacher": teacher.branch})
    for name, branch in branches.items():
        save_backbone(run_dir / "weights" / name, branch.backbone, recipe)


def save_backbone(folder: Path, network: nn.Module, recipe: Recipe) -> None:
    """Write one backbone in fp32, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    temporary = folder / f".{MODEL}.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(folder / MODEL)
    write_json(folder / CONFIG, _timm_config(network, recipe))


def _timm_config(network: nn.Module, recipe: Recipe) -> dict[str, Any]:
    size = recipe.views.global_views.size
    return {
        "architecture": recipe.backbone.name,
        "num_classes": 0,
        "num_features": num_features(network),
        "model_args": recipe.backbone.args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(recipe.views.mean),
            "std": list(recipe.views.std),
            "interpolation": "bicubic",
            "num_classes": 0,
        },
    }


def load_backbone(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a weights folder, and its timm config; every key must fit.

    raises: WeightsError if the folder is none, or its tensors and its architecture differ
    """
    for name in (MODEL, CONFIG):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder}: no {name}; wanted a folder such as runs/NAME/weights/student")
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    spec = Backbone(name=config["architecture"], init="timm", args=config.get("model_args", {}))
    network = build_backbone(spec)
    state: dict[str, Tensor] = load_file(folder / MODEL)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if missing or unexpected:
        odd = f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        raise WeightsError(f"{folder}: its tensors do not fit {spec.name} {spec.args}: {odd}")
    return network, config
