"""What a controller sees: the residual stream at one site, made comparable, once per prompt or at every token."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder
from patchclamp.sites import KINDS, Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

Scope = Literal["static", "phase", "example", "token"]
SCOPES: tuple[Scope, ...] = ("static", "phase", "example", "token")
FLOOR = 1e-5  # a coordinate that varies by less than this share of its size varies by rounding only
WAVES = 8  # frequencies in which a position is written


@dataclass(frozen=True, eq=False)
class Sight:
    """What gates may hang on.

    Args:
        scope: "static": on nothing. "phase": on whether a token belongs to the prompt or was generated. "example": on the
            stream at the prompt's last token, one gate for all of the prompt and what follows it. "token": on the stream at
            each token, a gate for each.
        site: the residual stream that is read (scopes example and token).
        places: whether the position is seen too, as sines and cosines of 8 frequencies. `Sight` at `embed` with places is
            that of a controller which sees only position and token.
        mean: [width], of each coordinate over the prompts it was fitted to.
        gain: [width], one over its standard deviation there; 0 for a coordinate that hardly varies.
    """

    scope: Scope
    site: Site | None = None
    places: bool = False
    mean: Float[Tensor, " width"] | None = None
    gain: Float[Tensor, " width"] | None = None

    @property
    def reads(self) -> bool:
        """Whether it reads a site."""
        return self.scope in ("example", "token")

    @property
    def width(self) -> int:
        """How many numbers it gives."""
        return 0 if self.mean is None else len(self.mean) + (2 * WAVES if self.places else 0)

    def __str__(self) -> str:
        if not self.reads:
            return self.scope
        return f"{self.site}, each {self.scope}" + (", with its position" if self.places else "")

    def of(
        self,
        stream: Float[Tensor, "row position width"],
        positions: Int[Tensor, "row position"],
        mask: Bool[Tensor, "row position"],
    ) -> Float[Tensor, "row position seen"]:
        """norm(x) = (x - mean) / standard deviation, and the position; in float32 or wider; 0 under padding."""
        assert self.mean is not None and self.gain is not None  # only `look` makes one that reads
        wide = stream if stream.dtype == torch.float64 else stream.float()
        seen = (wide - self.mean.to(wide)) * self.gain.to(wide)
        seen = torch.cat([seen, waves(positions).to(seen)], -1) if self.places else seen
        return torch.where(mask[..., None], seen, torch.zeros_like(seen))  # padding may hold anything

    def features(self, model: Model, batch: Batch) -> Float[Tensor, "example #position seen"]:
        """What it sees of a batch in the model's own run: [example, position or 1, seen]. One forward pass, without gradient.

        The stream is that of the plain pass, whatever gates are on: that is what it is in the gated pass too, where the site
        comes before every gate.
        """
        batch = batch.to(model.device)
        if not self.reads:
            return torch.zeros(len(batch), 1, 0, device=model.device)
        rows = right_rows(batch, self.scope)
        assert self.site is not None
        stream, positions, mask = plain_stream(model, batch, self.site)[rows], batch.position_ids[rows], batch.mask[rows]
        if self.scope == "example":
            last = last_column(batch)[rows]
            one = torch.arange(len(last), device=last.device)
            stream, positions, mask = (value[one, last][:, None] for value in (stream, positions, mask))
        return self.of(stream, positions, mask)


def look(
    model: Model, examples: Examples, site: Site | str | None, scope: Scope, *, places: bool = False, batch_size: int = 64
) -> Sight:
    """A `Sight` whose mean and gain are learned on `examples`. One forward pass over them.

    Args:
        model: whose stream is read.
        examples: the prompts to be fitted to.
        site: a residual stream (`L1.resid.pre`, `embed`); None for the scopes static and phase.
        scope: see `Sight`.
        places: whether the position is seen too.
        batch_size: examples at once.

    Raises:
        GateError: a scope that is none, or a site that is missing, superfluous, or not a residual stream.
        SiteError: the model has no such site.
    """
    if scope not in SCOPES:
        raise GateError(f"there is no scope {scope!r}: choose from {', '.join(SCOPES)}")
    sight = Sight(scope)
    if not sight.reads:
        if site is not None or places:
            raise GateError(f"gates of scope {scope} read nothing: leave out {'places' if site is None else site}")
        return sight
    if site is None:
        raise GateError(f"gates of scope {scope} read the residual stream: name a site, such as L1.resid.pre")
    where = Site.parse(site) if isinstance(site, str) else site
    model.anatomy.require(where)
    if where != where.place or KINDS[where.kind].axes != KINDS["resid.post"].axes:
        raise GateError(f"a controller reads a residual stream, and {where} is none: try L1.resid.pre or embed")
    pieces = [_seen(model, batch, where, scope) for batch in examples.batches(batch_size)]
    values = torch.cat(pieces).double()
    mean, deviation = values.mean(0), values.std(0, correction=0)
    still = deviation <= FLOOR * values.abs().amax(0)
    gain = torch.where(still, 0.0, 1 / deviation.clamp(min=1e-30))
    return Sight(scope, where, places, mean.float(), gain.float())


def _seen(model: Model, batch: Batch, site: Site, scope: Scope) -> Float[Tensor, "token width"]:
    """The stream at every token (or the prompts' last ones) of a batch, one row per token."""
    batch = batch.to(model.device)
    rows = right_rows(batch, scope)
    stream = plain_stream(model, batch, site)[rows]
    if scope == "token":
        return stream[batch.mask[rows]]
    return stream[torch.arange(len(rows), device=stream.device), last_column(batch)[rows]]


def plain_stream(model: Model, batch: Batch, site: Site) -> Float[Tensor, "row position width"]:
    """A whole-layer site's value in the model's own run. One forward pass, the logits of one column."""
    recorder = Recorder(model.anatomy, (site,))
    with torch.no_grad(), recorder.session().open():
        model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=model.device))
    return recorder.kept[site.place]


def right_rows(batch: Batch, scope: Scope) -> Int[Tensor, " example"]:
    """Each example's row: that of its right answer.

    Raises:
        GateError: gates per token, and wrong answers that have rows of their own, whose tokens are others.
    """
    rows = (batch.sign > 0).nonzero()[:, 0]
    if scope in ("token", "phase") and len(rows) < len(batch.tokens):
        raise GateError(
            f"gates per {scope} take one row per example, and wrong answers of several tokens have rows of their own here: "
            "give prompts without them (dynamic.without_wrong), or take gates per example"
        )
    return rows


def last_column(batch: Batch) -> Int[Tensor, " row"]:
    """The column of each row's last prompt token."""
    return batch.spans["end"][:, 1] - 1


def generated(batch: Batch) -> Bool[Tensor, "row position"]:
    """Which columns hold tokens that follow the prompt."""
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
    return columns >= batch.spans["end"][:, 1:]


def waves(positions: Int[Tensor, "row position"]) -> Float[Tensor, "row position waves"]:
    """Sines and cosines of positions, of periods 2, 4, 8, ... 256."""
    angle = positions[..., None].double() * (2 * torch.pi / 2.0 ** torch.arange(1, WAVES + 1, device=positions.device))
    return torch.cat([angle.sin(), angle.cos()], -1)
