"""Metrics, against hand computation in numpy."""

import numpy as np
import pytest
import torch
from jaxtyping import Float

from patchclamp.errors import MetricError
from patchclamp.metrics import METRICS, metric_named
from patchclamp.tasks import Batch, Pair, Task
from small_tokenizers import words

WORDS = words(["one two three four five six seven eight nine ten"])
SIZE = 12


def batch_of(*rows: Pair) -> Batch:
    return Task("mine", "mine", lambda _rng, _tokenizer: iter(rows), size=len(rows)).examples(WORDS).batch()


def drawn(batch: Batch, settings: int = 3, seed: int = 0) -> Float[torch.Tensor, "setting target token"]:
    return (
        torch.randn(settings, len(batch.target_row), SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    )


SINGLE = (Pair((3, 4), 5, (3, 5), 6), Pair((4, 5, 6), 7, (4, 5, 7), 8))
LISTS = (Pair((3, 4), ((5,), (6,), (7,)), (3, 5), ((8,),)), Pair((4, 5), ((9,),), (4, 6), ((10,), (11,))))
LONG = (Pair((3, 4), ((5, 6, 7),), (3, 5), ((8, 9),)), Pair((4, 5), ((9,),), (4, 6), ((10,),)))
OPEN = (Pair((3, 4), ((5, 6),)), Pair((4, 5), ((9,),)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_single_tokens() -> None:
    """One right and one wrong token at one position: every metric by its definition."""
    batch = batch_of(*SINGLE)
    logits = drawn(batch)
    x, p = logits.numpy(), softmax(logits.numpy())
    right, wrong = [5, 7], [6, 8]
    pick = lambda a, tokens: np.stack([a[:, t, token] for t, token in enumerate(tokens)], 1)  # noqa: E731
    expected = {
        "logit_diff": pick(x, right) - pick(x, wrong),
        "probability": pick(p, right),
        "probability_diff": pick(p, right) - pick(p, wrong),
        "log_probability": np.log(pick(p, right)),
        "nll": -np.log(pick(p, right)),
        "top1": np.stack([(x[:, t].argmax(-1) == token) for t, token in enumerate(right)], 1).astype(float),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(METRICS[name](logits, batch).numpy(), value, rtol=1e-12, err_msg=name)


def test_lists_of_tokens() -> None:
    """Several right or wrong tokens: their probabilities add up, in logits as log-sum-exp; -1 fills up and counts nothing."""
    batch = batch_of(*LISTS)
    logits = drawn(batch)
    x, p = logits.numpy(), softmax(logits.numpy())
    right, wrong = [[5, 6, 7], [9]], [[8], [10, 11]]
    mass = lambda a, sets: np.stack([a[:, t, tokens].sum(-1) for t, tokens in enumerate(sets)], 1)  # noqa: E731
    expected = {
        "logit_diff": np.log(mass(np.exp(x), right)) - np.log(mass(np.exp(x), wrong)),
        "probability": mass(p, right),
        "probability_diff": mass(p, right) - mass(p, wrong),
        "nll": -np.log(mass(p, right)),
        "top1": np.stack([np.isin(x[:, t].argmax(-1), tokens) for t, tokens in enumerate(right)], 1).astype(float),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(METRICS[name](logits, batch).numpy(), value, rtol=1e-12, err_msg=name)


def test_answers_of_several_tokens() -> None:
    """Mean over answer tokens; a contrast is the right answer's mean less the wrong answer's, from rows of their own."""
    batch = batch_of(*LONG)
    logits = drawn(batch)
    log_p = np.log(softmax(logits.numpy()))
    at = lambda t, token: log_p[:, t, token]  # noqa: E731
    # targets in order: 5 6 7 (right), 8 9 (wrong), 9 (right), 10 (wrong)
    first = (at(0, 5) + at(1, 6) + at(2, 7)) / 3
    other = (at(3, 8) + at(4, 9)) / 2
    expected = {
        "logit_diff": np.stack([first - other, at(5, 9) - at(6, 10)], 1),
        "log_probability": np.stack([first, at(5, 9)], 1),
        "nll": -np.stack([first, at(5, 9)], 1),
        "probability": np.exp(np.stack([at(0, 5), at(1, 6), at(2, 7)])).mean(0)[:, None],
    }
    for name, value in expected.items():
        found = METRICS[name](logits, batch).numpy()
        np.testing.assert_allclose(found[:, : value.shape[1]], value, rtol=1e-12, err_msg=name)


def test_one_token_is_the_special_case() -> None:
    """An example says the same in a batch that needs rows of their own (where the normalisers cancel) as in one that does not."""
    alone, mixed = batch_of(*SINGLE), batch_of(*SINGLE, LONG[0])
    logits = drawn(alone)
    places = [0, 0, 1, 1]  # right and wrong rows of both examples end at the same position of the same prompt
    longer = torch.cat([logits[:, places], drawn(mixed)[:, 4:]], 1)
    np.testing.assert_allclose(METRICS["logit_diff"](longer, mixed)[:, :2], METRICS["logit_diff"](logits, alone), rtol=1e-10)


def test_kl_to_the_open_run() -> None:
    """KL(open || run): zero at the open run, never negative, and its definition."""
    batch = batch_of(*OPEN)
    logits, reference = drawn(batch), drawn(batch, 1, seed=1)[0]
    p, q = softmax(reference.numpy()), softmax(logits.numpy())
    per_target = (p * (np.log(p) - np.log(q))).sum(-1)
    expected = np.stack([per_target[:, :2].mean(1), per_target[:, 2]], 1)
    found = METRICS["kl"](logits, batch, reference)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(METRICS["kl"](reference[None], batch, reference), 0, atol=1e-12)


def test_l2_to_the_open_run() -> None:
    """Squared distance of all logits, mean over an answer's tokens."""
    batch = batch_of(*OPEN)
    logits, reference = drawn(batch), drawn(batch, 1, seed=1)[0]
    per_target = ((logits.numpy() - reference.numpy()) ** 2).sum(-1)
    expected = np.stack([per_target[:, :2].mean(1), per_target[:, 2]], 1)
    np.testing.assert_allclose(METRICS["l2"](logits, batch, reference), expected, rtol=1e-12)


def test_what_a_metric_needs_is_said() -> None:
    """Contrasts need wrong answers, KL the open run; an unknown name lists those there are."""
    batch = batch_of(*OPEN)
    for name in ("logit_diff", "probability_diff"):
        with pytest.raises(MetricError, match=f"{name} compares with wrong answers, and the task gives none"):
            METRICS[name](drawn(batch), batch)
    with pytest.raises(MetricError, match="compares with the open run"):
        METRICS["kl"](drawn(batch), batch)
    with pytest.raises(MetricError, match="there is no metric 'accuracy': choose from logit_diff, probability"):
        metric_named("accuracy")


def test_half_precision_is_computed_in_float32() -> None:
    """Values come in float32 or wider, and gradients flow."""
    batch = batch_of(*LISTS)
    logits = drawn(batch).to(torch.bfloat16).requires_grad_()
    value = METRICS["logit_diff"](logits, batch)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    assert METRICS["nll"](drawn(batch), batch).dtype == torch.float64
