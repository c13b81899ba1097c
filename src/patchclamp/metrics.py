"""Metrics: logits at the targets in, one number per example out. A metric says what it needs, so that nothing else is computed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import MetricError
from patchclamp.tasks._batch import Batch

Values = Float[Tensor, "setting target"]
Logits = Float[Tensor, "setting target token"]


@dataclass(frozen=True)
class Metric:
    """How well an example shows the behaviour.

    Args:
        name: what `--metric` calls it.
        wrong: whether it compares with wrong answers.
        normaliser: whether it needs the sum over the vocabulary (then the answers' logits alone do not do).
        vocabulary: whether it needs every token's logit.
        reference: whether it needs the logits of the run with every gate open.
        sign: +1 where more is better, -1 where less is; `benefit = sign * value`.
        per_target: (logits, batch, reference) -> one number per setting and target.
    """

    name: str
    wrong: bool
    normaliser: bool
    vocabulary: bool
    reference: bool
    sign: int
    per_target: Callable[[Logits, Batch, Float[Tensor, "target token"] | None], Values]

    def answers_alone(self, batch: Batch) -> bool:
        """Whether the logits of the batch's right and wrong answers are all it needs."""
        return not self.normaliser and not self.vocabulary and (not self.wrong or batch.wrong is not None)

    def __call__(
        self, logits: Logits, batch: Batch, reference: Float[Tensor, "target token"] | None = None
    ) -> Float[Tensor, "setting example"]:
        """One number per setting and example, in float32 or wider.

        Args:
            logits: [setting, target, token], at the batch's targets.
            batch: says which tokens are right and wrong.
            reference: [target, token], the open run's logits, where `self.reference`.

        Raises:
            MetricError: the batch has no wrong answers, or no reference was given, and the metric needs it.
        """
        if self.wrong and batch.wrong is None and bool((batch.sign > 0).all()):
            raise MetricError(f"{self.name} compares with wrong answers, and the task gives none: use nll, or give 'wrong'")
        if self.reference and reference is None:
            raise MetricError(f"{self.name} compares with the open run, whose logits were not given")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return per_example(self.per_target(logits, batch, reference), batch, contrast=self.wrong)


def per_example(values: Values, batch: Batch, contrast: bool) -> Float[Tensor, "setting example"]:
    """Mean over a row's targets, then the sum over each example's rows: with their signs, or the right answer's row alone."""
    rows = values.new_zeros(len(values), len(batch.sign))
    count = values.new_zeros(len(batch.sign)).index_add(0, batch.target_row, values.new_ones(len(batch.target_row)))
    rows = rows.index_add(1, batch.target_row, values) / count.clamp(min=1)
    weight = batch.sign if contrast else batch.sign.clamp(min=0)
    out = values.new_zeros(len(values), len(batch))
    return out.index_add(1, batch.example, rows * weight.to(values.dtype))


def chosen(logits: Logits, tokens: Int[Tensor, "target choice"]) -> Values:
    """log sum exp of the logits of `tokens` (-1 fills up): the logit itself where there is one token."""
    picked = logits.gather(-1, tokens.clamp(min=0).expand(len(logits), -1, -1))
    if tokens.shape[1] == 1:
        return picked.squeeze(-1)
    return picked.masked_fill(tokens < 0, -torch.inf).logsumexp(-1)


def _log_probability(logits: Logits, batch: Batch, _: object = None) -> Values:
    return chosen(logits, batch.answers) - logits.logsumexp(-1)


def _logit_diff(logits: Logits, batch: Batch, _: object = None) -> Values:
    if batch.wrong is None:  # wrong answers of several tokens have rows of their own: the normalisers do not cancel
        return _log_probability(logits, batch)
    return chosen(logits, batch.answers) - chosen(logits, batch.wrong)


def _probability_diff(logits: Logits, batch: Batch, _: object = None) -> Values:
    if batch.wrong is None:
        return _log_probability(logits, batch).exp()
    normaliser = logits.logsumexp(-1)
    return (chosen(logits, batch.answers) - normaliser).exp() - (chosen(logits, batch.wrong) - normaliser).exp()


def _kl(logits: Logits, batch: Batch, reference: Float[Tensor, "target token"] | None) -> Values:
    assert reference is not None  # __call__ has checked
    log_p = reference.to(logits.dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def _l2(logits: Logits, batch: Batch, reference: Float[Tensor, "target token"] | None) -> Values:
    assert reference is not None  # __call__ has checked
    return (logits - reference.to(logits.dtype)).square().sum(-1)


def _top1(logits: Logits, batch: Batch, _: object = None) -> Values:
    return (logits.argmax(-1)[..., None] == batch.answers).any(-1).to(logits.dtype)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", True, False, False, False, +1, _logit_diff),
        Metric("probability", False, True, False, False, +1, lambda x, b, _: _log_probability(x, b).exp()),
        Metric("probability_diff", True, True, False, False, +1, _probability_diff),
        Metric("log_probability", False, True, False, False, +1, _log_probability),
        Metric("nll", False, True, False, False, -1, lambda x, b, _: -_log_probability(x, b)),
        Metric("kl", False, True, True, True, -1, _kl),
        Metric("l2", False, False, True, True, -1, _l2),
        Metric("top1", False, True, True, False, +1, _top1),
    )
}
"""Every metric by name. `logit_diff` of several right or wrong tokens is the difference of their log-sum-exps; of answers
of several tokens, the difference of mean log-probabilities per answer token. `l2` is the squared distance of the logits from the
open run's, over the whole vocabulary."""


def metric_named(name: str) -> Metric:
    """The metric called `name`; raises `MetricError` naming those there are."""
    if name not in METRICS:
        raise MetricError(f"there is no metric {name!r}: choose from {', '.join(METRICS)}")
    return METRICS[name]
