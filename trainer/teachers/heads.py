"""A teacher's projection head out of its tensors: whatever the method, an MLP and a matrix of prototypes."""

import re
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.heads import FrozenHead, PlainMLP, mlp
from trainer.weights import HeadSpec, WeightsError, load_strictly

ACTIVATIONS = {"dino": nn.GELU, "ibot": nn.GELU, "msn": nn.GELU, "swav": nn.ReLU, "moco": nn.ReLU}
"""Between the layers of each method's head, ours and the published; the tensors do not show it."""
HAVE_PROTOTYPES = ("dino", "ibot", "msn", "swav")
LAST = "last_layer."
GAINS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
"""What torch's weight_norm calls gain (K, 1) and direction (K, D): the old way, and the new."""


def head_of(spec: HeadSpec, state: Mapping[str, Tensor], where: str) -> FrozenHead:
    """The head of a branch that was trained by a method.

    state: mlp.N..., and last_layer... or prototypes.weight; of a plain MLP N..., and prototypes.weight if there are any
    raises: WeightsError if the method has no such head, or tensors are missing, left over or of other shapes
    """
    method = spec.method
    if method not in ACTIVATIONS:
        raise WeightsError(f"{where}: heads of {', '.join(ACTIVATIONS)} are known, and this one is of {method}")
    if spec.mlp_head is not None:
        return _plain_head(spec.mlp_head, state, where)
    layers = {name.removeprefix("mlp."): value for name, value in state.items() if name.startswith("mlp.")}
    rest = {name: value for name, value in state.items() if not name.startswith("mlp.")}
    projection = _mlp_like(layers, ACTIVATIONS[method], where)
    load_strictly(projection, layers, f"{where}: head.mlp")
    prototypes = _take_prototypes(rest, where, method=method)
    if rest:
        raise WeightsError(f"{where}: unexpected in the head: {', '.join(sorted(rest))}")
    width = next(layer.out_features for layer in reversed(projection) if isinstance(layer, nn.Linear))
    if prototypes is not None and (prototypes.ndim != 2 or prototypes.shape[1] != width):
        came = tuple(prototypes.shape)
        raise WeightsError(f"{where}: wanted prototypes (K, {width}), as wide as the head's output, got {came}")
    return FrozenHead(projection, prototypes)


def _plain_head(plain: PlainMLP, state: Mapping[str, Tensor], where: str) -> FrozenHead:
    """A plain MLP, whose outputs meet prototypes as they are; without prototypes its last layer says the scores."""
    layers = {name: value for name, value in state.items() if name != "prototypes.weight"}
    widths = [value.shape for name, value in layers.items() if name.endswith("weight") and value.ndim == 2]
    if not widths:
        raise WeightsError(f"{where}: no linear layer head.N.weight; got {', '.join(layers) or 'nothing'}")
    network = plain.build(widths[0][1], widths[-1][0])
    load_strictly(network, layers, f"{where}: head, {plain}")
    if "prototypes.weight" in state:
        return FrozenHead(network, state["prototypes.weight"].float(), unit_length=False)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    return FrozenHead(network[:-1], last.weight.detach(), bias=last.bias.detach(), unit_length=False)


def _mlp_like(layers: Mapping[str, Tensor], activation: type[nn.Module], where: str) -> nn.Sequential:
    """The MLP whose shapes the tensors have; what does not fit it is named when they are loaded."""
    weights = {int(name.split(".")[0]): value for name, value in layers.items() if re.fullmatch(r"\d+\.weight", name)}
    linears = [weights[place] for place in sorted(weights) if weights[place].ndim == 2]
    if not linears:
        raise WeightsError(f"{where}: no linear layer head.mlp.N.weight; got {', '.join(layers) or 'nothing'}")
    norm = any(name.endswith("running_mean") for name in layers)
    return mlp([linears[0].shape[1], *(weight.shape[0] for weight in linears)], activation=activation, norm=norm)


def _take_prototypes(rest: dict[str, Tensor], where: str, *, method: str) -> Tensor | None:
    """The matrix of prototypes, its tensors taken out of `rest`; a weight-normed layer becomes gain x direction."""
    for gain, direction in GAINS:
        if LAST + gain in rest and LAST + direction in rest:
            return rest.pop(LAST + gain).float() * F.normalize(rest.pop(LAST + direction).float(), dim=1)
    for name in (LAST + "weight", "prototypes.weight"):
        if name in rest:
            found = rest.pop(name).float()
            return F.normalize(found, dim=1) if method == "msn" else found  # MSN compares by cosine; SwAV's are unit
    if method in HAVE_PROTOTYPES:
        wanted = f"{LAST}weight_g and {LAST}weight_v, or prototypes.weight"
        raise WeightsError(f"{where}: the head has no prototypes: wanted {wanted}, got {', '.join(rest) or 'nothing'}")
    return None
