"""Describing sites from the one table of kinds: for a model (`patchclamp sites MODEL`) and for the docs (docs/sites.md)."""

from patchclamp import sites
from patchclamp.models.anatomy import Anatomy
from patchclamp.sites import KINDS, PER_HEAD, PER_KV, Site


def pattern_of(kind: str) -> str:
    """The pattern that fits every site of a kind: L*.h*.q."""
    if kind in ("embed", "final", "logits"):
        return kind
    if kind in PER_HEAD or kind == "head":
        return "L*.h*" if kind == "head" else f"L*.h*.{kind}"
    if kind in PER_KV:
        return f"L*.kv*.{kind}"
    return {"neuron": "L*.mlp.n", "expert": "L*.mlp.e"}.get(kind, f"L*.{kind}")


def describe(anatomy: Anatomy) -> list[dict[str, str | bool]]:
    """One row per kind of site: pattern, layers that have it, axes with sizes, writable or not, how obtained, why absent."""
    rows: list[dict[str, str | bool]] = []
    for kind, row in KINDS.items():
        layered = kind not in ("embed", "final", "logits")
        reasons = [anatomy.why_not(Site(kind, layer if layered else None)) for layer in range(len(anatomy.layers))]
        there = [layer for layer, reason in enumerate(reasons) if reason is None]
        absent = next((reason for reason in reasons if reason is not None), "")
        rows.append({
            "site": pattern_of(kind),
            "layers": _ranges(there) if layered else "",
            "axes": ", ".join(_sized(anatomy, axis, there) for axis in row.axes) if there else "",
            "writable": row.writable,
            "obtained": row.obtained if there else "",
            "absent": absent,
        })  # fmt: skip
    return rows


def _sized(anatomy: Anatomy, axis: str, layers: list[int]) -> str:
    sizes = [anatomy.sizes[layer] for layer in layers]
    found = {
        "head": {size.heads for size in sizes},
        "kv_head": {size.kv_heads for size in sizes},
        "head_width": {size.head_width for size in sizes},
        "neuron": {size.neurons for size in sizes},
        "expert": {size.experts for size in sizes},
        "width": {int(anatomy.config.hidden_size)},
        "token": {int(anatomy.config.vocab_size)},
    }.get(axis, set())
    numbers = sorted(size for size in found if size is not None)
    return f"{axis} {'/'.join(map(str, numbers))}" if numbers else axis


def _ranges(numbers: list[int]) -> str:
    """0-3, 5, 7-8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def page() -> str:
    """The text of docs/sites.md."""
    grammar = (sites.__doc__ or "").partition("The grammar, by example::\n\n")[2].partition("\n\n``KINDS``")[0]
    lines = [
        "# Sites",
        "",
        "A site is a place in a model's computation. Recording, editing, parts and reports name sites in one language:",
        "",
        "```text",
        *(line.removeprefix("    ") for line in grammar.splitlines()),
        "```",
        "",
        "In patterns `*` stands for any index and `L2-5` for a range of layers: `L*.mlp` fits every MLP, `L0-3.h*.q` the queries of "
        "four layers.",
        "`patchclamp sites MODEL` prints this table with a model's own sizes, and why it lacks what it lacks;",
        "`patchclamp doctor MODEL` proves that the sites are what they are called.",
        "",
        "| site | axes of the whole layer | can be edited | how the value is read | absent when |",
        "|---|---|---|---|---|",
        *(
            f"| `{pattern_of(kind)}` | {', '.join(row.axes)} | {'yes' if row.writable else 'no'} | {row.obtained} | {row.absent} |"
            for kind, row in KINDS.items()
        ),
        "",
        "While text is generated, an edit is shown one stretch of positions at a time: the prompt, then each new token. At keys and",
        "values, which attention reads whole, every call shows every stretch so far; at scores and patterns a stretch is its queries.",
        "So the same edits give the same tokens with and without a cache. `@prompt` and `@generation` name the two phases.",
        "",
        "This page is made from the table in `src/patchclamp/sites.py`: `python -m patchclamp.models.describe > docs/sites.md`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
