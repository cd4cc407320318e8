"""Projection heads of the methods."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: list[int], *, activation: type[nn.Module], norm: bool) -> nn.Sequential:
    """Linear layers of the given sizes, with [BatchNorm and] activation after each but the last.

    Linear weights: truncated normal 0.02, biases 0, as in the DINO and SSLight heads.
    """
    layers: list[nn.Module] = []
    for index, (wide, narrow) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(wide, narrow)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index < len(sizes) - 2:
            layers += [nn.BatchNorm1d(narrow), activation()] if norm else [activation()]
    return nn.Sequential(*layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainMLP:
    """A student's head for a frozen teacher, in place of the method's own: linear layers and what lies between."""

    hidden_dim: int = 2048
    num_layers: int = 2
    """Linear layers, the last included."""
    norm: bool
    """BatchNorm behind each but the last: on for CNNs, off for ViTs."""
    activation: Literal["none", "gelu", "relu"]
    """none: as the released RoB settings have it for two layers, which makes the head one linear map (but for the
    statistics of BatchNorm); gelu and relu: what an MLP is usually taken for."""

    def __post_init__(self) -> None:
        for field, least in (("hidden_dim", 1), ("num_layers", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")

    def build(self, embed_dim: int, out_dim: int) -> nn.Sequential:
        """The head, (B, embed_dim) -> (B, out_dim), its layers drawn as torch draws them.

        source: VISSL, vissl/models/heads/mlp.py
        """
        sizes = [embed_dim, *[self.hidden_dim] * (self.num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(sizes[:-1]):
            layers.append(nn.Linear(wide, narrow))
            layers += [nn.BatchNorm1d(narrow)] if self.norm else []
            layers += [ACTIVATIONS[self.activation]()] if self.activation != "none" else []
        return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are gain x direction; the gain starts at 1.

    The names weight_g (K, 1) and weight_v (K, D) are those of torch's old weight_norm, which published checkpoints use.
    """

    def __init__(self, in_features: int, out_features: int, *, train_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """MLP to a normalised bottleneck, then weight-normed prototypes: (B, D) -> (B, K) logits.

    source: DINO, arXiv 2104.14294, appendix C
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        norm: bool,
        train_gain: bool,
    ) -> None:
        super().__init__()
        self.mlp = mlp([embed_dim, hidden_dim, hidden_dim, bottleneck_dim], activation=nn.GELU, norm=norm)
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes, train_gain=train_gain)

    def forward(self, x: Tensor) -> Tensor:
        """(B, embed_dim) -> (B, num_prototypes)."""
        logits: Tensor = self.last_layer(F.normalize(self.mlp(x), dim=-1))
        return logits


class MoCoHead(nn.Module):
    """MLP with one hidden layer and no norm, to unit vectors: (B, D) -> (B, out_dim).

    source: MoCo v2, arXiv 2003.04297
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = mlp([embed_dim, hidden_dim, out_dim], activation=nn.ReLU, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, embed_dim) -> (B, out_dim), each row of length 1."""
        return F.normalize(self.mlp(x), dim=-1)


class SwAVHead(nn.Module):
    """MLP with one hidden layer and BatchNorm, to unit vectors: (B, D) -> (B, out_dim).

    source: SwAV, arXiv 2006.09882; hidden size and initialisation as SSLight model/swav.py
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = mlp([embed_dim, hidden_dim, out_dim], activation=nn.ReLU, norm=True)
        initialise_linears(self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """(B, embed_dim) -> (B, out_dim), each row of length 1."""
        return F.normalize(self.mlp(x), dim=-1)


def projector(embed_dim: int, *, hidden_dim: int, out_dim: int, last_norm: bool = False) -> nn.Sequential:
    """Three linear layers with BatchNorm and ReLU between them: VICReg's, and with a last BatchNorm SimSiam's.

    The last BatchNorm only normalises: its weights stay 1 and 0. Layers are drawn as torch draws them.
    source: arXiv 2105.04906, section 4.2; arXiv 2011.10566, section 3
    """
    layers: list[nn.Module] = []
    for wide, narrow in ((embed_dim, hidden_dim), (hidden_dim, hidden_dim)):
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(hidden_dim, out_dim, bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(out_dim).requires_grad_(False))
    return nn.Sequential(*layers)


def predictor(out_dim: int, *, hidden_dim: int) -> nn.Sequential:
    """SimSiam's: narrow in the middle, (B, D) -> (B, D)."""
    inner = nn.Linear(out_dim, hidden_dim, bias=False)
    return nn.Sequential(inner, nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))


class MSNHead(nn.Module):
    """MLP with two hidden layers, to vectors that are not normalised yet: (B, D) -> (B, out_dim).

    source: MSN, arXiv 2204.07141, src/msn_train.py
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int, out_dim: int, norm: bool) -> None:
        super().__init__()
        self.mlp = mlp([embed_dim, hidden_dim, hidden_dim, out_dim], activation=nn.GELU, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, embed_dim) -> (B, out_dim)."""
        embeddings: Tensor = self.mlp(x)
        return embeddings


class CosinePrototypes(nn.Module):
    """Directions in the space of embeddings; neither they nor the embeddings need be of length 1.

    source: MSN, src/losses.py snn, src/msn_train.py
    """

    def __init__(self, embed_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, embed_dim).uniform_(-1, 1) / embed_dim**0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(..., D) -> (..., K) cosines in full precision."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(embeddings.float(), dim=-1), F.normalize(self.weight, dim=-1))


class Prototypes(nn.Module):
    """Unit vectors in the space of embeddings; whoever steps them calls `renormalise` before the next forward."""

    def __init__(self, embed_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_prototypes, embed_dim))
        self.renormalise()

    @torch.no_grad()
    def renormalise(self) -> None:
        """Give every prototype length 1 again, in the parameter itself."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(..., D) unit embeddings -> (..., K) cosines in full precision: a temperature of 0.05 follows."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.float(), self.weight)


class FrozenHead(nn.Module):
    """The heads of DINO, SwAV, iBOT and MSN once nothing trains them: MLP, unit length, one product with prototypes.

    mlp: None for a teacher without a head, whose features are its embeddings; nn.Identity() makes them unit vectors
    prototypes: (K, D), of whatever length they came with; None where a method compares the embeddings themselves
    bias: (K,), of a plain MLP's last layer, whose weights are then the prototypes
    unit_length: False for a plain MLP in the place of the method's own head
    """

    prototypes: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        mlp: nn.Module | None,
        prototypes: Tensor | None,
        *,
        bias: Tensor | None = None,
        unit_length: bool = True,
    ) -> None:
        super().__init__()
        self.mlp, self.unit_length = mlp, unit_length
        for name, value in (("prototypes", prototypes), ("bias", bias)):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    def width(self, num_features: int) -> int:
        """K, or D where there are no prototypes, for so many features."""
        if self.prototypes is not None:
            return len(self.prototypes)
        linears = [] if self.mlp is None else [m for m in self.mlp.modules() if isinstance(m, nn.Linear)]
        return linears[-1].out_features if linears else num_features

    def embed(self, features: Tensor) -> Tensor:
        """(..., C) features -> (..., D) float32 embeddings; BatchNorm in the MLP sees tokens as rows."""
        if self.mlp is None:
            return features.float()
        rows = self.mlp(features.flatten(0, -2)).float()
        return (F.normalize(rows, dim=-1) if self.unit_length else rows).view(*features.shape[:-1], -1)

    def score(self, embeddings: Tensor) -> Tensor:
        """(..., D) -> (..., K) in full precision: a temperature of 0.025 follows."""
        if self.prototypes is None:
            return embeddings
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.float(), self.prototypes, self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        return self.score(self.embed(features))


@torch.no_grad()
def initialise_linears(module: nn.Module) -> None:
    """Draw the weights of linear layers from N(0, 0.01), biases 0, as SSLight model/swav.py does throughout."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
