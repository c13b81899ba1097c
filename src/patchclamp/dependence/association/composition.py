"""Compositions: shares that sum to one (an attention row, what each head has of all that is written, gates' shares).

Shares are correlated because they compete: plain correlations of them mislead. Log ratios do not. With clr(x) = log x - mean log x
and K the pseudo-inverse of clr's covariance,

    theta_ij = -K_ij / sqrt(K_ii K_jj)

is the partial correlation of log(x_i / x_r) and log(x_j / x_r) given all other log ratios, for any reference part r; the
partial variance of i is 1 / K_ii. Paper: https://doi.org/10.1016/j.acags.2020.100026 (Erb, partial correlations in compositional
data analysis).
"""

import numpy as np
from jaxtyping import Float

from patchclamp.dependence.association.contract import Measure, Pairs, Values, shrink_factor
from patchclamp.dependence.association.partial import Partials, explained_by, intensity, partial_of, shrunk
from patchclamp.dependence.association.recording import Recorded
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.tasks import Examples

FLOOR = 1e-6
"""Shares below this are set to it before logarithms are taken (attention is never exactly 0 but where it is masked)."""


def clr(shares: Float[np.ndarray, "row part"], floor: float = FLOOR) -> Float[np.ndarray, "row part"]:
    """Log ratios to the geometric mean; zeros are replaced by `floor` times the row's sum.

    Raises:
        PatchclampError: a negative share, or a row without any.
    """
    if (shares < 0).any() or (shares.sum(1) <= 0).any():
        raise PatchclampError("shares are above 0 and a row has some: give attention rows, norms of writes or gates")
    logs = np.log(np.maximum(shares / shares.sum(1, keepdims=True), floor))
    return logs - logs.mean(1, keepdims=True)


def _frame(parts: int) -> Float[np.ndarray, "part rest"]:
    """An orthonormal basis of what is orthogonal to the vector of ones (ilr coordinates)."""
    return np.linalg.svd(np.eye(parts) - 1 / parts)[0][:, : parts - 1]


def clr_precision(logs: Float[np.ndarray, "row part"], how: str | float = "ledoit-wolf") -> Float[np.ndarray, "part part"]:
    """K. Shrinkage happens in isometric coordinates, where it does not depend on the choice of basis."""
    if logs.shape[1] < 3:
        raise PatchclampError(f"a composition of {logs.shape[1]} parts has no partial correlations: its parts only trade shares")
    frame = _frame(logs.shape[1])
    covariance = shrunk(logs @ frame, how)
    spread = np.linalg.eigvalsh(covariance)
    if spread[0] <= 1e-10 * max(spread[-1], 1e-10):
        raise PatchclampError(
            "some ratio of shares is the same in every row, so it correlates with nothing: leave those parts out"
        )
    return frame @ np.linalg.inv(covariance) @ frame.T


def log_ratio_partial(
    shares: Float[np.ndarray, "row part"], how: str = "ledoit-wolf", floor: float = FLOOR
) -> tuple[Float[np.ndarray, "part part"], Float[np.ndarray, " part"]]:
    """theta of every pair, and every part's partial variance; the same whichever part is the reference."""
    precision = clr_precision(clr(shares, floor), how)
    return partial_of(precision), 1 / np.diag(precision)


def prepare(left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Partials:
    """See `contract.Measure`. The values are clr coordinates already (what a condition took off them is linear).

    theta by the shrunk inverse, tested by the correlation of residuals clr K[:, ij] K[ij, ij]^-1 whose units change places: K has
    rank parts - 1, and its 2 x 2 blocks are invertible from 3 parts on.
    """
    if left is not right:
        raise PatchclampError("the parts of a composition compete within a row: log ratios have no lag")
    logs = np.hstack(list(left))
    rows, parts = logs.shape
    theta = partial_of(clr_precision(logs))
    isometric = logs @ _frame(parts)
    share = intensity(isometric, "empirical" if rows >= 2 * parts else "ledoit-wolf")
    tested = clr_precision(logs, share)
    ends = np.zeros((2, len(pairs), rows))
    for number, (i, j) in enumerate(pairs):
        both = np.linalg.solve(tested[np.ix_([i, j], [i, j])], tested[[i, j]] @ logs.T)
        both = both - both.mean(1, keepdims=True)
        ends[:, number] = both / np.linalg.norm(both, axis=1, keepdims=True)
    index = np.array(pairs, dtype=int).reshape(-1, 2)
    taken = round(explained_by(isometric, share)) - 2
    return Partials(theta[tuple(index.T)], ends[0], ends[1], shrink_factor(rows, freedom + taken))


LOG_RATIO = Measure("log-ratio partial correlation", prepare, two_sided=True, vectors=False)


def composed(sizes: Recorded, floor: float = FLOOR) -> Recorded:
    """Non-negative numbers of parts (norms of writes, gates, attention) as a composition: their clr coordinates.

    What `association(measure="log-ratio partial correlation")` takes.

    Raises:
        PatchclampError: a part's output is wider than one number; a negative share, or a row without any.
    """
    if wide := [part for part, value in zip(sizes.parts, sizes.values, strict=True) if value.shape[1] != 1]:
        raise PatchclampError(f"a composition has one number per part, and {wide[0]} has more: record a norm or a contribution")
    logs = clr(np.hstack(list(sizes.values)), floor)
    about = {**sizes.about, "what": f"log ratios of {sizes.about.get('what', 'shares')}"}
    made = sizes.with_values(tuple(column[:, None] for column in logs.T))
    return Recorded(made.parts, made.values, made.example, made.position, made.token, made.groups, made.spans, about)


def attention_row(model: Model, head: str | Site, examples: Examples, batch_size: int = 32) -> Recorded:
    """One head's attention from the last prompt token to each key, as a composition of keys: a row per prompt.

    Parts are the head's keys (`L1.h2@3`). Prompts must have one length. Cost: one forward pass over the examples.

    Raises:
        PatchclampError: this is no head, or prompts have several lengths.
    """
    site = Site.parse(head) if isinstance(head, str) else head
    if site.kind != "head" or site.position is not None:
        raise PatchclampError(f"attention rows are a head's, and {site} is none: write L1.h2")
    lengths = {len(item.clean) for item in examples}
    if len(lengths) > 1:
        raise PatchclampError(f"attention rows of {min(lengths)} to {max(lengths)} keys are no composition of the same parts")
    pattern, rows, spans = Site("pattern", site.layer, site.index), [], []
    for batch in examples.batches(batch_size):
        kept = model.record(batch, [pattern])[pattern]
        own = batch.sign > 0
        end = batch.spans["end"][own, 0]
        kept = kept[own.to(kept.device)]
        rows.append(kept[range(len(kept)), end.to(kept.device)].double().cpu().numpy()[:, : int(end.max()) + 1])
        spans.append(end.numpy())
    table = np.concatenate(rows)
    number = np.arange(len(table))
    about = {"model": model.name, "task": examples.task, "what": f"attention of {site}"}
    keys = tuple(f"{site}@{key}" for key in range(table.shape[1]))
    last = np.array([item.clean[-1] for item in examples])
    return Recorded(keys, tuple(column[:, None] for column in table.T), number, np.concatenate(spans), last,
                    tuple(groups_of(examples)), {}, about)  # fmt: skip
