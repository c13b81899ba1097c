"""The page of a development: curves with their phase changes, every part's effect over training, when each formed."""

from pathlib import Path
from typing import Any

import polars as pl

from patchclamp.develop import Development, load_development
from patchclamp.files import write_atomically
from patchclamp.report.page import Figure, figure, fill
from patchclamp.report.strips import (
    LARGEST,
    film_strip,
    learning_curve,
    number_strip,
    pair_strip,
    role_strip,
    slider,
    task_curve,
)

_WORDS = {
    "stays": "formed and stays",
    "turns": "formed after the other sign",
    "lost": "formed and was lost",
    "never": "never clear",
}


def write_development(folder: str | Path) -> Path:
    """Make report.html from a finished development in its folder; returns its path.

    Raises:
        StoreError: it is not finished, damaged, or cannot be written.
    """
    path = Path(folder) / "report.html"
    write_atomically(path, fill("development.html.jinja", context(load_development(folder))).encode())
    return path


def context(found: Development) -> dict[str, Any]:
    """Everything that the template names."""
    tasks = [] if found.maps.is_empty() else found.maps["task"].unique(maintain_order=True).to_list()
    marks = found.phases.filter(pl.col("verdict") == "turns")
    told = [_task(found, task, number) for number, task in enumerate(tasks)]
    return {
        "sections": [
            ("curves", "Curves"),
            *((task["id"], task["name"]) for task in told),
            ("parts", "Measures of parts"),
            ("phases", "Where curves turn"),
            ("provenance", "Provenance"),
        ],
        "title": f"Development of {_short(str(found.about['checkpoints'][0][1]))}",
        "steps": found.steps,
        "of": len(found.steps),
        "curves": _curves(found, marks),
        "by_part": _by_part(found),
        "phases": found.phases.to_dicts(),
        "tasks": told,
        "failed": found.baselines.filter(pl.col("error") != "").to_dicts(),
        "plan": {key: value for key, value in found.about.items() if key not in ("checkpoints", "steps")},
        "checkpoints": found.about["checkpoints"],
    }


def _short(model: str) -> str:
    path = Path(model)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.parent.name or model


def _task(found: Development, task: str, number: int) -> dict[str, Any]:
    maps = found.maps.filter(pl.col("task") == task)
    base = found.baselines.filter((pl.col("task") == task) & (pl.col("error") == ""))
    lived = found.lives.filter(pl.col("task") == task)
    figures = [
        figure(
            f"metric-{number}",
            task_curve(base, "container"),
            "The metric with every part open and closed",
            "Band: 95 % interval of all open.",
        )
    ]
    figures += [
        figure(
            f"strip-{number}",
            film_strip(maps, "container"),
            "Exact effect of closing each part alone, checkpoint by checkpoint",
            "Blue: closing the part makes the behaviour worse (it facilitates); orange: better (it interferes). Dots: q ≤ .05.",
        )
    ]
    figures += [
        figure(
            f"slider-{number}",
            slider(maps, "container"),
            "The map at one checkpoint",
            "Move the slider to choose the checkpoint.",
        )
    ]
    if "role" in maps.columns and maps["role"].drop_nulls().len():
        figures.append(
            figure(
                f"roles-{number}",
                role_strip(maps, "container"),
                "Role of each part, checkpoint by checkpoint",
                "Letters as in the key; roles come from learned gates, see reading-a-report.",
            )
        )
    pairs = found.pairs if found.pairs.is_empty() else found.pairs.filter(pl.col("task") == task)
    if pairs.height:
        figures.append(
            figure(
                f"pairs-{number}", pair_strip(pairs, "container"), "Interaction of the strongest pairs, checkpoint by checkpoint"
            )
        )
    counts = {word: int((lived["word"] == word).sum()) for word in _WORDS}
    return {
        "id": f"task-{number}",
        "name": task,
        "figures": figures,
        "counts": [(text, counts[word]) for word, text in _WORDS.items() if counts[word]],
        "lives": lived.filter(pl.col("word") != "never").head(LARGEST).to_dicts(),
    }


def _curves(found: Development, marks: pl.DataFrame) -> list[Figure]:
    """A chart per number of the whole model, the training's own first."""
    frame = found.curves.filter((pl.col("part") == "") & _changes()).sort(pl.col("measure") != "training", maintain_order=True)
    figures: list[Figure] = []
    for (measure, name), one in frame.group_by("measure", "name", maintain_order=True):
        caption = f"{measure}: {name}"
        figures.append(figure(_id(measure, name), learning_curve({caption: one}, marks, "container"), caption))
    return figures


def _by_part(found: Development) -> list[Figure]:
    """A film strip per number that parts have."""
    frame = found.curves.filter((pl.col("part") != "") & _changes())
    return [
        figure(_id(measure, name, "parts"), number_strip(one, "container"), f"{measure}: {name}")
        for (measure, name), one in frame.group_by("measure", "name", maintain_order=True)
    ]


def _changes() -> pl.Expr:
    """Numbers that are the same at every step of every part are no curves."""
    return pl.col("value").n_unique().over("measure", "name") > 1


def _id(*words: object) -> str:
    return "-".join("".join(letter if letter.isalnum() else "-" for letter in str(word)) for word in words)
