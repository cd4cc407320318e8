"""Patch tokens of timm's vision transformers: masked or dropped at the input, kept at the output."""

from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from trainer.models.backbones import Branch


def require_patches(network: nn.Module, wish: str, instead: str) -> VisionTransformer:
    """The network, if it is a vision transformer of timm with a class token.

    raises: ValueError that names the wish, and what to do without patches
    """
    if isinstance(network, VisionTransformer) and network.cls_token is not None:
        return network
    raise ValueError(
        f"{wish} needs a vision transformer of timm's with a class token, and the backbone is a "
        f"{type(network).__name__}; {instead}"
    )


def grid_of(network: VisionTransformer, images: Tensor) -> tuple[int, int]:
    """How many patches the images have, down and across."""
    high, wide = network.patch_embed.patch_size
    return images.shape[-2] // high, images.shape[-1] // wide


def tokens_of(
    network: VisionTransformer,
    images: Tensor,
    *,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """The last tokens of all or some patches, prefix tokens first: (B, P + N, D).

    masked: (B, N) which patches the mask token (D,) replaces, before positions are added
    kept: (M,) which patches stay, positions added before; all by default
    equals: the network's forward_features, where neither is given
    """
    x = network.patch_embed(images)
    if masked is not None:
        assert mask_token is not None
        x = torch.where(masked.view(*x.shape[:-1], 1), mask_token.to(x.dtype), x)
    x = network._pos_embed(x)
    if kept is not None:
        prefix, patches = x.split([network.num_prefix_tokens, x.shape[1] - network.num_prefix_tokens], dim=1)
        x = torch.cat([prefix, patches.index_select(1, kept)], dim=1)
    x = network.norm_pre(network.patch_drop(x))
    x = checkpoint_seq(network.blocks, x) if network.grad_checkpointing else network.blocks(x)
    tokens: Tensor = network.norm(x)
    return tokens


def pooled(network: VisionTransformer, tokens: Tensor) -> Tensor:
    """The feature vector that the network makes of its tokens, (B, embed_dim)."""
    features: Tensor = network.forward_head(tokens, pre_logits=True)
    return features


class TokenBranch(Branch):
    """A vision transformer and a head that every token goes through, the class token and the patches alike.

    raises: ValueError if the backbone has no patches, or its feature is not its class token
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__(require_patches(backbone, "a loss of patches", "set method.patch_weight=0"), head)
        if backbone.global_pool != "token":
            raise ValueError(
                f"a loss of patches trains the class token too, and the backbone's feature is {backbone.global_pool!r} "
                "of its tokens; take global_pool out of backbone.args"
            )

    def forward(self, views: list[Tensor]) -> Tensor:
        """Project every token of views of one size: (sum of V_i * B, 1 + N, K), the class token first."""
        tokens = torch.cat([tokens_of(self.backbone, group) for group in views])
        prefix: Any = self.backbone.num_prefix_tokens  # registers stand between class token and patches
        tokens = torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1) if prefix > 1 else tokens
        output: Tensor = self.head(tokens.flatten(0, 1))
        return output.view(*tokens.shape[:2], -1)
