"""In-context learning: a word map, shown by examples (`shots`) or said in words (`instruction`).

    Q: hot A: cold
    Q: big A: small
    Q: fast A:                              -> " slow"

    Write the opposite of the word. fast:   -> " slow"

The two forms ask the same of the same words, so that what serves one and not the other can be told apart. Corrupt prompts:
another query word (`query`), or for `shots` examples whose right sides are shuffled (`labels`), after which the map cannot be
told; the wrong answer is then the answer to another of the examples.

Papers: Todd et al. 2023, Function Vectors in Large Language Models, https://arxiv.org/abs/2310.15213; Nam et al. 2025, Causal
Head Gating, https://arxiv.org/abs/2505.13737.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import count_tokens, endless, fill, partners

Map = Literal["antonym", "past", "plural", "french", "capital"]
Form = Literal["shots", "instruction"]
Corrupt = Literal["query", "labels"]
Row = tuple[str, str]

_ONE_WAY: tuple[Row, ...] = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("good", "bad"), ("up", "down"), ("left", "right"), ("old", "young"),
    ("rich", "poor"), ("high", "low"), ("open", "closed"), ("happy", "sad"), ("light", "dark"), ("strong", "weak"),
    ("hard", "soft"), ("wet", "dry"), ("early", "late"), ("full", "empty"), ("long", "short"), ("true", "false"),
    ("day", "night"), ("black", "white"), ("male", "female"), ("win", "lose"), ("buy", "sell"), ("push", "pull"),
    ("first", "last"),
    ("love", "hate"), ("war", "peace"), ("before", "after"), ("above", "below"), ("inside", "outside"), ("thick", "thin"),
    ("wide", "narrow"), ("clean", "dirty"), ("best", "worst"), ("friend", "enemy"), ("north", "south"), ("east", "west"),
    ("more", "less"), ("many", "few"), ("positive", "negative"), ("public", "private"), ("maximum", "minimum"),
    ("success", "failure"), ("increase", "decrease"), ("begin", "end"), ("husband", "wife"), ("king", "queen"),
)  # fmt: skip

MAPS: dict[str, tuple[Row, ...]] = {
    "antonym": _ONE_WAY + tuple((two, one) for one, two in _ONE_WAY),
    "past": (
        ("go", "went"), ("see", "saw"), ("take", "took"), ("give", "gave"), ("come", "came"), ("eat", "ate"), ("run", "ran"),
        ("write", "wrote"), ("speak", "spoke"), ("find", "found"), ("make", "made"), ("know", "knew"), ("think", "thought"),
        ("buy", "bought"), ("bring", "brought"), ("sing", "sang"), ("drink", "drank"), ("begin", "began"), ("break", "broke"),
        ("choose", "chose"), ("drive", "drove"), ("fall", "fell"), ("feel", "felt"), ("fly", "flew"), ("forget", "forgot"),
        ("get", "got"), ("grow", "grew"), ("hear", "heard"), ("hold", "held"), ("keep", "kept"), ("leave", "left"),
        ("lose", "lost"), ("meet", "met"), ("pay", "paid"), ("say", "said"), ("sell", "sold"), ("send", "sent"), ("sit", "sat"),
        ("sleep", "slept"), ("stand", "stood"), ("teach", "taught"), ("tell", "told"), ("throw", "threw"), ("wear", "wore"),
        ("win", "won"), ("build", "built"), ("spend", "spent"), ("catch", "caught"), ("fight", "fought"), ("rise", "rose"),
    ),
    "plural": (
        ("man", "men"), ("woman", "women"), ("child", "children"), ("foot", "feet"), ("tooth", "teeth"), ("mouse", "mice"),
        ("wife", "wives"), ("life", "lives"), ("leaf", "leaves"), ("city", "cities"), ("baby", "babies"), ("story", "stories"),
        ("country", "countries"), ("box", "boxes"), ("dog", "dogs"), ("cat", "cats"), ("tree", "trees"), ("house", "houses"),
        ("book", "books"), ("king", "kings"), ("friend", "friends"), ("word", "words"), ("hand", "hands"), ("girl", "girls"),
        ("boy", "boys"), ("day", "days"), ("game", "games"), ("window", "windows"), ("river", "rivers"), ("party", "parties"),
        ("family", "families"), ("church", "churches"), ("class", "classes"), ("street", "streets"), ("horse", "horses"),
        ("letter", "letters"), ("doctor", "doctors"), ("teacher", "teachers"), ("idea", "ideas"), ("army", "armies"),
    ),
    "french": (
        ("the", "le"), ("and", "et"), ("with", "avec"), ("for", "pour"), ("in", "dans"), ("is", "est"), ("but", "mais"),
        ("we", "nous"), ("you", "vous"), ("on", "sur"), ("my", "mon"), ("one", "un"), ("two", "deux"), ("three", "trois"),
        ("four", "quatre"), ("good", "bon"), ("small", "petit"), ("big", "grand"), ("all", "tout"), ("well", "bien"),
        ("house", "maison"), ("man", "homme"), ("life", "vie"), ("world", "monde"), ("city", "ville"), ("day", "jour"),
        ("time", "temps"), ("sea", "mer"), ("wine", "vin"), ("white", "blanc"), ("black", "noir"), ("red", "rouge"),
        ("king", "roi"), ("god", "dieu"), ("country", "pays"), ("woman", "femme"), ("child", "enfant"), ("under", "sous"),
        ("where", "où"), ("who", "qui"), ("that", "que"), ("because", "parce"), ("new", "nouveau"), ("very", "très"),
    ),
    "capital": (
        ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("England", "London"),
        ("Japan", "Tokyo"), ("China", "Beijing"), ("Russia", "Moscow"), ("Egypt", "Cairo"), ("Greece", "Athens"),
        ("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Denmark", "Copenhagen"),
        ("Finland", "Helsinki"), ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Hungary", "Budapest"), ("Belgium", "Brussels"),
        ("Canada", "Ottawa"), ("Iran", "Tehran"), ("Iraq", "Baghdad"), ("Syria", "Damascus"), ("Thailand", "Bangkok"),
        ("Chile", "Santiago"), ("Scotland", "Edinburgh"), ("Switzerland", "Bern"), ("Cuba", "Havana"),
    ),
}  # fmt: skip
"""Word -> word, by the name of the map."""


class Wording(NamedTuple):
    """What an instruction asks for."""

    wanted: str
    kind: str


WORDINGS = {
    "antonym": Wording("opposite", "word"),
    "past": Wording("past tense", "verb"),
    "plural": Wording("plural", "noun"),
    "french": Wording("French translation", "word"),
    "capital": Wording("capital", "country"),
}

INSTRUCTIONS = (
    "Write the {wanted} of the {kind}. {query}:",
    "Give the {wanted} of each {kind}. {query}:",
    "What is the {wanted} of the {kind} {query}? The {wanted} of {query2} is",
    "The {wanted} of the {kind} {query} is",
    "Question: Which word is the {wanted} of {query}? Answer:",
    "Instruction: Say the {wanted} of the {kind}. Input: {query} Output:",
    "Task: find the {wanted}. The {kind} is {query}. The {wanted} is",
    "Please tell me the {wanted} of the {kind} {query}. It is",
)


def task(*, map: Map = "antonym", form: Form = "shots", shots: int = 5, corrupt: Corrupt = "query") -> Task:
    """The task with one word map, in one form, with that many examples and one way to corrupt."""
    if not 2 <= shots <= 12:
        raise TaskError(f"{shots} shots were asked for: give 2 to 12")
    if form == "instruction" and corrupt == "labels":
        raise TaskError("corrupt=labels shuffles the examples, and form=instruction has none: use form=shots or corrupt=query")
    return Task(
        "icl",
        f"In-context learning: the word map {map}, by {'examples' if form == 'shots' else 'instruction'}",
        partial(_candidates, map, form, shots, corrupt),
        single=True,
        options={"map": map, "form": form, "shots": shots, "corrupt": corrupt},
    )


def _candidates(name: Map, form: Form, shots: int, corrupt: Corrupt, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    rows = MAPS[name]
    tokens = count_tokens(tokenizer, (word for row in rows for word in row))

    def kind(row: Row) -> tuple[int, bool]:
        return tokens[row[0]], tokens[row[1]] == 1

    couples = partners(rng, rows, kind, frozenset)
    if form == "instruction":
        found = [_told(name, template, *ends) for pair in couples for ends in (pair, pair[::-1]) for template in INSTRUCTIONS]
        rng.shuffle(found)
        return iter(found)
    fitting = [row for row in rows if kind(row)[1]]
    good = [(one, two) for one, two in couples if kind(one) == kind(two) and kind(one)[1]]
    misfits = (_shown(rows, couple, shots, corrupt, rng) for couple in couples if couple not in good)
    if not good or len({frozenset(row) for row in fitting}) < shots + 2:  # the two queries are kept out of the examples
        return misfits
    return chain(misfits, endless(lambda: _shown(fitting, rng.choice(good), shots, corrupt, rng)))


def _shown(rows: Sequence[Row], couple: tuple[Row, Row], shots: int, corrupt: Corrupt, rng: random.Random) -> Pair:
    """A line for each example, then the query; every word has a blank before it, so that it is split as in running text."""
    (query, answer), (other, wrong) = rng.sample(couple, 2)
    shown, used = list[Row](), {query, answer, other, wrong}
    for row in rng.sample(rows, len(rows)):
        if len(shown) < shots and not used & set(row):
            shown.append(row)
            used |= set(row)
    right_sides = [row[1] for row in shown]
    template = "".join(f"Q: {{input{i}}} A: {{output{i}}}\n" for i in range(1, shots + 1)) + "Q: {query} A:"
    words = {f"input{i}": row[0] for i, row in enumerate(shown, 1)} | {"query": query}
    clean, spans = fill(template, words | _outputs(right_sides))
    if corrupt == "query":
        changed, _ = fill(template, {**words, **_outputs(right_sides), "query": other})
        return Pair(clean, f" {answer}", changed, f" {wrong}", spans)
    by = rng.randrange(1, shots)  # a rotation leaves no example right
    changed, _ = fill(template, words | _outputs(right_sides[by:] + right_sides[:by]))
    return Pair(clean, f" {answer}", changed, f" {rng.choice(right_sides)}", spans, mirrors=False)


def _outputs(words: Sequence[str]) -> dict[str, str]:
    return {f"output{i}": word for i, word in enumerate(words, 1)}


def _told(name: Map, template: str, one: Row, two: Row) -> Pair:
    wording = WORDINGS[name]._asdict()
    clean, spans = fill(template, {**wording, "query": one[0], "query2": one[0]})
    corrupt, _ = fill(template, {**wording, "query": two[0], "query2": two[0]})
    return Pair(clean, f" {one[1]}", corrupt, f" {two[1]}", {"query": spans["query"]})
