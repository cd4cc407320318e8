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
