"""A network with a classifier on it: what the linear probe, few labels, transfer and fine-tuning train."""

import copy
from collections.abc import Iterable, Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models.backbones import num_features
from trainer.models.heads import mlp
from trainer.protocols import Classification
from trainer.recipe import RecipeError
from trainer.teachers.heads import ACTIVATIONS

VIT_BLOCKS = 4
"""A ViT's linear probe sees the class tokens of so many last blocks. source: DINO, arXiv 2104.14294"""


class ClassTokens(nn.Module):
    """The class tokens of a ViT's last blocks, side by side: (B, num_blocks * D).

    norm: whether each goes through the final norm
    raises: RecipeError if the network has no class token
    """

    def __init__(self, network: VisionTransformer, *, num_blocks: int = VIT_BLOCKS, norm: bool = True) -> None:
        super().__init__()
        if not network.has_class_token:
            raise RecipeError("this protocol reads a ViT's class token, and this one has none; take linear_cached")
        self.network, self.num_blocks, self.norm = network, num_blocks, norm
        self.num_features = num_blocks * num_features(network)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, num_blocks * D)."""
        blocks = self.network.get_intermediate_layers(
            images, n=self.num_blocks, return_prefix_tokens=True, norm=self.norm
        )
        return torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)


class Classifier(nn.Module):
    """A network and a head on its features; the loss is its output, which is what an engine wraps.

    others: further heads on the same features; no head's loss reaches another's weights
    bf16: both run under bfloat16 autocast, in here: DeepSpeed switches off what is set outside of its engine
    """

    def __init__(
        self,
        network: nn.Module,
        head: nn.Module,
        others: Iterable[nn.Module] = (),
        *,
        trains_network: bool,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.head, self.trains_network, self.bf16 = network, head, trains_network, bf16
        self.others = nn.ModuleList(others)
        network.requires_grad_(trains_network)

    @property
    def heads(self) -> list[nn.Module]:
        """All of them, in the order of the settings' rates."""
        return [self.head, *self.others]

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen network stays in eval mode."""
        super().train(mode)
        self.network.train(mode and self.trains_network)
        return self

    def logits(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> (B, C) in fp32 of each head; the network runs once."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.set_grad_enabled(self.trains_network and torch.is_grad_enabled()):
                features = self.network(images)
            return [head(features).float() for head in self.heads]

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of all heads' cross-entropies, and the first head's alone, which another's divergence leaves finite.

        A sum and not a mean: so each head gets the gradients that it would get alone.
        """
        losses = torch.stack([F.cross_entropy(logits, labels) for logits in self.logits(images)])
        return losses.sum(), losses[0].detach()


def build_classifier(
    network: nn.Module,
    settings: Classification,
    num_classes: int,
    projection: Mapping[str, Tensor],
    *,
    seed: int,
    method: str | None = None,
    bf16: bool = False,
) -> Classifier:
    """The network with a fresh head, the same on every rank, and a copy of it for each further rate.

    projection: the tensors of the run's projection head, for head: projection
    method: whose head that is, if it says so
    raises: RecipeError if the head has nothing to start from
    """
    torch.manual_seed(seed)
    if settings.trains == "head" and isinstance(network, VisionTransformer):
        network = ClassTokens(network)
    width = network.num_features if isinstance(network, ClassTokens) else num_features(network)
    match settings.head:
        case "projection":
            head: nn.Module = _projection_head(width, num_classes, projection, method)
        case "norm_linear":
            head = nn.Sequential(nn.BatchNorm1d(width), _linear(width, num_classes))
        case "linear":
            head = _linear(width, num_classes)
    others = (copy.deepcopy(head) for _ in settings.rates[1:])
    return Classifier(network, head, others, trains_network=settings.trains == "all", bf16=bf16)


def _linear(width: int, num_classes: int) -> nn.Linear:
    """source: SSLight classification/"""
    layer = nn.Linear(width, num_classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _projection_head(
    width: int, num_classes: int, projection: Mapping[str, Tensor], method: str | None
) -> nn.Sequential:
    """The hidden layers of the run's projection head, and a fresh linear layer on them.

    source: SSLight semi-supervised fine-tuning of DINO, with two hidden layers; SwAV's and MoCo's heads have one
    """
    layers = {key.removeprefix("mlp."): value for key, value in projection.items() if key.startswith("mlp.")}
    sizes = [len(value) for key, value in layers.items() if key.endswith("weight") and value.ndim == 2]
    if not sizes or layers["0.weight"].shape[1] != width:
        raise RecipeError(
            f"head: projection starts from the projection head of a run on {width} features, and beside these weights "
            "there is none of such a form (head.safetensors); set head=linear in the protocol's settings"
        )
    usual = nn.GELU if "last_layer.weight_v" in projection else nn.ReLU  # of heads that do not say whose they are
    activation = ACTIVATIONS.get(method, usual) if method else usual
    norm = any(key.endswith("running_mean") for key in layers)
    head = mlp([width, *sizes[:-1], num_classes], activation=activation, norm=norm)
    last = f"{len(head) - 1}."
    kept = {key: value for key, value in layers.items() if not key.startswith(last)}
    head.load_state_dict(head.state_dict() | kept)
    return head
