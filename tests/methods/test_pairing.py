"""Which view predicts which: swapped as when a network teaches itself, or the same view as in RoB."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.test_swav import unit
from tests.oracles import pairs_of, rob_by_the_paper
from trainer.methods.losses import Pairing, num_without_partner, paired_prediction, partners, predict, weigh


def logits_and_targets(num_views: int, num_targets: int, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_views, batch, 7, generator=generator)
    return logits, torch.randn(num_targets, batch, 7, generator=generator).mul(4).softmax(-1)


def plain_mean_weights(pairing: Pairing, num_views: int, num_targets: int, num_globals: int) -> tuple[float, float]:
    """The two weights that make SSLight's two means the mean over all of RoB's terms."""
    pairs = pairs_of(pairing, num_views, num_targets)
    of_globals = sum(v < num_globals for _, v in pairs) / len(pairs)
    return of_globals, 1 - of_globals


@pytest.mark.parametrize("pairing", ["swapped", "same_view"])
@pytest.mark.parametrize("num_views", [2, 3, 6, 10, 12])
def test_the_two_terms_under_robs_weights_are_the_plain_mean_over_all_its_terms(
    pairing: Pairing, num_views: int
) -> None:
    logits, targets = logits_and_targets(num_views, 2)
    of_globals, of_locals = paired_prediction(logits, targets, temperature=0.1, pairing=pairing)
    weights = (1 / (num_views - 1), (num_views - 2) / (num_views - 1))
    assert plain_mean_weights(pairing, num_views, 2, 2) == pytest.approx(weights)
    ours = weigh(of_globals, of_locals, global_weight=weights[0], local_weight=weights[1])
    assert ours.item() == pytest.approx(rob_by_the_paper(logits, targets, 0.1, pairing), rel=1e-5)
    assert len(pairs_of(pairing, num_views, 2)) == 2 * (num_views - 1)


def test_same_view_pairs_never_let_one_global_view_predict_the_other() -> None:
    """Check (c): whatever view 0's target is, view 1's loss is the same, and the other way round."""
    assert partners("same_view", num_views=4, num_targets=2) == ((0,), (1,), (0, 1), (0, 1))
    assert partners("swapped", num_views=4, num_targets=2) == ((1,), (0,), (0, 1), (0, 1))
    logits, targets = logits_and_targets(4, 2)
    other = torch.stack([targets[0], targets[1].roll(1, -1)])
    losses = [
        predict(logits, of, partners("same_view", num_views=4, num_targets=2), temperature=0.1)
        for of in (targets, other)
    ]
    assert (losses[0] == losses[1]).tolist() == [True, False, False, False]


@pytest.mark.parametrize("pairing", ["swapped", "same_view"])
def test_with_one_target_all_views_that_can_predict_it(pairing: Pairing) -> None:
    """MSN's own rule, and RoB-SwAV with one teacher crop: swapped, the target's own view is not even asked."""
    logits, targets = logits_and_targets(5, 1)
    skipped = num_without_partner(pairing, 1)
    assert skipped == (1 if pairing == "swapped" else 0)
    terms = paired_prediction(logits[skipped:], targets, temperature=0.1, pairing=pairing, num_globals=2)
    weights = plain_mean_weights(pairing, 5, 1, 2)
    if pairing == "same_view":  # with one teacher crop the student's other global view predicts it as well
        weights, every = (2 / 5, 3 / 5), [(0, v) for v in range(5)]
    else:
        every = pairs_of(pairing, 5, 1)
    wanted = sum(-(targets[g] * (logits[v] / 0.1).log_softmax(-1)).sum(-1).mean() for g, v in every) / len(every)
    assert weigh(*terms, global_weight=weights[0], local_weight=weights[1]).item() == pytest.approx(float(wanted))


@settings(max_examples=25, deadline=None)
@given(num_locals=st.integers(0, 3), num_targets=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_same_views_gradient_is_autograds(num_locals: int, num_targets: int, seed: int) -> None:
    logits, targets = logits_and_targets(num_targets + num_locals, num_targets, seed=seed)
    logits.requires_grad_()
    log_probs = (logits / 0.2).log_softmax(-1)
    pairs = pairs_of("same_view", len(logits), num_targets)
    weight = [1 / sum(v == w for _, w in pairs) for _, v in pairs]
    terms = [-(targets[g] * log_probs[v]).sum(-1).mean() * w for (g, v), w in zip(pairs, weight, strict=True)]
    wanted = partners("same_view", num_views=len(logits), num_targets=num_targets)
    ours = predict(logits, targets, wanted, temperature=0.2).sum()
    by_hand = torch.stack(terms).sum()
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(ours, logits)
    (expected,) = torch.autograd.grad(by_hand, logits)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_one_global_view_is_enough_for_the_same_view_and_too_few_to_swap() -> None:
    logits, targets = logits_and_targets(1, 1)
    loss, none = paired_prediction(logits, targets, temperature=0.1, pairing="same_view")
    assert none is None
    assert loss.item() == pytest.approx(rob_by_the_paper(logits, targets, 0.1, "same_view"), rel=1e-5)
    with pytest.raises(ValueError, match="swapped prediction needs at least 2 global views, got 1"):
        paired_prediction(logits, targets, temperature=0.1)


def test_predicting_oneself_at_the_same_temperature_costs_the_entropy_and_teaches_nothing() -> None:
    """Check (b), for the loss alone; tests/methods/test_rob.py has it with networks."""
    scores = unit(2, 5, 9).requires_grad_()
    targets = (scores.detach() / 0.1).softmax(-1)
    loss, _ = paired_prediction(scores, targets, temperature=0.1, pairing="same_view")
    entropy = torch.special.entr(targets).sum(-1).mean()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.abs().max() < 1e-6
