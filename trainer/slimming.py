"""`trainer slice`: from a finished gated run to an ordinary smaller network, by unlabelled images of its own."""

import copy
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed, weights
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.subset import read_subset
from trainer.data.views import CenterView
from trainer.models.backbones import build_backbone
from trainer.models.gating import cost_at
from trainer.models.macs import Cost
from trainer.models.slicing import (
    Calibration,
    at_least,
    calibrate,
    measure_norms,
    norms_behind_gates,
    slice_network,
    widths,
    within_budget,
)
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run_dir import write_json
from trainer.weights import WeightsError

log = logging.getLogger(__name__)
REPORT = "slice.json"
"""Stands beside sliced weights and says how they were cut."""
COMPARED = 1024
"""Images on which the cut network is compared with the gated one."""
EVER = 1e-12
"""A share of images below that of any open channel."""


Repair = Literal["auto", "always", "never"]
"""auto: if it brings the cut network's features nearer to those of the gated network, which decides image by image."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which channels a sliced network keeps."""

    name: Literal["safe", "threshold", "budget"]
    """safe: all that ever open; threshold: those open for such a share of images; budget: the best for such a share of
    the dense network's multiply-accumulates."""
    value: float | None = None
    multiple: int = 1
    """What widths are rounded up to."""

    def masks(self, rates: dict[str, Tensor], cost: Cost) -> dict[str, Tensor]:
        """The channels by gate. raises: ValueError if a budget is below the floor"""
        if self.name == "budget":
            assert self.value is not None
            return within_budget(rates, cost, self.value, multiple=self.multiple)
        return at_least(rates, EVER if self.value is None else self.value, multiple=self.multiple)


def parse_rule(text: str) -> Rule:
    """A rule as the command line has it. raises: WeightsError"""
    name, _, number = text.partition("=")
    wanted = f"--keep: wanted safe, threshold=SHARE or budget=SHARE, with a share in (0, 1], got {text!r}"
    if text == "safe":
        return Rule(name="safe")
    try:
        value = float(number)
    except ValueError:
        raise WeightsError(wanted) from None
    if name not in ("threshold", "budget") or not 0 < value <= 1:
        raise WeightsError(wanted)
    return Rule(name="threshold" if name == "threshold" else "budget", value=value)


def slice_run(
    run: Path, out: Path | None, rule: Rule, overrides: list[str], *, num_images: int, repair: Repair = "auto"
) -> Path:
    """Write the sliced network of a run, by default among its weights, where `evaluate RUN` finds it too.

    num_images: of data.train, drawn by the run's seed, without labels, read as k-NN reads them; fewer if it has fewer
    repair: whether to measure the statistics of every norm behind a gate anew on those images
    raises: WeightsError if the run has no gates or no weights, the folder is taken, or the budget is below the floor
    """
    recipe, source = _open(run, overrides)
    folder = out or run / "weights" / f"sliced_{rule.name}{'' if rule.value is None else f'_{rule.value:g}'}"
    if folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder}: wanted a new or empty folder for the sliced network; give another, or remove it")
    device, size = distributed.local_device(), recipe.evals.knn.size
    gated, config = weights.load_backbone(source)
    gated.to(device).eval()
    with closing(_Images(recipe, num_images, device)) as images:
        calibration, cost = calibrate(gated, images.batches()), cost_at(gated, size)
        try:
            masks = rule.masks(calibration.rates, cost)
        except ValueError as error:
            raise WeightsError(f"{run}: --keep {rule.name}={rule.value} at {size} px: {error}") from None
        plain = build_backbone(replace(weights.spec_of(config), gates=None)).to(device)
        small, repairs = _repair(slice_network(gated, plain, masks), gated, images, repair)
    weights.save_sliced(folder, small, config, widths(masks))
    parameters = {"dense": _num_parameters(plain), "sliced": _num_parameters(small)}
    facts = _report(rule, calibration, cost, widths(masks)) | {"parameters": parameters, "repair": repairs}
    origin = {"run": str(run), "gated_sha256": weights.sha256(source / weights.MODEL)}
    data = {"train": str(recipe.data.train), "images": calibration.num_images, "size": size, "seed": recipe.seed}
    write_json(folder / REPORT, origin | {"data": data} | facts)
    _say(folder, facts, data)
    return folder


def _open(run: Path, overrides: list[str]) -> tuple[Recipe, Path]:
    if not (run / "resolved.yaml").is_file():
        raise WeightsError(f"{run}: no resolved.yaml; wanted the run.dir of a `trainer pretrain` with backbone.gates")
    recipe = load_recipe(run / "resolved.yaml", overrides)
    if recipe.backbone.gates is None:
        raise WeightsError(
            f"{run}: it was trained without gates, so nothing says which channels to drop; wanted a run with "
            "backbone.gates, such as that of recipes/smoke/gated_vicreg.yaml"
        )
    folder = run / "weights" / "gated"
    if not (folder / weights.MODEL).is_file():
        raise WeightsError(f"{run}: no weights yet; the run has not reached its first checkpoint")
    return recipe, folder


class _Images:
    """Unlabelled images as k-NN reads them; the same ones every time."""

    def __init__(self, recipe: Recipe, num_images: int, device: torch.device) -> None:
        knn, data, views = recipe.evals.knn, recipe.data, recipe.views
        self.loader = ViewLoader(
            data.train, [CenterView(size=knn.size, resize=knn.resize)], batch_size=knn.batch_size, seed=recipe.seed,
            num_workers=data.num_workers, subset=read_subset(data.train, data.subset), drop_last=False,
            on_bad_image=data.on_bad_image,
        )  # fmt: skip
        self.num_images, self.to_input = num_images, partial(to_float, device=device, mean=views.mean, std=views.std)

    def batches(self, limit: int | None = None) -> Iterator[Tensor]:
        """(B, 3, S, S) each; the first `limit` images only."""
        left = self.num_images if limit is None else min(limit, self.num_images)
        for batch in self.loader.epoch(0):
            images = self.to_input(batch.views[0])[:left]
            left -= len(images)
            yield images
            if left == 0:
                return

    def close(self) -> None:
        """Free the loader's memory."""
        self.loader.close()


def _repair(cut: nn.Module, gated: nn.Module, images: _Images, repair: Repair) -> tuple[nn.Module, dict[str, Any]]:
    """The cut network, repaired or not, and how near either comes to the gated network.

    Where a cut opens for all images what was open for some, the old statistics fit no longer. Where it mostly closes,
    new ones were measured to help less, or to harm (docs/gating.md). So auto compares.
    """
    repaired = copy.deepcopy(cut)
    measure_norms(repaired, norms_behind_gates(gated), images.batches())
    wanted = _features(gated, images)
    near = {"as_cut": agreement(_features(cut, images), wanted)}
    near["repaired"] = agreement(_features(repaired, images), wanted)
    keep = repair == "always" or (repair == "auto" and near["repaired"] > near["as_cut"])
    return (repaired if keep else cut), {"asked": repair, "done": keep, "agreement": near}


@torch.no_grad()
def _features(network: nn.Module, images: _Images) -> Tensor:
    return torch.cat([network(batch) for batch in images.batches(COMPARED)])


def agreement(features: Tensor, wanted: Tensor) -> float:
    """Mean cosine of two networks' features of the same images, each about its mean: (N, D), (N, D) -> 1 if alike."""
    return float(F.cosine_similarity(features - features.mean(0), wanted - wanted.mean(0)).mean())


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _report(rule: Rule, calibration: Calibration, cost: Cost, kept: dict[str, int]) -> dict[str, Any]:
    """What was kept and what it costs; multiply-accumulates of convolutions, an image."""
    rates = torch.cat(list(calibration.rates.values()))
    sliced = int(cost.open_macs(torch.tensor(list(kept.values()))))
    return {
        "rule": asdict(rule),
        "macs": {
            "dense": cost.dense, "hard_gates": calibration.macs, "sliced": sliced,
            "hard_gates_share": calibration.macs / cost.dense, "sliced_share": sliced / cost.dense,
        },
        "channels": {
            "gated": len(rates), "kept": sum(kept.values()), "open_share": float(rates.mean()),
            "never_open": int((rates == 0).sum()), "always_open": int((rates == 1).sum()),
        },
        "widths": {
            name: {"full": len(rate), "kept": kept[name], "open_share": float(rate.mean())}
            for name, rate in calibration.rates.items()
        },
    }  # fmt: skip


def _say(folder: Path, facts: dict[str, Any], data: dict[str, Any]) -> None:
    macs, channels, parameters = facts["macs"], facts["channels"], facts["parameters"]
    log.info("open channels of %d images of %s at %d px", data["images"], data["train"], data["size"])
    log.info(
        "channels: %d of %d kept (%d never open, %d always)",
        channels["kept"], channels["gated"], channels["never_open"], channels["always_open"],
    )  # fmt: skip
    log.info(
        "multiply-accumulates: %.1f M dense, %.1f %% with hard gates, %.1f %% sliced; parameters: %.2f M dense, %.2f M",
        macs["dense"] / 1e6, 100 * macs["hard_gates_share"], 100 * macs["sliced_share"],
        parameters["dense"] / 1e6, parameters["sliced"] / 1e6,
    )  # fmt: skip
    near, done = facts["repair"]["agreement"], facts["repair"]["done"]
    log.info(
        "features agree with hard gates (cosine about the mean): %.3f as cut, %.3f with norms measured anew, %s",
        near["as_cut"], near["repaired"], "which are kept" if done else "which are not kept",
    )  # fmt: skip
    log.info("written to %s", folder)
