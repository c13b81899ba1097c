"""Commands that read what heads do off one run, without closing anything: signals (why a head attends), flow (what heads bring)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Bos, Device, DeviceMap, Dtype, Json, ModelArgument, Revision, Tokenizer, Trust
from patchclamp.cli.patching import Out, Top
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    import polars as pl

    from patchclamp.models.model import Model

Heads = Annotated[list[str] | None, typer.Option("--head", help="Heads or patterns: L3.h*. May be repeated; default: all.")]
At = Annotated[
    list[int] | None,
    typer.Option("--at", help="Positions that are attended from; -1 is the last. May be repeated; default: all."),
]
Above = Annotated[float, typer.Option(help="Of a head's attention, the weight from which on it is said to attend somewhere.")]
Corpus = Annotated[
    Path | None,
    typer.Option(
        "--corpus", help="Instead of a prompt: text (.txt), JSONL, Parquet, or a folder of such files.", show_default=False
    ),
]
Count = Annotated[int, typer.Option("--texts", help="Rows of the corpus that are read, drawn at random.")]
Length = Annotated[int, typer.Option(help="Tokens of a row.")]
Column = Annotated[str, typer.Option(help="Of JSONL and Parquet.")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="Join all texts and cut them into rows; or a text per row.")]
Class = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        help="Only tokens of a class: word, capital, continuation, number, punctuation, newline, blank, first. May be repeated.",
    ),
]
Relation = Annotated[
    list[str] | None,
    typer.Option("--from", help="Only what comes from itself, previous, first, duplicate, induction, other. May be repeated."),
]
Threshold = Annotated[float, typer.Option(help="Of a prompt's routes: the least share of a state that is followed.")]
Seed = Annotated[int, typer.Option(help="Of the draw of rows.")]


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("signals")(signals)
    app.command("flow")(flow)


def signals(
    model: ModelArgument, prompt: Annotated[str, typer.Argument(help="The prompt.", show_default=False)], head: Heads = None,
    at: At = None, above: Above = 0.5, top: Top = 20, out: Out = None, dtype: Dtype = None, device: Device = None,
    device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None, trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Why heads attend where they do: the few directions that make up a score, who wrote them, and what goes without them."""
    from patchclamp.discover.signal_table import signal_table

    common.check_table(out, top)
    if not 0 <= above < 1:
        raise PatchclampError(f"--above {above:g} was given: a head's attention is a share, so choose from 0 to below 1")
    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    ids = loaded.encode(_given(prompt)).tokens[0]
    heads = [site for pattern in head or () for site in loaded.find(pattern)] or None
    if wrong := [str(site) for site in heads or () if site.kind != "head"]:
        raise PatchclampError(f"--head {wrong[0]} is no head: signals are of heads, as L3.h0 or L3.h*")
    with common.bars() as bars:
        found = signal_table(
            loaded, ids, heads, at, above=above, top=top, progress=lambda done, of: bars.progress("signals", done, of)
        )
    _kept(found, out)
    if as_json:
        common.print_json({"tokens": [str(loaded.tokenizer.decode([int(one)])) for one in ids], "signals": found.to_dicts()})
        return
    text = f"{loaded.name}: {found.height} places with more than {above:g} of a head's attention"
    common.out.print(Text(text, style="bold"))
    common.print_rows([_signal(row) for row in found.iter_rows(named=True)])
    common.out.print(
        Text("without: the weight once the signal is taken out of the key; others: as many other directions", style="dim")
    )
    _written(out)


def _signal(row: dict[str, Any]) -> dict[str, object]:
    """What is shown of a signal; the rest is in the table that is written."""
    return {
        "head": row["head"], "from": f"{row['query_token']} ({row['query']})", "to": f"{row['key_token']} ({row['key']})",
        "weight": row["weight"], "directions": f"{row['count']} of {row['rank']}",
        "key by": None if row["key_writer"] is None else f"{row['key_writer']} {row['key_share']:.0%}",
        "without": row["without"], "others": row["without_others"],
    }  # fmt: skip


def flow(
    model: ModelArgument, prompt: Annotated[str | None, typer.Argument(help="A prompt, or --corpus.", show_default=False)] = None,
    corpus: Corpus = None, texts: Count = 32, length: Length = 64, column: Column = "text", pack: Pack = True, kind: Class = None,
    relation: Relation = None, threshold: Threshold = 0.04, top: Top = 20, out: Out = None, seed: Seed = 0, bos: Bos = None,
    dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False, as_json: Json = False,
) -> None:  # fmt: skip
    """How much each state owes to each head: the routes of one prompt, or what heads bring over a corpus, by kind of token."""
    from patchclamp.discover.flow import CLASSES, RELATIONS, flow_heads
    from patchclamp.discover.flow import flow as flowing

    common.check_table(out, top)
    if (prompt is None) == (corpus is None):
        raise PatchclampError("flow is of one prompt or of a corpus: give PROMPT, or --corpus FILE, and not both")
    if prompt is not None and (kind or relation):
        raise PatchclampError("--class and --from are of a corpus: a prompt's routes are all shown")
    if unknown := [one for one in relation or () if one not in RELATIONS]:
        raise PatchclampError(f"--from {unknown[0]!r} was asked for: choose from {', '.join(RELATIONS)}")
    if unknown := [one for one in kind or () if one not in CLASSES]:
        raise PatchclampError(f"--class {unknown[0]!r} was asked for: choose from {', '.join(CLASSES)}")
    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    if prompt is not None:
        one = flowing(loaded, _given(prompt))
        found, tokens = one.routes(threshold=threshold), one.tokens[0]
        body: dict[str, Any] = {"tokens": list(tokens), "routes": found.to_dicts()}
        head = (
            f"{loaded.name}: contributions of {threshold:g} of a state and more, by which {tokens[-1]!r} came to its last state"
        )
        rows = [_route(row, tokens) for row in found.sort("level", "share", descending=True).head(top).iter_rows(named=True)]
    else:
        assert corpus is not None
        given = _rows(loaded, corpus, texts, length, column, pack, bos, seed)
        with common.bars() as bars:
            found = flow_heads(loaded, given, length=length + 1, progress=lambda done, of: bars.progress("texts", done, of))
        found = _chosen(found, kind, relation)
        body = {"rows": len(given), "tokens": sum(map(len, given)), "heads": found.to_dicts()}
        head = f"{loaded.name}: what heads bring, as a share of the state, over {body['tokens']} tokens of {len(given)} rows of {corpus}"
        rows = [_brought(row) for row in found.head(top).iter_rows(named=True)]
    _kept(found, out)
    if as_json:
        common.print_json(body)
        return
    common.out.print(Text(head, style="bold"))
    common.print_rows(rows)
    if prompt is not None:
        common.out.print(
            Text(
                "heads and residual: shares of what a block's attention leaves; an MLP: of the block's end, the rest being that",
                style="dim",
            )
        )
    _written(out)


def _rows(
    model: "Model", corpus: Path, count: int, length: int, column: str, pack: bool, bos: bool | None, seed: int
) -> list[list[int]]:
    """Rows of token ids, drawn from the corpus; with a first BOS where the tokenizer puts one, or as asked."""
    from patchclamp.training.texts import texts

    if count < 1:
        raise PatchclampError(f"--texts {count} was given: choose 1 or more")
    data = texts(corpus, model.tokenizer, length, pack=pack, column=column, seed=seed)
    some = data.rows(0, min(count, data.trained))
    given: list[list[int]] = [
        (row if mask is None else row[mask]).tolist()  # of rows that are filled up, the tokens alone
        for row, mask in zip(some.tokens, some.mask if some.mask is not None else [None] * len(some.tokens), strict=True)
    ]
    first: int | None = getattr(model.tokenizer, "bos_token_id", None)
    if first is None:
        if bos:
            raise PatchclampError("--bos was given, and the tokenizer has no such token: leave it out")
        return given
    begins = int(model.encode("a").tokens[0, 0]) == first if bos is None else bos
    return [[first, *row] if begins and row[:1] != [first] else row for row in given]


def _chosen(found: "pl.DataFrame", kinds: list[str] | None, relations: list[str] | None) -> "pl.DataFrame":
    """The rows asked for, largest share first."""
    if absent := [one for one in kinds or () if one not in found["class"].unique()]:
        raise PatchclampError(
            f"no token of these texts is of the class {absent[0]!r}: there are {', '.join(sorted(found['class'].unique()))}"
        )
    for name, wanted in (("class", kinds), ("relation", relations)):
        found = found if not wanted else found.filter(found[name].is_in(wanted))
    return found.sort("share", descending=True)


def _route(row: dict[str, Any], tokens: tuple[str, ...]) -> dict[str, object]:
    source, target = (f"{tokens[row[end]]} ({row[end]})" for end in ("source", "target"))
    return {"block": row["level"], "part": row["part"], "from": source, "to": target, "share": row["share"]}


def _brought(row: dict[str, Any]) -> dict[str, object]:
    span = None if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
    return {
        "head": row["site"],
        "to": row["class"],
        "from": row["relation"],
        "share": row["share"],
        "95 %": span,
        "tokens": row["tokens"],
    }


def _given(prompt: str) -> str:
    if not prompt:
        raise PatchclampError("the prompt is empty: give text to run")
    return prompt


def _kept(found: "pl.DataFrame", out: Path | None) -> None:
    if out is not None:
        common.write_table(found.write_parquet if out.suffix == ".parquet" else found.write_csv, out)


def _written(out: Path | None) -> None:
    if out is not None:
        common.out.print(Text(str(out)))
