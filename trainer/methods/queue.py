"""A first-in-first-out queue of keys that lives in the checkpoint."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    """The newest `size` keys as unit columns (D, Q); starts with random ones.

    raises: ValueError in `push` if the batch does not divide the queue
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, embed_dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(embed_dim, size), dim=0))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @property
    def size(self) -> int:
        """How many keys it holds."""
        return self.keys.shape[1]

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by these (N, D); nothing waits for the device."""
        if self.size % len(keys):
            raise ValueError(f"the queue of {self.size} keys must be a multiple of the batch of {len(keys)}")
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % self.size
        self.keys.index_copy_(1, places, keys.T.to(self.keys.dtype))
        self.pointer.copy_((self.pointer + len(keys)) % self.size)
