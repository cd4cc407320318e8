"""First-in-first-out queues that live in the checkpoint and are the same on every rank."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import distributed


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


class EmbeddingQueue(nn.Module):
    """The newest `size` embeddings of each assignment view (Q, G, D); of use only once it is full.

    How many came is known to the host, so that asking waits for nothing; it is saved with the module's state.
    raises: ValueError in `push` if the batch does not divide the queue
    """

    rows: Tensor

    def __init__(self, size: int, num_views: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, num_views, embed_dim))
        self.num_pushed = 0

    @property
    def is_full(self) -> bool:
        """Whether embeddings have come for every place."""
        return self.num_pushed >= len(self.rows) > 0

    def share(self) -> Tensor:
        """This rank's part, so that all ranks together have each row once: (G, Q / ranks, D)."""
        return self.rows.chunk(distributed.world())[distributed.rank()].transpose(0, 1)

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Replace the oldest rows by these (N, G, D)."""
        if len(self.rows) % len(embeddings):
            raise ValueError(f"the queue of {len(self.rows)} rows must be a multiple of the batch of {len(embeddings)}")
        start = self.num_pushed % len(self.rows)
        self.rows[start : start + len(embeddings)] = embeddings
        self.num_pushed += len(embeddings)

    def get_extra_state(self) -> Tensor:
        """How many embeddings came, for state_dict()."""
        return torch.tensor(self.num_pushed)

    def set_extra_state(self, state: Tensor) -> None:
        """The same, from load_state_dict()."""
        self.num_pushed = int(state)
