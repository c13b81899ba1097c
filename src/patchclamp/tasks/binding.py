"""Binding: who has what. "Anna lives in France. Paul lives in Peru. ... Paul lives in" -> " Peru".

Corrupt prompts: the question is about another of the entities (`query`), or two of the attributes change places
(`attributes`).

Paper: Feng & Steinhardt 2023, How do Language Models Bind Entities in Context?, https://arxiv.org/abs/2310.17191.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import NAMES as _NAMES
from patchclamp.tasks._words import endless, fill

Corrupt = Literal["query", "attributes"]

NAMES = _NAMES

COUNTRIES = ("France", "Germany", "Italy", "Spain", "England", "Japan", "China", "Russia", "Egypt", "Greece", "Portugal",
             "Ireland", "Norway", "Sweden", "Denmark", "Finland", "Poland", "Austria", "Hungary", "Belgium", "Canada",
             "Cuba", "Turkey", "Kenya", "Thailand", "Vietnam", "Peru", "Chile", "Scotland", "India")  # fmt: skip

OBJECTS = ("book", "cup", "pen", "ball", "hat", "key", "phone", "lamp", "bottle", "spoon", "ring", "card", "toy", "clock",
           "candle", "basket", "ticket", "map", "camera", "letter")  # fmt: skip

JOBS = ("teacher", "doctor", "farmer", "pilot", "lawyer", "driver", "singer", "writer", "nurse", "soldier", "judge", "painter",
        "dentist", "baker", "dancer")  # fmt: skip


class Relation(NamedTuple):
    """How one fact is told, and how it is asked after."""

    fact: str
    question: str
    attributes: tuple[str, ...]


RELATIONS = (
    Relation("{entity} lives in {attribute}.", "Question: Where does {query1} live? Answer: {query2} lives in", COUNTRIES),
    Relation("{entity} comes from {attribute}.", "We asked {query1} about home, and found that {query2} comes from", COUNTRIES),
    Relation("{entity} has the {attribute}.", "Question: What does {query1} have? Answer: {query2} has the", OBJECTS),
    Relation("{entity} bought a {attribute}.", "Later we met {query1}. As we know, {query2} bought a", OBJECTS),
    Relation("{entity} works as a {attribute}.", "Question: What does {query1} do? Answer: {query2} works as a", JOBS),
)


def task(*, corrupt: Corrupt = "query", entities: int = 3) -> Task:
    """The task with that many entities, and one way to corrupt."""
    if not 2 <= entities <= 8:
        raise TaskError(f"binding of {entities} entities was asked for: give 2 to 8")
    return Task(
        "binding",
        "Binding: the attribute that the context gives an entity",
        partial(_candidates, corrupt, entities),
        single=True,
        options={"corrupt": corrupt, "entities": entities},
    )


def _candidates(corrupt: Corrupt, entities: int, rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(corrupt, entities, rng))


def _pair(corrupt: Corrupt, entities: int, rng: random.Random) -> Pair:
    relation = rng.choice(RELATIONS)
    names, attributes = rng.sample(NAMES, entities), rng.sample(relation.attributes, entities)
    asked, other = rng.sample(range(entities), 2)
    facts = [
        relation.fact.replace("{entity}", f"{{entity{i}}}").replace("{attribute}", f"{{attribute{i}}}")
        for i in range(1, entities + 1)
    ]
    # "Context:" first, so that every name has a blank before it
    template = " ".join(["Context:", *facts, relation.question])
    words = {f"entity{i}": name for i, name in enumerate(names, 1)}
    words |= {f"attribute{i}": attribute for i, attribute in enumerate(attributes, 1)}
    query = {"query1": names[asked], "query2": names[asked]}
    clean, spans = fill(template, {**words, **query})
    if corrupt == "query":
        changed, _ = fill(template, {**words, "query1": names[other], "query2": names[other]})
    else:
        exchanged = {f"attribute{asked + 1}": attributes[other], f"attribute{other + 1}": attributes[asked]}
        changed, _ = fill(template, {**words, **query, **exchanged})
    spans |= {"entity": spans[f"entity{asked + 1}"], "attribute": spans[f"attribute{asked + 1}"]}
    return Pair(clean, f" {attributes[asked]}", changed, f" {attributes[other]}", spans)
