"""Controller: gates that are a function of the input, and the edits that they become."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.gating.dynamic.sight import Sight, generated, right_rows
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.parts import Parts
from patchclamp.parts.compiling import mix
from patchclamp.parts.fallbacks import Fallback
from patchclamp.parts.gated import Gated
from patchclamp.parts.tied import Tied
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True, eq=False)
class Controller:
    """gate logits = b[phase] + up down^T norm(x); gate = sigmoid(logits), or 1 where they are above 0 and else 0 (`hard`).

    Args:
        labels: the parts that it drives, in forward order; every other part stays open.
        sight: what x is, and how it is made comparable.
        bias: [phase, part], b: in the prompt, and behind it.
        up: [part, rank].
        down: [seen, rank].
        hard: whether gates are 0 or 1.
    """

    labels: tuple[Site, ...]
    sight: Sight
    bias: Float[Tensor, "2 part"]
    up: Float[Tensor, "part rank"]
    down: Float[Tensor, "seen rank"]
    hard: bool = True

    def soft(self) -> "Controller":
        """The same with gates between 0 and 1."""
        return replace(self, hard=False)

    def logits(
        self, seen: Float[Tensor, "row position seen"], behind: Bool[Tensor, "#row #position"]
    ) -> Float[Tensor, "row position part"]:
        """Gate logits from what is seen, and from whether tokens are behind the prompt."""
        bias = torch.where(behind[..., None], self.bias[1].to(seen.device), self.bias[0].to(seen.device))
        return bias + (seen @ self.down.to(seen)) @ self.up.to(seen).T

    def drive(
        self, seen: Float[Tensor, "row position seen"], behind: Bool[Tensor, "#row #position"]
    ) -> Float[Tensor, "row position part"]:
        """Gates of the driven parts."""
        logits = self.logits(seen, behind)
        return (logits > 0).to(logits.dtype) if self.hard else logits.sigmoid()

    def driven(self, model: Model, batch: Batch) -> Float[Tensor, "example #position part"]:
        """Gates of the driven parts on a batch; by position for scopes token and phase. One forward pass (static, phase: none)."""
        batch = batch.to(model.device)
        seen = self.sight.features(model, batch)
        behind = torch.zeros(1, 1, dtype=torch.bool, device=model.device)
        if self.sight.scope in ("token", "phase"):
            behind = generated(batch)[right_rows(batch, self.sight.scope)]
            seen = seen.expand(-1, behind.shape[1], -1)
        return self.drive(seen, behind)

    def gates(self, parts: Parts, batch: Batch) -> Float[Tensor, "1 example #position every"]:
        """Gates of all parts, for `parts.measure` and `parts.gradient`: one setting, other parts open.

        Raises:
            GateError: a driven part is not among `parts`.
        """
        driven = self.driven(parts.model, batch)
        gates = torch.ones(1, *driven.shape[:2], len(parts.labels), device=driven.device)
        gates[..., self.places(parts)] = driven[None].to(gates)
        return gates

    def places(self, parts: Parts | Tied) -> list[int]:
        """Where its gates are among those of `parts`; raises `GateError` where one is not."""
        index = {site: number for number, site in enumerate(parts.labels)}
        if missing := [site for site in self.labels if site not in index]:
            raise GateError(f"the controller drives {missing[0]}, which is not among the {len(parts.labels)} parts")
        return [index[site] for site in self.labels]

    def live(self, parts: Gated | Tied) -> bool:
        """Whether its gates can be computed in the gated pass itself: what it reads comes before every gate it drives.

        Then the stream there is what it is in the plain pass, for nothing before it was gated. A later site would see what its
        own gates do: such a controller reads the plain pass, also where it gates per token.
        """
        site = self.sight.site
        return site is None or all(site.key < place.key for place in sites_behind(parts).places)

    def edits(self, parts: Gated | Tied, fallback: Fallback, prompts: Batch | None = None) -> Edits:
        """The controller at work, as edits for `model.run`, `model.generate` and training.

        Scope static and phase need no prompts. Scope token reads the running pass where `live`, on new tokens too; else it
        takes its gates from a plain pass of `prompts`, and new tokens are refused. Scope example reads the plain pass of
        `prompts` at their last token and holds those gates for whatever follows.

        Args:
            parts: whose labels are driven; the same kind as the controller was fitted on, none at a position.
            fallback: what a closed gate passes; on new tokens what it says without a batch (mean, zero; resample is refused).
            prompts: what will run: its rows, in order.

        Cost: one forward pass over the prompts where they are needed.

        Raises:
            GateError: parts at positions, no prompts where they are needed, or a fallback without a value.
        """
        if any(site.position is not None for site in self.labels):
            raise GateError("a controller at work gates whole parts, and these are at positions: gate per token instead")
        held: Tensor | None = None
        if self.sight.scope == "example" or (self.sight.scope == "token" and not self.live(parts)):
            if prompts is None:
                raise GateError(
                    f"gates per {self.sight.scope} that read {self.sight.site} come from a plain pass of the prompts: give "
                    "prompts=, or read a site before every gate, per token"
                )
            held = self.driven(parts.model, prompts)[prompts.to(parts.model.device).example]
        values = fallback.at(prompts)
        inner = sites_behind(parts)
        held_sites = {site for label in self.labels for site in (parts.holds[label] if isinstance(parts, Tied) else (label,))}
        touched = [
            place for place, numbers in inner.by_place.items() if held_sites & {inner.labels[number] for number in numbers}
        ]
        return {place: Driven(self, parts, place, fallback, values[place], held) for place in sorted(touched)}


def sites_behind(parts: Gated | Tied) -> Gated:
    """The sites that gates act on: of tied parts, those that they hold."""
    return parts.inner if isinstance(parts, Tied) else parts


@dataclass(frozen=True, eq=False)
class Driven:
    """An edit at one place: the gates of its parts, from what the controller sees or `held` from the plain pass."""

    controller: Controller
    parts: Gated | Tied
    place: Site
    rule: Fallback
    fallback: Tensor
    held: Float[Tensor, "row #position part"] | None

    @property
    def reads(self) -> tuple[Site, ...]:
        """What the edit wants to see."""
        site = self.controller.sight.site
        return () if site is None or self.held is not None else (site,)

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        inner, gates = sites_behind(self.parts), self._gates(seen)
        every = torch.ones(*gates.shape[:2], len(self.parts.labels), device=gates.device, dtype=gates.dtype)
        every = every.index_copy(2, torch.tensor(self.controller.places(self.parts), device=gates.device), gates)[None]
        numbers = inner.by_place[self.place]
        mine = (self.parts.spread(every) if isinstance(self.parts, Tied) else every)[..., numbers]
        sites = [inner.labels[number] for number in numbers]
        new = seen.phase == "generation"  # what the rule says of the prompts it does not say of new tokens
        fallback = self.rule.at(None)[self.place] if new else self.fallback
        edit = mix(self.place, sites, mine, fallback, None, slice(None), self.parts.model.anatomy.sizes)
        return replace(edit, settings=seen.settings)(value, seen)

    def _gates(self, seen: Seen) -> Float[Tensor, "row #position part"]:
        controller, rows = self.controller, len(seen.mask)
        behind = torch.tensor([[seen.phase == "generation"]], device=seen.mask.device)
        if not controller.sight.reads:
            return controller.drive(torch.zeros(rows, 1, 0, device=seen.mask.device), behind)
        if self.held is None:
            site = controller.sight.site
            assert site is not None
            return controller.drive(controller.sight.of(seen.values[site], seen.positions, seen.mask), behind)
        if controller.sight.scope == "token" and seen.phase == "generation":
            raise GateError(
                f"the controller reads {controller.sight.site}, behind gates that it drives: on new tokens that needs a plain "
                "pass of its own. Read a site before every gate, or gate per example"
            )
        if rows % len(self.held):
            raise GateError(f"gates were made for {len(self.held)} rows, and {rows} run: give the prompts that will run")
        return self.held.repeat(rows // len(self.held), 1, 1)
