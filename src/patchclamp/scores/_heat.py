"""A heat map in plain HTML, for notebooks: no script, no network."""

from html import escape

import polars as pl


def heat_table(table: pl.DataFrame) -> str:
    """Layer x head with an MLP column as an HTML table; blue above zero, orange below, the number on hover."""
    rows = [row for row in table.iter_rows(named=True) if row["kind"] in ("head", "mlp") and row["score"] is not None]
    if not rows:
        return ""
    size = max(abs(row["score"]) for row in rows) or 1.0
    columns = [*sorted({row["index"] for row in rows if row["kind"] == "head"}), None]
    cells = {(row["layer"], row["index"]): row for row in rows}
    out = ["<tr><td></td>", *(f"<th>{'MLP' if column is None else f'h{column}'}</th>" for column in columns), "</tr>"]
    for layer in sorted({row["layer"] for row in rows}):
        out.append(f"<tr><th>L{layer}</th>")
        for column in columns:
            row = cells.get((layer, column))
            if row is None:
                out.append("<td></td>")
                continue
            tone = "33,102,172" if row["score"] > 0 else "179,88,6"
            shade = f"rgba({tone},{abs(row['score']) / size:.2f})"
            out.append(
                f"<td title='{escape(row['site'])} {row['score']:+.4f}' style='background:{shade};min-width:1.6em'>&nbsp;</td>"
            )
        out.append("</tr>")
    return f"<table style='border-collapse:collapse;font-size:11px'>{''.join(out)}</table>"
