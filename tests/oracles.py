"""The papers' formulas as dumb float64 loops; tests compare our vectorised code with them."""

import math

import torch
from torch import Tensor


def waves(rows: int, columns: int, a: float, b: float) -> Tensor:
    """G[i, k] = sin(a i + b k + 0.5): the inputs of the published fixtures."""
    i, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return torch.sin(a * i + b * k + 0.5).double()


def unit_rows(matrix: Tensor) -> Tensor:
    """Each row divided by its length."""
    return matrix / matrix.norm(dim=1, keepdim=True)


def softmax(row: Tensor) -> Tensor:
    """exp(x) / sum exp(x) of one row."""
    exps = (row - row.max()).exp()
    return exps / exps.sum()


def dino_by_the_paper(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[float, float]:
    """Means over global pairs and over global-local pairs; student (V, B, K), teacher (G, B, K)."""
    of_globals, of_locals = [], []
    for i, teacher_view in enumerate(teacher.double()):
        for v, student_view in enumerate(student.double()):
            if i != v:
                pairs = [
                    -(softmax((t - center.double()) / teacher_temp) * softmax(s / student_temp).log()).sum().item()
                    for t, s in zip(teacher_view, student_view, strict=True)
                ]
                (of_globals if v < len(teacher) else of_locals).append(sum(pairs) / len(pairs))
    return sum(of_globals) / len(of_globals), sum(of_locals) / len(of_locals)


def sinkhorn_by_the_paper(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The published pseudo-code, exp() without a safety net; (B, K) scores -> (B, K) codes."""
    codes = torch.exp(scores.double() / epsilon)
    codes = codes / codes.sum()
    batch, prototypes = codes.shape
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0, keepdim=True) / prototypes
        codes = codes / codes.sum(dim=1, keepdim=True) / batch
    return codes * batch


def swav_by_the_paper(scores: Tensor, codes: Tensor, temperature: float) -> tuple[float, float]:
    """Means over global pairs and over global-local pairs; scores (V, B, K), codes (G, B, K)."""
    of_globals, of_locals = [], []
    for i, code_view in enumerate(codes.double()):
        for v, score_view in enumerate(scores.double()):
            if i != v:
                pairs = [
                    -(code * softmax(score / temperature).log()).sum().item()
                    for code, score in zip(code_view, score_view, strict=True)
                ]
                (of_globals if v < len(codes) else of_locals).append(sum(pairs) / len(pairs))
    return sum(of_globals) / len(of_globals), sum(of_locals) / len(of_locals)


def info_nce_by_the_paper(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> float:
    """-log of the share that the own key gets of exp(similarity / T); query, key (D,), queue (D, Q)."""
    positive = math.exp(float(query.double() @ key.double()) / temperature)
    negatives = sum(math.exp(float(query.double() @ column) / temperature) for column in queue.double().T)
    return -math.log(positive / (positive + negatives))


def lars_by_the_paper(
    weight: Tensor, gradient: Tensor, buffer: Tensor, *, lr: float, decay: float, momentum: float, adapts: bool
) -> tuple[Tensor, Tensor]:
    """One LARS step of one tensor; returns the new weight and momentum buffer."""
    update = gradient + decay * weight
    if adapts and weight.norm() > 0 and update.norm() > 0:
        update = update * 0.001 * weight.norm() / update.norm()
    buffer = momentum * buffer + update
    return weight - lr * buffer, buffer


def knn_by_the_paper(bank: Tensor, labels: Tensor, query: Tensor, k: int, temperature: float, classes: int) -> int:
    """The class with the most votes of the k nearest rows; rows and query of unit length."""
    similarity = bank.double() @ query.double()
    votes = [0.0] * classes
    for index in similarity.argsort(descending=True)[:k].tolist():
        votes[int(labels[index])] += math.exp(similarity[index].item() / temperature)
    return votes.index(max(votes))


def pairs_of(pairing: str, num_views: int, num_targets: int) -> list[tuple[int, int]]:
    """(teacher view, student view) of every term; num_targets views of the teacher, num_views of the student."""
    locals_too = range(num_targets, num_views)
    if pairing == "same_view":
        return [(g, v) for g in range(num_targets) for v in (g, *locals_too)]
    return [(g, v) for g in range(num_targets) for v in range(num_views) if v != g]


def rob_by_the_paper(student: Tensor, targets: Tensor, temperature: float, pairing: str) -> float:
    """RoB's plain mean over all its terms; student logits (V, B, K), targets (T, B, K)."""
    terms = []
    for g, v in pairs_of(pairing, len(student), len(targets)):
        for q, s in zip(targets[g].double(), student[v].double(), strict=True):
            terms.append(-(q * softmax(s / temperature).log()).sum().item())
    return sum(terms) / len(terms)


def patch_loss_by_the_paper(
    student: Tensor, teacher: Tensor, center: Tensor, masks: Tensor, student_temp: float, teacher_temp: float
) -> float:
    """iBOT's loss of masked patches: over those of an image, over images, over views; (G, B, N, K), masks (G, B, N)."""
    of_views = []
    for view_s, view_t, view_masks in zip(student.double(), teacher.double(), masks, strict=True):
        of_images = []
        for image_s, image_t, mask in zip(view_s, view_t, view_masks, strict=True):
            terms = [
                -(softmax((t - center.double()) / teacher_temp) * softmax(s / student_temp).log()).sum().item()
                for s, t, hidden in zip(image_s, image_t, mask, strict=True)
                if hidden
            ]
            of_images.append(sum(terms) / max(1, len(terms)))
        of_views.append(sum(of_images) / len(of_images))
    return sum(of_views) / len(of_views)


def msn_targets_by_the_paper(cosines: Tensor, temperature: float, sharpening: float, iterations: int) -> Tensor:
    """Probabilities sharpened by an exponent, then balanced; (B, K) -> (B, K)."""
    probabilities = torch.stack([softmax(row / temperature) for row in cosines.double()])
    sharp = probabilities ** (1 / sharpening)
    sharp = sharp / sharp.sum(1, keepdim=True)
    batch, prototypes = sharp.shape
    sharp = sharp / sharp.sum()
    for _ in range(iterations):
        sharp = sharp / sharp.sum(0, keepdim=True) / prototypes
        sharp = sharp / sharp.sum(1, keepdim=True) / batch
    return sharp * batch if iterations else sharp / sharp.sum(1, keepdim=True)


def me_max_by_the_paper(student: Tensor, temperature: float) -> float:
    """ln K minus the entropy of the mean prediction over (V, B, K) logits."""
    mean = torch.stack([softmax(row / temperature) for row in student.double().flatten(0, 1)]).mean(0)
    return math.log(len(mean)) + sum(float(p) * math.log(p) for p in mean)
