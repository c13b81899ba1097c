"""Doctor: proof of a model's anatomy on a short probe, one invariant at a time. `patchclamp doctor MODEL` prints it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchclamp.errors import FamilyError, PatchclampError
from patchclamp.models.editing import Edit, Seen
from patchclamp.models.inputs import token_batch
from patchclamp.models.invariants import RULES, Rule, Values, Worst, rounding
from patchclamp.models.model import Model
from patchclamp.models.probe import observed, places, probe_tokens
from patchclamp.models.scope import eager, still
from patchclamp.sites import KINDS, Site

EXACT = "nothing may change: the same kernel does the same sums in the same order"
ROUNDING = "rounding of a few operations in {dtype}"
KERNELS = "kernels may sum rows of another length in another order ({dtype})"
QUANTISED = "quantised weights round what they are given, so shares do not add up to the whole exactly"


@dataclass(frozen=True)
class Invariant:
    """One thing that must hold, and how far it is from holding.

    Attributes:
        name: what it is called in errors.
        about: what it says.
        measured: the worst deviation found (inf where it could not be measured).
        tolerance: what is allowed.
        why: why so much is allowed.
        where: where the worst deviation is, or what went wrong.
    """

    name: str
    about: str
    measured: float
    tolerance: float
    why: str
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return self.measured <= self.tolerance


@dataclass(frozen=True)
class Diagnosis:
    """All invariants of one model."""

    model: str
    family: str
    invariants: tuple[Invariant, ...]

    @property
    def passed(self) -> bool:
        """Whether all of them hold."""
        return all(invariant.passed for invariant in self.invariants)

    def rows(self) -> list[dict[str, str | float | bool]]:
        """One row per invariant, for a table."""
        return [
            {"invariant": i.name, "passed": i.passed, "measured": i.measured, "tolerance": i.tolerance, "where": i.where,
             "about": i.about, "why": i.why}
            for i in self.invariants
        ]  # fmt: skip

    def __str__(self) -> str:
        width = max(len(i.name) for i in self.invariants)
        lines = [
            f"{'ok  ' if i.passed else 'FAIL'} {i.name:{width}}  {i.measured:8.1e} of {i.tolerance:7.1e}"
            + (f"  ({i.where})" if i.where and not i.passed else "")
            for i in self.invariants
        ]
        verdict = "understood" if self.passed else "NOT understood"
        return "\n".join([f"{self.model}: {self.family}, {verdict}", *lines])


def examine(model: Model) -> Diagnosis:
    """Prove on five tokens that the model's sites are what they are called; that nothing looks ahead, where the model is causal.

    Cost: about 7 forward passes, and one for each of at most 17 kinds of site with as many rows as the model has layers.
    """
    anatomy = model.anatomy
    tokens = probe_tokens(anatomy)
    fires = partial(Invariant, "every site fires", "every place of every layer is passed through by a forward pass")
    try:
        values = observed(anatomy, places(anatomy), tokens)
    except FamilyError as error:
        return Diagnosis(model.name, anatomy.family.name, (fires(torch.inf, 0.0, EXACT, str(error)),))
    bad = 0.0 if bool(values[Site("logits")].isfinite().all()) else torch.inf
    first = (fires(0.0, 0.0, EXACT), Invariant("logits are numbers", "no NaN or infinite logits", bad, 0.0, EXACT))
    ahead = (_look_ahead,) if anatomy.causal else ()
    checks = (*(partial(_rule, rule) for rule in RULES), _observing, _identity, _final, *ahead, _padding, _effects)
    return Diagnosis(model.name, anatomy.family.name, (*first, *(check(model, values, tokens) for check in checks)))


def _measured(name: str, about: str, tolerance: float, why: str, measure: Callable[[], Worst | float]) -> Invariant:
    try:
        with torch.no_grad():
            found = measure()
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, PatchclampError) as error:
        return Invariant(name, about, torch.inf, tolerance, why, f"{type(error).__name__}: {error}")
    worst = found if isinstance(found, Worst) else Worst(found)
    return Invariant(name, about, worst.measured, tolerance, why, worst.where)


def _rule(rule: Rule, model: Model, values: Values, tokens: Tensor) -> Invariant:
    dtype = values[Site("logits")].dtype
    tolerance, why = rounding(dtype), ROUNDING.format(dtype=dtype)
    if rule.through_weights and _quantised(model):
        tolerance, why = 0.05, QUANTISED
    return _measured(rule.name, rule.about, tolerance, why, lambda: rule.check(model.anatomy, values))


def _quantised(model: Model) -> bool:
    """Whether an output projection is no plain matrix of floating-point weights."""

    def plain(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()

    return not all(plain(layer.output) for layer in model.anatomy.layers)


def _observing(model: Model, values: Values, tokens: Tensor) -> Invariant:
    def measure() -> float:
        with eager(model.anatomy), still(model.hf):
            plain = model.hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return _apart(plain, values[Site("logits")])

    return _measured("observing changes nothing", "logits with every site watched = logits without", 0.0, EXACT, measure)


def _identity(model: Model, values: Values, tokens: Tensor) -> Invariant:
    edits = {site: _same for site in values if KINDS[site.kind].writable}
    return _measured(
        "identity edits change nothing", "an equal tensor put at every site at once gives the same logits", 0.0, EXACT,
        lambda: _apart(model.run(tokens, edits), values[Site("logits")]),
    )  # fmt: skip


def _final(model: Model, values: Values, tokens: Tensor) -> Invariant:
    """With the last block's output destroyed, the recorded output of the final norm must still give the logits."""
    edits: dict[Site, Edit] = {Site("resid.post", model.layers - 1): _zero, Site("final"): partial(_put, values[Site("final")])}
    return _measured(
        "logits come from the final norm", "the unembedding reads the site `final` and nothing else", 0.0, EXACT,
        lambda: _apart(model.run(tokens, edits), values[Site("logits")]),
    )  # fmt: skip


def _look_ahead(model: Model, values: Values, tokens: Tensor) -> Invariant:
    def measure() -> Worst:
        changed = tokens.clone()
        changed[:, -1] = tokens[:, 1]
        other = observed(model.anatomy, places(model.anatomy), changed)
        worst = Worst()
        for site, value in values.items():
            if site.kind not in ("scores", "pattern"):  # the pattern's future is an invariant of its own
                worst |= Worst(_share(value[:, :-1], other[site][:, :-1]), str(site))
        return worst

    dtype = values[Site("logits")].dtype
    about = "another last token changes nothing before it"
    return _measured("no look-ahead", about, rounding(dtype), KERNELS.format(dtype=dtype), measure)


def _padding(model: Model, values: Values, tokens: Tensor) -> Invariant:
    def measure() -> Worst:
        short, long = tokens[0, :3], tokens[0]
        together = model.run(token_batch([long.tolist(), short.tolist()]))
        alone = model.run(short[None])
        return Worst(_share(together[1:, -3:], alone), "a row of 3 tokens beside one of 5")

    dtype = values[Site("logits")].dtype
    tolerance = min(4 * model.layers * rounding(dtype), 0.1)
    about = "a row padded on the left gives the logits it gives alone"
    return _measured("padding is not seen", about, tolerance, KERNELS.format(dtype=dtype) + ", in every layer", measure)


def _effects(model: Model, values: Values, tokens: Tensor) -> Invariant:
    """Every kind of site in every layer, one row of the batch per layer."""
    anatomy = model.anatomy

    def measure() -> Worst:
        silent: list[str] = []
        kinds = [kind for kind, row in KINDS.items() if row.writable and kind not in ("embed", "final", "logits", "head")]
        for kind in kinds:
            layers = [layer for layer in range(model.layers) if anatomy.why_not(Site(kind, layer)) is None]
            layers = [layer for layer in layers if _matters(values, kind, layer)]
            if layers:
                silent += [f"L{layer}.{kind}" for layer in _silent(model, kind, layers, tokens)]
        return Worst(float(len(silent)), ", ".join(silent[:6]))

    about = "zero put at any site of any layer changes what that layer makes of it"
    return _measured("edits take effect", about, 0.0, "a site whose edits are lost is no site", measure)


def _silent(model: Model, kind: str, layers: list[int], tokens: Tensor) -> list[int]:
    """The layers where zeroing has no effect: row i of the batch has layer i zeroed."""
    edits: dict[Site, Edit] = {Site(kind, layer): ZeroRow(row) for row, layer in enumerate(layers)}
    rows = tokens[:1].expand(len(layers), -1)
    sites = [Site(_shows(kind), layer) for layer in layers]
    plain, edited = model.record(rows, sites), model.record(rows, sites, edits)
    return [layer for row, (layer, site) in enumerate(zip(layers, sites, strict=True)) if _equal(plain, edited, site, row)]


def _equal(one: Values, two: Values, site: Site, row: int) -> bool:
    return torch.equal(one[site][row], two[site][row])


def _shows(kind: str) -> str:
    """Where in the same layer an edit must show: what reads the site, not what the edit was put into."""
    if kind in ("q", "k", "scores"):
        return "pattern"
    if kind in ("v", "pattern"):
        return "z"
    return {"z": "attn", "resid.pre": "q", "resid.mid": "mlp", "router": "expert", "neuron": "mlp", "expert": "mlp"}.get(
        kind, "resid.post"
    )


def _matters(values: Values, kind: str, layer: int) -> bool:
    """Whether zeroing can change anything: a site that holds zeros, or that weights of zero read, is idle, not unknown."""
    site, reader = Site(kind, layer), Site(_shows(kind), layer)
    if kind in ("q", "k"):
        scores = values[Site("scores", layer)]
        return bool((scores[scores > torch.finfo(scores.dtype).min / 2] != 0).any())
    return bool((values[site] != 0).any()) and bool((values[reader] != 0).any())


@dataclass(frozen=True)
class ZeroRow:
    """Zero in one row of the batch."""

    row: int

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        value = value.clone()
        value[self.row] = 0
        return value


def _zero(value: Tensor, seen: Seen, /) -> Tensor:
    return torch.zeros_like(value)


def _put(recorded: Tensor, value: Tensor, seen: Seen, /) -> Tensor:
    return recorded


def _same(value: Tensor, seen: Seen, /) -> Tensor:
    return value.clone()


def _apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def _share(one: Tensor, two: Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    scale = two.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((one.double() - two.double()).abs().max() / scale)
