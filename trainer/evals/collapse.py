"""Whether features have collapsed: how many directions they use, and how far apart they lie."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rank_me(features: Tensor) -> float:
    """The effective number of directions: exp of the entropy of the normalised singular values, in [1, min(N, D)].

    features: (N, D), not centred; of more than 25,600 rows the first are taken, as many as the paper takes
    source: RankMe, arXiv 2210.02885, equation 1
    """
    values = torch.linalg.svdvals(features[:25_600].double())
    shares = values / values.sum() + 1e-7  # epsilon as in the paper
    return float(torch.exp(-(shares * shares.log()).sum()))


def feature_std(features: Tensor) -> float:
    """Standard deviation of unit-length features, times sqrt(D): 1 if they spread evenly, 0 if all are one.

    features: (N, D)
    source: SimSiam, arXiv 2011.10566, section 4.1
    """
    unit = F.normalize(features.double(), dim=1)
    return float(unit.std(0).mean() * features.shape[1] ** 0.5)
