"""The joint linear probe: a classifier that shows, while a student trains without labels, what its features know."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearProbe(nn.Module):
    """One linear layer on features that it cannot change: (B, embed_dim) -> (B, num_classes) logits.

    It trains with the student, on random views and in the student's optimizer, and so reads lower than a linear
    evaluation of the finished network.
    source: SSLight, JOINT_LINEAR_PROBE
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, with no gradient for the features."""
        logits: Tensor = self.classifier(features.detach())
        return logits

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy with the (B,) labels, and what to log of it; accuracy in percent."""
        logits = self(features)
        loss = F.cross_entropy(logits, labels)
        return loss, {"probe/loss": loss.detach(), "probe/accuracy": percent_right(logits, labels)}


@torch.no_grad()
def percent_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the (B, C) logits whose largest is the label's, in percent; stays on the device."""
    return 100 * (logits.argmax(-1) == labels).float().mean()
