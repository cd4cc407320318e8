"""Whether features have collapsed: how many directions they use, how far apart they lie, which prototypes they meet."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import distributed, weights
from trainer.data.views import View
from trainer.evals.features import Features, reader_of
from trainer.evals.sources import Results, Source
from trainer.models.heads import FrozenHead
from trainer.recipe import RecipeError
from trainer.teachers.heads import HAVE_PROTOTYPES, head_of

log = logging.getLogger(__name__)

PAIR: dict[str, Any] = {"scale": (0.2, 1.0), "jitter_prob": 0.0, "gray_prob": 0.0, "blur_prob": 0.0}
"""Two such crops of an image, flipped every second time, are a positive pair; the same for every method."""


@torch.no_grad()
def run(source: Source) -> tuple[dict[str, Any], Results]:
    """Every measure for every network of the source, on the val images; labels are not needed."""
    recipe = source.recipe
    if recipe.data.val is None:
        raise RecipeError("collapse is measured on val images; give data.val=VAL.beton")
    reader = reader_of(recipe, distributed.local_device())
    networks = source.on(reader.device)
    centres = reader.features(networks, recipe.data.val)
    crop = View(size=reader.size, **PAIR)
    first, second = (reader.features(networks, recipe.data.val, view=crop, seed=recipe.seed + i) for i in range(2))
    results: Results = {}
    for name in networks:
        head = _head_of(source.folders[name]) if name in source.folders else None
        results[name] = measures(centres[name], first[name].vectors, second[name].vectors, head)
    return reader.stated() | {"scale": PAIR["scale"], "t": UNIFORMITY_T}, results


def measures(centres: Features, first: Tensor, second: Tensor, head: FrozenHead | None) -> dict[str, float]:
    """All measures of one network.

    first, second: (N, D) features of two random crops of each image
    head: the projection head, for the use of prototypes
    """
    vectors = centres.vectors
    result = {"rank_me": rank_me(vectors), "feature_std": feature_std(vectors)}
    result |= {"alignment": alignment(first, second), "uniformity": uniformity(first), "num_images": len(vectors)}
    logits = prototype_logits(vectors, head)
    return result | (prototype_use(logits) if logits is not None else {})


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the unit-length features of two views of an image: 0 if all pairs agree.

    source: Wang and Isola, arXiv 2005.10242, alpha 2
    """
    distance = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return float(distance.square().sum(1).mean())


UNIFORMITY_T = 2.0


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of unit-length features: 0 for one point, lower is more even.

    features: (N, D); of more than 8,192 rows so many are drawn, always the same
    source: Wang and Isola, arXiv 2005.10242, t 2
    """
    unit = F.normalize(drawn(features, 8192).double(), dim=1)
    return float(torch.pdist(unit).square().mul(-UNIFORMITY_T).exp().mean().log())


def drawn(features: Tensor, count: int) -> Tensor:
    """At most so many rows: betons go class by class, so their first rows know few classes."""
    if len(features) <= count:
        return features
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:count]
    return features[rows.to(features.device)]


def _head_of(folder: Path) -> FrozenHead | None:
    """The projection head beside the weights, if there is one that meets prototypes."""
    state, spec = weights.load_head(folder), weights.spec_of_head(folder)
    if state and spec is None:
        log.warning("%s: the head does not say which method it is of, so the use of prototypes is left out", folder)
    return head_of(spec, state, str(folder)) if spec is not None and spec.method in HAVE_PROTOTYPES else None


@torch.no_grad()
def prototype_logits(vectors: Tensor, head: FrozenHead | None) -> Tensor | None:
    """(N, D) features -> (N, K) scores with the head's prototypes; None for a head without any."""
    if head is None or head.prototypes is None:
        return None
    scores: Tensor = head.to(vectors.device).eval()(vectors)
    return scores


def prototype_use(logits: Tensor) -> dict[str, float]:
    """How many prototypes are the nearest of some image, in percent of those that could be, and their perplexity.

    logits: (N, K);  perplexity: exp of the entropy of the images' shares, from 1 (all meet one) to min(N, K)
    """
    counts = logits.argmax(1).bincount(minlength=logits.shape[1]).double()
    shares = counts[counts > 0] / counts.sum()
    return {
        "prototypes_used": 100 * len(shares) / min(logits.shape),
        "prototype_perplexity": float(torch.exp(-(shares * shares.log()).sum())),
    }


def rank_me(features: Tensor) -> float:
    """The effective number of directions: exp of the entropy of the normalised singular values, in [1, min(N, D)].

    features: (N, D), not centred; of more than 25,600 rows, which the paper takes, so many are drawn, always the same
    source: RankMe, arXiv 2210.02885, equation 1
    """
    values = torch.linalg.svdvals(drawn(features, 25_600).double())
    shares = values / values.sum() + 1e-7  # epsilon as in the paper
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: Tensor) -> float:
    """Standard deviation of unit-length features, times sqrt(D): 1 if they spread evenly, 0 if all are one.

    features: (N, D)
    source: SimSiam, arXiv 2011.10566, section 4.1
    """
    unit = F.normalize(features.double(), dim=1)
    return float(unit.std(0).mean() * features.shape[1] ** 0.5)
