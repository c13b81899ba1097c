"""Plan: the frozen, hashable question of one study."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from patchclamp.discover.threshold import Order
from patchclamp.errors import PatchclampError
from patchclamp.gating import GatingSettings, gating_settings
from patchclamp.gating.dynamic.sight import SCOPES, Scope
from patchclamp.methods import Direction, method_names
from patchclamp.metrics import metric_named
from patchclamp.parts import FALLBACKS
from patchclamp.parts.gated import Routing

STEPS = ("gate", "attribute", "verify", "discover", "trust")
"""What a map does, in order; each can be asked for alone."""
EXTRA = ("relate", "dynamic", "contrast", "localise", "sets", "solutions")
"""What is done where it is asked for."""
FEWEST = 16  # prompts: four to confirm on
Budget = Literal["default", "code", "paper"]
Kind = Literal["nodes", "edges", "neurons"]
Search = Literal["threshold", "acdc", "greedy", "masks", "codes", "path"]


@dataclass(frozen=True)
class Plan:
    """What is asked. Two runs with equal plans, weights and tasks are the same run.

    Args:
        n: prompts in all (fit : select : confirm = 2 : 1 : 1); None: all rows of a file, 256 of a task that draws.
        seed: of the draw, the split, the fits and the intervals.
        metric: by default the task's.
        fallback: what a closed gate passes; by default resample where there are pairs, else mean. model: what another model, given
            beside the plan, has there on the same prompt.
        second: the fallback that effects are repeated under; by default mean (zero where mean is the first).
        direction: noising closes parts on clean prompts; denoising puts clean values into corrupt prompts.
        routing: of a mixture of experts: free, or frozen to that of the model's own run.
        method: the attribution that `attribute` gives beside exact effects.
        parts: what is asked about: nodes (heads and MLPs), edges or neurons (of which a screen finds those worth an exact effect).
        tied: instead of heads and MLPs, a mixture of parts, as sites and patterns: whole layers (`L9.block`), key/value heads
            (`L*.kv*`), heads, MLPs, experts (`L*.mlp.e*`), neurons (`L3.mlp.n*`), single positions (`L9.h6@-1`); see `parts.tied`.
        screen: the method that ranks edges or neurons first.
        compared: methods that `localise` puts side by side; by default `study.localise.METHODS`.
        search: of the circuit: threshold (parts in order of their effects), acdc, greedy, masks (gates learned by descent), codes (of
            heads, from a few pairs) or path (of neurons, one a layer); see `study.searches`.
        threshold: of acdc, what a part must be worth to stay; by default a hundredth of what closing everything takes.
        sparsity: of masks, the share of parts that they are to close; by default .9.
        mask_price: of masks, what an open gate costs, instead of a sparsity.
        updates: of masks, steps of their descent; by default 200.
        budget: of the learned gates: default, code (the authors' code), paper (its text).
        pressure: lambda of the learned gates; by default the budget's.
        faithfulness: what the circuit is to keep.
        order: by which the circuit's parts are taken.
        random_circuits: how many of the same size it is compared with.
        min_accuracy: of the model on the task; below it there is nothing to map.
        nulls: whether gates are also fitted to shuffled answers and re-initialised weights.
        force: fit gates even where answers hardly vary.
        pairs_of: how many parts, those of largest exact effect, have all their pairs closed together.
        dynamic: what gates may hang on: phase, example or token.
        sight: the residual stream that they read; by default that before the last block (example), or the embedding (token).
        contrast: another task, by name or file, that is to be lost while this one is kept.
        keep: how many parts learned sets are to hold.
        prices: of an open gate, in nats, of other learned sets.
        shapley: whether the parts whose pairs are closed also get Shapley values and interactions among themselves.
        screen_pairs: whether pairs among all parts are screened for, where `pairs_of` leaves parts out.
    """

    n: int | None = None
    seed: int = 0
    metric: str | None = None
    fallback: str | None = None
    second: str | None = None
    direction: Direction = "noising"
    routing: Routing = "free"
    method: str = "integrated"
    parts: Kind = "nodes"
    tied: tuple[str, ...] = ()
    screen: str = "gradient"
    compared: tuple[str, ...] = ()
    search: Search = "threshold"
    threshold: float | None = None
    sparsity: float | None = None
    mask_price: float | None = None
    updates: int | None = None
    budget: Budget = "default"
    pressure: float | None = None
    faithfulness: float = 0.85
    order: Order = "magnitude"
    random_circuits: int = 100
    min_accuracy: float = 0.75
    nulls: bool = True
    force: bool = False
    pairs_of: int = 60
    dynamic: Scope | None = None
    sight: str | None = None
    contrast: str | None = None
    keep: tuple[int, ...] = ()
    prices: tuple[float, ...] = ()
    shapley: bool = False
    screen_pairs: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("faithfulness", 0, 1), ("min_accuracy", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise PatchclampError(f"{name} {value} was asked for: choose a number from {low} to {high}")
        if self.seed < 0:
            raise PatchclampError(f"seed {self.seed} was asked for: choose 0 or more")
        if self.n is not None and self.n < FEWEST:
            raise PatchclampError(
                f"{self.n} prompts were asked for: a quarter of them has to carry an interval, so choose {FEWEST} or more"
            )
        if self.pressure is not None and not self.pressure > 0:
            raise PatchclampError(f"lambda {self.pressure} was asked for: choose a number above 0")
        if self.metric is not None:
            metric_named(self.metric)
        if self.method not in method_names():
            raise PatchclampError(f"there is no method {self.method!r}: choose from {', '.join(method_names())}")
        if unknown := [name for name in self.compared if name not in method_names()]:
            raise PatchclampError(f"there is no method {unknown[0]!r}: choose from {', '.join(method_names())}")
        if self.screen == "exact" or self.screen not in method_names():
            others = ", ".join(name for name in method_names() if name != "exact")
            raise PatchclampError(f"a screen by {self.screen!r} was asked for: choose from {others}")
        self._check_search()
        for name in ("fallback", "second"):
            kind = getattr(self, name)
            if kind is not None and kind.partition(":")[0] not in (*FALLBACKS, "model"):
                raise PatchclampError(f"there is no {name} {kind!r}: choose from {', '.join((*FALLBACKS, 'model'))}")
        if self.second is not None and self.second == self.fallback:
            raise PatchclampError(f"the second fallback is to be another than the first, and both are {self.second!r}")
        self._check_parts()
        if self.dynamic is not None and self.dynamic not in SCOPES:
            raise PatchclampError(f"there is no scope {self.dynamic!r} for dynamic gates: choose from {', '.join(SCOPES[1:])}")
        if self.sight is not None and self.dynamic is None:
            raise PatchclampError(f"the sight {self.sight!r} is of dynamic gates: say what they may hang on (--dynamic example)")
        if any(size < 1 for size in self.keep) or not all(price > 0 for price in self.prices):
            raise PatchclampError(
                f"sets of {', '.join(map(str, self.keep)) or 'any number of'} parts at {', '.join(map(str, self.prices)) or 'no'} nats a "
                "part were asked for: give 1 part or more, and prices above 0"
            )
        if self.pairs_of < 2:
            raise PatchclampError(f"pairs of {self.pairs_of} parts were asked for: choose 2 or more")
        if self.random_circuits < 1:
            raise PatchclampError(f"{self.random_circuits} random circuits were asked for: choose at least 1")

    def _check_search(self) -> None:
        if self.threshold is not None and (self.search != "acdc" or not self.threshold > 0):
            raise PatchclampError(
                f"a threshold of {self.threshold} and the search {self.search!r} were asked for: a threshold is above 0, and of acdc"
            )
        asked = [name for name in ("sparsity", "mask_price", "updates") if getattr(self, name) is not None]
        if asked and self.search != "masks":
            raise PatchclampError(f"{asked[0]} is of learned masks, and the search {self.search!r} was asked for: --search masks")
        if self.sparsity is not None and self.mask_price is not None:
            raise PatchclampError(
                f"a sparsity of {self.sparsity} and a price of {self.mask_price} were asked for: a mask is learned to one of the two"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise PatchclampError(f"a sparsity of {self.sparsity} was asked for: choose a share between 0 and 1, such as 0.95")
        if self.mask_price is not None and not self.mask_price > 0:
            raise PatchclampError(f"a price of {self.mask_price} was asked for: choose a number above 0")
        if self.updates is not None and self.updates < 1:
            raise PatchclampError(f"{self.updates} updates were asked for: choose 1 or more")
        if self.search == "codes" and (self.parts != "nodes" or self.tied):
            raise PatchclampError(
                f"codes are of heads, and {'--tied' if self.tied else f'--parts {self.parts}'} was asked for: leave that out"
            )
        if self.search == "path" and self.parts != "neurons":
            raise PatchclampError(f"a path is of neurons, and {self.parts} were asked for: --parts neurons")

    def _check_parts(self) -> None:
        if any(not pattern.strip() for pattern in self.tied):
            raise PatchclampError("a mixture of parts was asked for, and one of them has no name: L*.block,L*.kv*,L0.h*")
        if self.parts != "nodes" and self.tied:
            raise PatchclampError(
                f"{self.parts} and a mixture of parts ({', '.join(self.tied)}) were asked for: choose one (neurons in a mixture are L3.mlp.n*)"
            )
        if self.parts != "nodes" and "model" in (self.fallback, self.second):
            raise PatchclampError(
                f"{self.parts} and another model's values were asked for: these go with heads and MLPs, and with mixtures of parts (--tied)"
            )

    @property
    def gating(self) -> GatingSettings:
        """The settings of the learned gates."""
        changes: dict[str, object] = {"seed": self.seed, "one_sided": self.force}
        if self.pressure is not None:
            changes["lam"] = self.pressure
        if not self.nulls:
            changes["null_seeds"] = 0
        return gating_settings(self.budget, **changes)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Plan":
        """A plan as plan.json keeps it."""
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        return cls(**{name: value for name, value in given.items() if name in known})
