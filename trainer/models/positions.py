"""Position embeddings of vision transformers for other view sizes, as the published code resamples them."""

from functools import lru_cache

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def resample_as_published(network: nn.Module) -> None:
    """Let a timm vision transformer that takes several sizes resample its positions as SSLight and DINO do.

    Only its class changes: names, shapes and weights stay timm's. A network without position embeddings, or one that
    takes a single size and so never resamples, stays as it is.
    raises: ValueError if the network resamples positions in a way that the published code does not know
    """
    if not isinstance(getattr(network, "pos_embed", None), nn.Parameter):
        return
    if not getattr(network, "dynamic_img_size", False):
        return
    if type(network) is not VisionTransformer or network.num_prefix_tokens != 1 or network.no_embed_class:
        raise ValueError(
            f"pos_embed: reference is for timm's plain VisionTransformer with a class token, and this network is "
            f"{type(network).__name__}; set backbone.pos_embed=timm"
        )
    network.__class__ = _PublishedPositions


class _PublishedPositions(VisionTransformer):  # type: ignore[misc]
    """timm's VisionTransformer but for how positions are resampled."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, H, W, D) patches to (B, 1 + H W, D) tokens with positions."""
        positions = resample(self.pos_embed, self.patch_embed.grid_size, (x.shape[1], x.shape[2]))
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        dropped: Tensor = self.pos_drop(tokens + positions)
        return dropped


def resample(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions of an `old` grid as those of a `new` one; the class token's stays.

    positions: (1, 1 + H W, D), class token first;  returns: (1, 1 + H' W', D)
    source: SSLight backbone/vision_transformer.py, interpolate_pos_encoding
    """
    if tuple(old) == tuple(new):
        return positions
    matrix = _bicubic(tuple(old), tuple(new)).to(positions.device)
    with torch.autocast(positions.device.type, enabled=False):
        patches = matrix @ positions[:, 1:].float()
    return torch.cat([positions[:, :1], patches.to(positions.dtype)], dim=1)


@lru_cache(maxsize=16)
def _bicubic(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(H' W', H W): what bicubic resampling with scale factors (n + 0.1) / N does to each position of the old grid.

    The published code adds 0.1 against rounding, and the sampled places follow that factor, not the output's size. As
    a matrix its gradient is the same at every run; that of bicubic resampling on a GPU is not.
    """
    count = old[0] * old[1]
    factors = tuple((wanted + 0.1) / given for given, wanted in zip(old, new, strict=True))
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(count).view(count, 1, *old)
        sampled = F.interpolate(basis, scale_factor=factors, mode="bicubic", align_corners=False)
        return sampled.view(count, -1).T.contiguous()
