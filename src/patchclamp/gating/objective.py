"""What learned gates minimise, and the settings of a fit.

    objective(M) = mean over examples of NLL(answer; G = sigmoid(M)) - lambda * reduce over gates of clamp(M, -c, c)

`reduce` is the mean over gates (the code of Nam et al., https://arxiv.org/abs/2505.13737) or their sum (the paper's text);
c = 4. lambda = 0 gives G; lambda > 0 pushes gates open and gives G+; lambda < 0 pushes them closed and gives G-.
"""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Stage:
    """One descent: at most `updates` steps of Adam, the learning rate going linearly from `rate` to `last_rate`."""

    updates: int
    rate: float
    last_rate: float


@dataclass(frozen=True)
class GatingSettings:
    """How gates are learned. Frozen and hashable: part of a study's question.

    Args:
        name: of the preset that these settings come from.
        seeds: how many fits, each from its own uniform random gates; folded into one batch.
        batch: examples per update; every seed sees the same ones.
        free: the descent without pressure, to G.
        pressed: the descents with pressure, to G+ and G-, both from where `free` ended.
        lam: lambda; what it weighs in nats says `pressure`.
        objective: whether lambda multiplies the mean or the sum of the clamped logits.
        clamp: c, the logit beyond which there is no pressure.
        clip: largest norm of one fit's gradient; None for none.
        memory: Adam's second constant. The usual .999 remembers a steep slope for a thousand updates, more than a small budget
            has: a gate that has once met a cliff would creep for the rest of it.
        settle: bring gates that the pressed descents leave half open to the end that the objective prefers (`fit.settle`).
        hold: keep logits within [-c, c]. Without it, a gate that the free descent drives past c feels no pressure and stays
            open in G- whatever it does; with it, gates lie between .018 and .982.
        window: updates over which a plateau is judged; 0: never stop early.
        still: a fit stops when over `window` updates no gate has moved by more than this, and the objective has not fallen by
            more than `level`.
        level: nats; see `still`.
        null_seeds: fits of each null; 0 leaves the nulls out (then no role can be called found).
        null_batch: examples per update of the nulls and of the refits.
        refits: updates of each refit at a third and at three times lambda; 0 leaves them out.
        held_out: prompts at most on which roles are judged.
        one_sided: fit although one answer dominates and no pair can be mirrored.
        seed: of the random gates, of the order of examples and of the nulls.
    """

    name: str = "default"
    seeds: int = 4
    batch: int = 32
    free: Stage = Stage(24, 1.0, 0.1)
    pressed: Stage = Stage(30, 0.7, 0.1)
    lam: float = 0.1
    objective: Reduction = "mean"
    clamp: float = 4.0
    clip: float | None = 1.0
    memory: float = 0.99
    settle: bool = True
    hold: bool = True
    window: int = 8
    still: float = 0.05
    level: float = 0.002
    null_seeds: int = 2
    null_batch: int = 16
    refits: int = 12
    held_out: int = 64
    one_sided: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.batch < 1 or min(self.free.updates, self.pressed.updates) < 1:
            raise GateError(f"gating needs at least one seed, one example and one update: {self}")
        if self.lam <= 0 or self.clamp <= 0:
            raise GateError(
                f"lambda and the clamp must be positive (G+ and G- give lambda its sign), not {self.lam} and {self.clamp}"
            )

    def for_null(self) -> "GatingSettings":
        """The same with the nulls' own seeds and batch."""
        return replace(self, seeds=self.null_seeds, batch=self.null_batch)

    def slope(self, parts: int) -> float:
        """Pressure per unit of one gate's logit, in nats: lambda / parts (mean) or lambda (sum)."""
        return self.lam / parts if self.objective == "mean" else self.lam

    def pressure(self, parts: int) -> float:
        """Nats that moving one gate all the way, from logit -c to c, is worth: 2 c lambda / parts (mean) or 2 c lambda (sum).

        A part is kept in G- where keeping it lowers the NLL by more than this, and closed in G+ where it costs more.
        """
        return 2 * self.clamp * self.slope(parts)


PRESETS: dict[str, GatingSettings] = {
    "default": GatingSettings(),
    "code": GatingSettings(
        "code", free=Stage(500, 1.0, 1.0), pressed=Stage(500, 1.0, 1.0), memory=0.999, settle=False, hold=False, window=0
    ),
    "paper": GatingSettings(
        "paper",
        seeds=10,
        batch=64,
        free=Stage(500, 0.1, 0.01),
        pressed=Stage(500, 0.5, 0.1),
        objective="sum",
        clip=None,
        memory=0.999,
        settle=False,
        hold=False,
        window=0,
    ),
}
"""`default`: a small budget that stops on a plateau. `code`: the authors' repository. `paper`: the published text."""


def gating_settings(name: str, **changes: object) -> GatingSettings:
    """The preset called `name` with some settings changed; raises `GateError` naming the presets there are."""
    if name not in PRESETS:
        raise GateError(f"there is no gating preset {name!r}: choose from {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


def penalty_slope(
    logits: Float[Tensor, "setting part"], lam: Float[Tensor, " setting"], settings: GatingSettings
) -> Float[Tensor, "setting part"]:
    """d/dM of -lambda * reduce clamp(M, -c, c): -lambda (over the number of parts) inside [-c, c], zero outside."""
    inside = (logits.abs() <= settings.clamp).to(logits.dtype)
    return -lam[:, None] * inside * (settings.slope(logits.shape[1]) / settings.lam)


def penalty(
    logits: Float[Tensor, "setting part"], lam: Float[Tensor, " setting"], settings: GatingSettings
) -> Float[Tensor, " setting"]:
    """-lambda * reduce clamp(M, -c, c), in nats."""
    clamped = logits.clamp(-settings.clamp, settings.clamp)
    return -lam * (clamped.mean(1) if settings.objective == "mean" else clamped.sum(1))
