"""The steps of a map that measure something, each a function of what comes before it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import BaselineError, MetricError, TaskError
from patchclamp.methods import attribute, groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, benefits, sites_of
from patchclamp.scores import Scores
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.store.record import Baseline, Patterns, Prompt
from patchclamp.tasks import Examples
from patchclamp.tasks._shift import shifted

Progress = Callable[[int, int], None]


def metric_for(examples: Examples, asked: str | None) -> str:
    """The metric's name: the one asked for, else the task's; raises `MetricError` where the task cannot serve it."""
    metric = metric_named(asked or examples.metric)
    if metric.wrong and not examples[0].wrong:
        raise MetricError(
            f"{metric.name} compares with wrong answers, and the task {examples.task!r} gives none: use nll, or give 'wrong'"
        )
    return metric.name


def baseline(parts: Parts, examples: Examples, fallback: Fallback, metric: str) -> Baseline:
    """The behaviour with every gate open and every gate closed, and how often the model is right."""
    chosen, groups = metric_named(metric), groups_of(examples)
    opened, closed = benefits(parts, examples, torch.cat([parts.open(), parts.closed()]), fallback, chosen).double().numpy()
    right = None
    if examples[0].wrong:
        contrast = benefits(parts, examples, parts.open(), fallback, metric_named("logit_diff"))[0]
        right = float((contrast > 0).double().mean())
    top1 = float(benefits(parts, examples, parts.open(), fallback, metric_named("top1")).mean())
    return Baseline(
        metric=metric,
        open=mean_interval(chosen.sign * opened, groups),
        closed=mean_interval(chosen.sign * closed, groups),
        accuracy=right,
        top1=top1,
        majority=examples.majority,
        n=len(examples),
    )


def require(found: Baseline, examples: Examples, minimum: float) -> None:
    """No map of what the model cannot do; raises `BaselineError`."""
    if examples[0].targets:
        return  # plain text: every token is a target, and no share of right ones is demanded
    kind, share = ("accuracy", found.accuracy) if found.accuracy is not None else ("top-1 accuracy", found.top1)
    if share is not None and share < minimum:
        chance = "chance is 50 %" if found.accuracy is not None else f"always saying one answer gives {found.majority:.0%}"
        raise BaselineError(
            f"the model does not show the behaviour {examples.task!r}: {kind} {share:.0%} on {found.n} prompts, at least {minimum:.0%} "
            f"is needed ({chance}). Choose a model that can do it, easier prompts, or lower --min-accuracy knowingly"
        )


@dataclass(frozen=True)
class Shifted:
    """Effects of the top parts behind random prefixes, or why there are none."""

    scores: Scores | None
    reason: str = ""


def behind_prefixes(
    parts: Parts, model: Model, examples: Examples, kind: str, fallback: Fallback, top: Sequence[Site], metric: str, seed: int
) -> Shifted:
    """Exact effects of `top` on the same prompts behind random prefixes. Cost: one forward pass per part and one more."""
    longest = getattr(model.anatomy.config, "max_position_embeddings", None) or getattr(model.anatomy.config, "n_positions", None)
    try:
        moved = shifted(examples, longest, seed)
    except TaskError as error:
        return Shifted(None, str(error))
    if fallback.kind == "mean":  # learned by position, and positions have moved: learn it on moved prompts of its own
        fallback = parts.fallback(kind, fit=moved)
    chosen = metric_named(metric)
    gates = torch.cat([parts.open(), *(parts.without([site]) for site in top)])
    values = benefits(parts, moved, gates, fallback, chosen).double()
    about = {"method": "exact", "metric": metric, "fallback": fallback.kind, "prompts": "behind random prefixes", "seed": seed}
    return Shifted(Scores.from_samples(list(top), (values[0] - values[1:]).numpy(), about, groups=groups_of(examples), seed=seed))


def attributions(
    parts: Parts, examples: Examples, fallback: Fallback, metric: str, names: Sequence[str], seed: int, progress: Progress | None
) -> dict[str, Scores]:
    """Scores of each method on the same examples."""
    found: dict[str, Scores] = {}
    for name in names:
        try:
            found[name] = attribute(parts, examples, fallback, name, metric=metric, seed=seed, progress=progress)
        except MetricError:
            if len(names) == 1:
                raise
    return found


def prompts(model: Model, examples: Examples, metric: str, most: int = 6) -> tuple[Prompt, ...]:
    """The first examples with what the model gave each of their tokens."""
    some = examples.take(range(min(most, len(examples))))
    if some[0].targets:
        return tuple(_text_prompt(model, some, i) for i in range(len(some)))
    return tuple(_prompt(model, some, i, metric) for i in range(len(some)))


def _log_probabilities(model: Model, tokens: Sequence[int]) -> Float[Tensor, "position token"]:
    """Of what follows each of the tokens."""
    return model.run(torch.tensor([list(tokens)]))[0].float().log_softmax(-1).cpu()


def _given(logp: Float[Tensor, "position token"], tokens: Sequence[int]) -> Float[Tensor, " given"]:
    """What each of `tokens` was given by the row of `logp` before it."""
    return logp[: len(tokens)].gather(-1, torch.tensor([*tokens])[:, None])[:, 0]


def _prompt(model: Model, examples: Examples, i: int, metric: str) -> Prompt:
    example, decode = examples[i], examples.tokenizer.decode
    logp = _log_probabilities(model, example.clean)
    given = _given(logp, example.clean[1:])
    batch = examples.batch([i])
    with torch.no_grad():
        value = metric_named("logit_diff" if example.wrong else "log_probability")(
            model.target_logits(batch), batch.to(model.device)
        )

    def chance(answers: tuple[tuple[int, ...], ...]) -> float:
        if example.read:
            places = [example.spans[name][1] - 1 for name in example.read]
            return float(logp[places, [answer[0] for answer in answers]].exp().mean())
        if len(answers[0]) == 1:
            return float(logp[-1, [answer[0] for answer in answers]].exp().sum())
        # the last token of the answer is not read: in a model of few positions there is no room for it
        with_answer = _log_probabilities(model, (*example.clean, *answers[0][:-1]))
        return float(_given(with_answer[len(example.clean) - 1 :], answers[0]).sum().exp())

    return Prompt(
        tokens=examples.texts(i),
        probabilities=(None,) * len(example.clean) if example.read else (None, *given.exp().tolist()),
        answer=_shown(example.pair.answer),
        p_answer=chance(example.answers),
        metric=float(value[0, 0]),
        wrong=_shown(example.pair.wrong) if example.wrong else None,
        p_wrong=chance(example.wrong) if example.wrong else None,
        corrupt=None if example.corrupt is None else tuple(str(decode([token])) for token in example.corrupt),
    )


def _text_prompt(model: Model, examples: Examples, i: int) -> Prompt:
    given = _given(_log_probabilities(model, examples[i].clean), examples[i].clean[1:])
    texts = examples.texts(i)
    return Prompt(texts, (None, *given.exp().tolist()), texts[-1], float(given[-1].exp()), float(given.mean()))


def _shown(answers: object) -> str:
    texts = [str(answer) for answer in answers] if isinstance(answers, tuple | list) else [str(answers)]
    return " / ".join(texts[:4]) + (f" ... ({len(texts)})" if len(texts) > 4 else "")


def patterns(model: Model, examples: Examples, heads: Sequence[Site]) -> Patterns | None:
    """Attention patterns of `heads` on the first prompt."""
    if not heads:
        return None
    ids = torch.tensor([list(examples[0].clean)])
    found = model.record(ids, [Site("pattern", head.layer, head.index) for head in heads])
    weights = np.stack([found[Site("pattern", head.layer, head.index)][0].float().cpu().numpy() for head in heads])
    return Patterns(tuple(map(str, heads)), examples.texts(0), weights)


def top_parts(scores: Scores, parts: Parts, k: int, heads_only: bool = False) -> list[Site]:
    """The k parts of largest absolute score, in order."""
    values = dict(zip(scores.sites, scores.values(), strict=True))
    sites = [site for site in sites_of(parts) if not heads_only or site.kind == "head"]
    return sorted(sites, key=lambda site: -abs(float(values[site])))[:k]
