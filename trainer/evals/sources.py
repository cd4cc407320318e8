"""What can be evaluated: a run of ours, a weights folder, a timm network; always beside what it must beat."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from data_prep.schema import read_manifest
from trainer import weights
from trainer.assemble import build_method
from trainer.evals.features import Pixels
from trainer.evals.resumable import Resumable
from trainer.generators import seed_everything
from trainer.models.backbones import Backbone, build_backbone, check_sizes
from trainer.recipe import Evaluation, Recipe, RecipeError
from trainer.recipe_file import load_evaluation, load_recipe, read_yaml

REFERENCES = ("pixels", "untrained")
"""What a trained network must beat."""
Results = dict[str, dict[str, float]]
"""network -> measure -> value."""


@dataclass
class Source:
    """Networks to evaluate by name, where each came from, and where the report goes."""

    recipe: Recipe | Evaluation
    report: Path
    step: int | None
    """After how many steps of training; None where nobody knows."""
    networks: dict[str, nn.Module] = field(default_factory=lambda: {"pixels": Pixels()})
    origins: dict[str, str] = field(default_factory=lambda: {"pixels": "16 x 16 raw pixels"})
    """What identifies each network: the hash of its weights, or how it was made."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Where the weights of a network lie, and its projection head."""

    def on(self, device: torch.device) -> dict[str, nn.Module]:
        """The networks, moved to the device."""
        return {name: network.to(device) for name, network in self.networks.items()}

    @property
    def default(self) -> str:
        """The network that a protocol trains unless told: the student, or the first that was trained at all."""
        return "student" if "student" in self.networks else next(n for n in self.networks if n not in REFERENCES)

    def choose(self, names: Sequence[str]) -> None:
        """Leave these networks only.

        raises: RecipeError if one is not there
        """
        if unknown := set(names) - set(self.networks):
            raise RecipeError(f"--networks {sorted(unknown)}: wanted some of {list(self.networks)}")
        self.networks = {name: self.networks[name] for name in names}

    def data(self) -> dict[str, dict[str, Any]]:
        """What identifies the data."""
        plain = self.recipe.plain()["data"]
        return {name: _data_id(Path(plain[name])) for name in ("train", "val", "subset") if plain.get(name)}

    def resumable(self, name: str, seed: int, settings: dict[str, Any], part: str = "") -> Resumable:
        """Where a training of the protocol on one of the networks lives until the report is written.

        settings: what the report will state of the protocol; those of others make no other training
        part: names one of several trainings on the network
        """
        views = self.recipe.views
        colours = [list(views.mean), list(views.std)]
        parts = [self.report.stem, settings, colours, self.data(), self.origins[name], seed]
        path = self.report.with_name(f".{self.report.stem}-{name}{part}-{seed}.pt")
        return Resumable(path, json.dumps(parts, sort_keys=True))

    def forget_trainings(self) -> None:
        """The report is written; nothing will be resumed."""
        for path in self.report.parent.glob(f".{self.report.stem}-*.pt"):
            path.unlink()


def _data_id(path: Path) -> dict[str, Any]:
    """The file's path and size, and its hash; a beton's is the one that its manifest states."""
    manifest = read_manifest(path) if path.suffix == ".beton" else None
    sha256 = manifest.beton_sha256 if manifest else None if path.suffix == ".beton" else weights.sha256(path)
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256}


def _tag(data: Path) -> str:
    """A name for a data set that two of them never share, so that results on one do not replace those on another."""
    return f"{data.stem}-{hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:6]}"


def open_source(source: Path, protocol: str, overrides: list[str]) -> Source:
    """Whatever the user named, with the untrained network of the same architecture and raw pixels beside it.

    raises: RecipeError if it is nothing that can be evaluated; WeightsError if weights and architecture differ
    """
    if (source / "resolved.yaml").is_file():
        opened = _open_run(source, protocol, overrides)
    elif folders := sorted(path.parent for path in (*source.glob(weights.MODEL), *source.glob(f"*/{weights.MODEL}"))):
        opened = _open_weights(source, folders, protocol, overrides)
    elif timm.is_model(str(source)):
        opened = _open_timm(str(source), protocol, overrides)
    else:
        raise RecipeError(
            f"{source}: no resolved.yaml, no {weights.MODEL}, no timm network; wanted the run.dir of a `trainer "
            "pretrain`, a weights folder, or a timm name such as resnet18"
        )
    try:
        check_sizes(opened.networks["untrained"], [opened.recipe.evals.knn.size])
    except ValueError as error:
        raise RecipeError(f"{source}: {error} (or set evals.knn.size)") from error
    seed_everything(opened.recipe.seed)
    return opened


def _open_run(run_dir: Path, protocol: str, overrides: list[str]) -> Source:
    """A run's student and teacher."""
    recipe = load_recipe(run_dir / "resolved.yaml", overrides)
    folders = sorted(path.parent for path in (run_dir / "weights").glob(f"*/{weights.MODEL}"))
    if not folders:
        raise RecipeError(f"{run_dir}: no weights yet; the run has not reached its first checkpoint")
    latest = run_dir / "checkpoints" / "latest"
    if not latest.is_file():
        raise RecipeError(
            f"{run_dir}: no checkpoints/latest, which says how long the weights were trained; copy that file too, or "
            f"evaluate {run_dir / 'weights'} alone"
        )
    step = int(latest.read_text(encoding="utf-8").strip().removeprefix("step_"))
    own = read_yaml(run_dir / "resolved.yaml")["data"]["train"]
    task = protocol if str(recipe.data.train) == own else f"{protocol}-{_tag(recipe.data.train)}"
    source = Source(recipe, run_dir / "evals" / f"{task}-{step:07d}.json", step)
    _add(source, "untrained", build_method(recipe).student.backbone, _untrained(recipe.seed))
    return _add_folders(source, folders)


def _open_weights(path: Path, folders: list[Path], protocol: str, overrides: list[str]) -> Source:
    """A weights folder, or a folder with several of one architecture."""
    configs = [weights.read_config(folder) for folder in folders]
    if any(config["architecture"] != configs[0]["architecture"] for config in configs):
        raise RecipeError(f"{path}: holds {[config['architecture'] for config in configs]}; name one folder of it")
    settings = load_evaluation(path, *weights.normalisation(folders[0], configs[0]), overrides)
    source = Source(settings, path / "evals" / f"{protocol}-{_tag(settings.data.train)}.json", None)
    seed_everything(settings.seed)
    _add(source, "untrained", weights.build(configs[0], init="reference"), _untrained(settings.seed))
    return _add_folders(source, folders)


def _open_timm(name: str, protocol: str, overrides: list[str]) -> Source:
    """A network with timm's own pre-trained weights."""
    usual = timm.get_pretrained_cfg(name)
    if usual is None or not usual.has_weights:
        raise RecipeError(f"{name}: timm has no weights for it; name another network, or a weights folder")
    settings = load_evaluation(Path(name), usual.mean, usual.std, overrides)
    source = Source(settings, Path("evals") / f"{protocol}-{name}-{_tag(settings.data.train)}.json", None)
    seed_everything(settings.seed)
    untrained = build_backbone(Backbone(name=name, pos_embed="timm"))
    _add(source, "untrained", untrained, _untrained(settings.seed))
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{name}: timm could not fetch its weights: {error}") from error
    _add(source, name, network, f"timm {timm.__version__}, {usual.tag}")
    return source


def _untrained(seed: int) -> str:
    return f"the same network as initialised by seed {seed}"


def _add(source: Source, name: str, network: nn.Module, origin: str) -> None:
    source.networks[name], source.origins[name] = network, origin


def _add_folders(source: Source, folders: list[Path]) -> Source:
    for folder in folders:
        _add(source, folder.name, weights.load_backbone(folder)[0], f"sha256:{weights.sha256(folder / weights.MODEL)}")
        source.folders[folder.name] = folder
    return source
