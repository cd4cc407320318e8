"""Prototypes for a teacher that came without: directions around which its features of train images gather."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from data_prep.schema import open_beton
from trainer import distributed
from trainer.data.loader import ViewLoader
from trainer.data.photometric import to_float
from trainer.data.subset import read_subset
from trainer.data.views import CenterView
from trainer.methods.frozen import Fit, Frozen, FrozenTeacher, digest_of
from trainer.recipe import Recipe, RecipeError

log = logging.getLogger(__name__)
FILE = "teacher_prototypes.safetensors"
"""In the run directory, so that whoever continues the run has the same."""
ROWS = 8192
"""Features that are compared with all prototypes at once."""


def check_count(recipe: Recipe) -> None:
    """Whether there are images enough for the prototypes that shall be fitted; RecipeError if not."""
    settings = recipe.teacher.prototypes if isinstance(recipe.teacher, Frozen) else None
    if settings is not None and len(_chosen(recipe, settings)) < settings.count:
        raise RecipeError(
            f"teacher.prototypes.count {settings.count} needs as many images, and there are "
            f"{len(_chosen(recipe, settings))}; lower it together with method.num_prototypes"
        )


@torch.no_grad()
def give_prototypes(recipe: Recipe, teacher: FrozenTeacher, device: torch.device) -> None:
    """Fit the prototypes that the recipe asks for, or take those that the run fitted before; all ranks call it."""
    config = recipe.teacher
    assert isinstance(config, Frozen)
    if config.prototypes is None:
        return
    assert teacher.head.prototypes is not None
    path = recipe.run.dir / FILE
    made_of = _made_of(recipe, teacher)
    found = distributed.from_main(_read(path, made_of) if distributed.is_main() else None)
    if found is None:
        features = _features(recipe, config.prototypes, teacher, device)
        if distributed.is_main():
            found, similarity = fit(features, config.prototypes)
            _write(path, found.cpu(), made_of)
            log.info(
                "fitted %d prototypes to %d images, mean cosine %.4f: %s", len(found), len(features), similarity, path
            )
        found = distributed.from_main(None if found is None else found.cpu())
    assert found is not None
    teacher.head.prototypes.copy_(found)


def fit(features: Tensor, settings: Fit) -> tuple[Tensor, float]:
    """Spherical k-means: (N, D) unit features -> (K, D) unit prototypes, and the mean cosine of features with theirs.

    They start as k-means++ has it; one that no feature is nearest to moves to one of those that fit worst.
    source: Dhillon and Modha, Concept decompositions for large sparse text data using clustering, 2001
    """
    prototypes = _spread(features, settings)
    for _ in range(settings.iterations):
        cosines, nearest = _nearest(features, prototypes)
        sums = torch.zeros_like(prototypes).index_add_(0, nearest, features)
        counts = torch.bincount(nearest, minlength=settings.count)
        empty = (counts == 0).nonzero().flatten()
        sums[empty] = features[cosines.argsort(stable=True)[: len(empty)]]
        prototypes = F.normalize(sums, dim=1)
    return prototypes, float(_nearest(features, prototypes)[0].mean())


def _spread(features: Tensor, settings: Fit) -> Tensor:
    """K of the features, each drawn with a probability that grows with its distance from those drawn before.

    source: Arthur and Vassilvitskii, k-means++, 2007, with 1 - cos, half the squared distance of unit vectors
    """
    words = np.random.Philox(key=np.array([settings.seed, 1], dtype=np.uint64)).random_raw(settings.count)
    draws = (words >> np.uint64(11)) * 2.0**-53
    distances = torch.ones(len(features), dtype=torch.float64, device=features.device)
    chosen = torch.empty(settings.count, dtype=torch.long, device=features.device)
    for number, draw in enumerate(draws.tolist()):
        total = distances.cumsum(0)
        chosen[number] = torch.searchsorted(total, draw * total[-1:])[0].clamp(max=len(features) - 1)
        distances = distances.minimum((1 - features @ features[chosen[number]]).clamp(min=0).double())
    return features[chosen]


def _nearest(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) cosine with the nearest prototype, and which it is."""
    parts = [(features[i : i + ROWS] @ prototypes.T).max(dim=1) for i in range(0, len(features), ROWS)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _features(recipe: Recipe, settings: Fit, teacher: FrozenTeacher, device: torch.device) -> Tensor:
    """The teacher's unit embeddings of the chosen images' centres, each once, in the order of their ids: (N, D)."""
    views, data = recipe.views, recipe.data
    size = views.global_views.size
    loader = ViewLoader(
        Path(data.train), [CenterView(size=size, resize=round(size * 8 / 7))], batch_size=recipe.evals.knn.batch_size,
        rank=distributed.rank(), world=distributed.world(), num_workers=data.num_workers,
        subset=_chosen(recipe, settings), shuffle=False, drop_last=False, on_bad_image=data.on_bad_image,
        resize=views.resize, colour=views.colour,
    )  # fmt: skip
    rows, ids = [torch.zeros(0, _num_columns(teacher))], [torch.zeros(0, dtype=torch.long)]
    for batch in loader.epoch(0):
        embeddings = teacher.embed([to_float(batch.views[0], device, views.mean, views.std)])
        rows.append((embeddings[:, 0] if teacher.tokens else embeddings).cpu())
        ids.append(batch.sample_ids.clone())
    loader.close()
    every = distributed.gather_rows(torch.cat(rows).to(device))
    return every[distributed.gather_rows(torch.cat(ids).to(device)).argsort(stable=True)]


def _num_columns(teacher: FrozenTeacher) -> int:
    """D, of the prototypes that are to be fitted."""
    assert teacher.head.prototypes is not None
    return teacher.head.prototypes.shape[1]


def _chosen(recipe: Recipe, settings: Fit) -> list[int]:
    """Which images: of data.subset, if there is one, so many of the settings' seed."""
    every = read_subset(recipe.data.train, recipe.data.subset) or range(open_beton(recipe.data.train).num_samples)
    if settings.num_images == 0:
        return list(every)
    return sorted(every[place] for place in _drawn(len(every), settings.num_images, seed=settings.seed, draw=0))


def _drawn(total: int, count: int, *, seed: int, draw: int) -> NDArray[np.int64]:
    """So many different numbers below `total`, the same in every numpy."""
    words = np.random.Philox(key=np.array([seed, draw], dtype=np.uint64)).random_raw(total)
    return np.argsort(words, kind="stable")[:count].astype(np.int64)


def _made_of(recipe: Recipe, teacher: FrozenTeacher) -> str:
    """What decides about fitted prototypes: teacher, settings and images."""
    assert isinstance(recipe.teacher, Frozen)
    assert teacher.head.prototypes is not None
    teacher.head.prototypes.zero_()  # as they are before they are fitted
    data = [str(recipe.data.train), open_beton(recipe.data.train).num_samples, str(recipe.data.subset)]
    return json.dumps([digest_of(teacher), str(recipe.teacher.prototypes), data])


def _read(path: Path, made_of: str) -> Tensor | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        if file.metadata().get("made_of") != made_of:
            return None
        found: Tensor = file.get_tensor("prototypes")
        return found


def _write(path: Path, prototypes: Tensor, made_of: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"prototypes": prototypes.contiguous()}, temporary, metadata={"made_of": made_of})
    temporary.replace(path)
