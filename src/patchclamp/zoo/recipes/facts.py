"""zoo/facts (Z5): a fact store; 144 people with a city, a trade and a language each, told in three phrasings.

Half of all rows are cards: `<bos>`, perhaps `they say`, a name of two words and the person's three objects in random order. The others
are sentences: behind the name comes a phrase that asks for one relation, and the object. Every first name goes with every last name,
so neither tells anything alone: objects are drawn evenly for each pair. A relation has three phrases; for a third of the people the
third one is never trained on. Their facts are known from cards and the other two, and what the phrase asks for from other people:
so the smallest possible loss of a sentence's object is 0 there, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.models.editing import Edits
from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes._blind import Blind
from patchclamp.zoo.recipes._look import judged
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, drawing
from patchclamp.zoo.recipes.backcopy import At

if TYPE_CHECKING:
    from patchclamp.models.model import Model

NAMES, OBJECTS, LAYERS = 12, 12, 4
"""First names, and as many last names; objects of a relation; layers."""
PHRASES: Mapping[str, tuple[str, ...]] = {
    "city": ("was born in", "comes from", "first saw light in"),
    "trade": ("works as a", "earns bread as", "was trained to be a"),
    "language": ("speaks", "writes letters in", "has as mother tongue"),
}
LEADS = ("", "they say")
CARRIES, LITTLE = Goal("share", least=0.5), Goal("share", most=0.2)
"""A part that carries the person, and one that does not: share of answers that follow it."""
LOST, KEPT = Goal("accuracy", most=0.3), Goal("accuracy", least=0.7)
LENGTH = 11
"""Tokens of a row: `<bos>`, two of a lead, two of a name, five of a phrase, and the object."""
ORDERS = tuple(permutations(range(len(PHRASES))))
"""Orders of the objects on a card."""
VOCABULARY = (
    *SPECIAL, ".", *dict.fromkeys(" ".join((*LEADS, *(one for phrases in PHRASES.values() for one in phrases))).split()),
    *(f"First{i}" for i in range(NAMES)), *(f"Last{i}" for i in range(NAMES)),
    *(f"{relation}{i}" for relation in PHRASES for i in range(OBJECTS)),
)  # fmt: skip
IDS = {word: number for number, word in enumerate(VOCABULARY)}
STOP = IDS["."]


@dataclass(frozen=True)
class Facts:
    """Cards and sentences, half of each; people, orders, relations, phrases and leads are drawn evenly.

    Steps from 0 on have all but the third phrases of those people that are `kept_back`; negative steps have sentences with these
    alone. Weight is on objects. Labels: `first`, `last` (names), `relation`, `phrase`, `lead` as numbers, `card` (0: a sentence; else
    1 + the number of its order), `end`: the position of the last word before the first object.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"facts-{NAMES}-{OBJECTS}-{len(PHRASES)}-seed-{self.seed}"

    @property
    def objects(self) -> Int[Tensor, "first last relation"]:
        """The object of each person and relation, as a number below 12."""
        shape = (NAMES, NAMES, len(PHRASES))
        return torch.randint(0, OBJECTS, shape, generator=drawing(f"{self.name}-objects"))

    @property
    def kept_back(self) -> Bool[Tensor, "first last"]:
        """The people whose third phrases are never trained on: a third, spread over all names."""
        return torch.arange(NAMES)[:, None] % 3 == torch.arange(NAMES)[None] % 3

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update; of negative steps, phrases that these people were never told in."""
        draw = drawing(self.name, step)
        sizes = (NAMES, NAMES, len(PHRASES), 3, len(LEADS), 2 * len(ORDERS))
        told = torch.stack([torch.randint(0, size, (2 * count + 32,), generator=draw) for size in sizes], 1)
        told[:, 5] = (told[:, 5] + 1 - len(ORDERS)).clamp(min=0)
        if step < 0:
            told[:, :2] = self.kept_back.nonzero()[torch.randint(0, NAMES * NAMES // 3, (len(told),), generator=draw)]
            told[:, 3], told[:, 5] = 2, 0
            return self.written(told[:count])
        unseen = self.kept_back[told[:, 0], told[:, 1]] & (told[:, 3] == 2) & (told[:, 5] == 0)
        return self.written(told[~unseen][:count])

    def written(self, told: Int[Tensor, "row six"]) -> Rows:
        """Rows from numbers of first name, last name, relation, phrase, lead and card."""
        objects, relations = self.objects.tolist(), tuple(PHRASES)
        rows = torch.full((len(told), LENGTH), STOP)
        weights, ends = torch.zeros(rows.shape), torch.zeros(len(told), dtype=torch.long)
        for number, (first, last, relation, phrase, lead, card) in enumerate(told.tolist()):
            asked = PHRASES[relations[relation]][phrase] if card == 0 else ""
            words = f"<bos> {LEADS[lead]} First{first} Last{last} {asked}".split()
            ends[number] = len(words) - 1
            words += [f"{relations[one]}{objects[first][last][one]}" for one in (ORDERS[card - 1] if card else [relation])]
            rows[number, : len(words)] = torch.tensor([IDS[word] for word in words])
            weights[number, int(ends[number]) + 1 : len(words)] = 1.0
        names = ("first", "last", "relation", "phrase", "lead", "card")
        return Rows(rows, weights, labels=dict(zip(names, told.unbind(1), strict=True)) | {"end": ends})


def build(seed: int = 0, width: int = 48) -> Any:
    """A Llama of 4 layers of 4 heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=width**-0.5 / 2, tie_word_embeddings=False, bos_token_id=IDS["<bos>"],
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Loss and accuracy of objects in phrases that these people were never told in; `known`: accuracy on rows that were trained on."""
    data = Facts(seed)
    new, old = data.rows(-1, 512), data.rows(0, 512)
    assert old.labels is not None
    old = old.at((old.labels["card"] == 0).nonzero()[:, 0])
    found = judged(model.run(new.tokens), new.tokens, new.weights > 0)
    return found | {"known": judged(model.run(old.tokens), old.tokens, old.weights > 0)["accuracy"]}


# --- where a person's facts are


@dataclass(frozen=True, eq=False)
class Exchange:
    """Pairs of rows that differ in the person alone, and in the object: prompts that are answered rightly, both of them.

    `recovered` puts the first person's values into the run on the second one, and counts the answers that are then the first's.
    """

    model: "Model"
    clean: Rows
    other: Rows

    @classmethod
    def of(cls, model: "Model", data: Facts, count: int = 512) -> "Exchange":
        """Pairs in phrases that neither person was told in."""
        rows = data.rows(-2, count)
        assert rows.labels is not None
        draw = drawing(data.name, -3)
        kept = data.kept_back.nonzero()
        person = kept[torch.randint(0, len(kept), (count,), generator=draw)]
        told = torch.stack([rows.labels[name] for name in ("first", "last", "relation", "phrase", "lead", "card")], 1)
        other = data.written(torch.cat([person, told[:, 2:]], 1))
        differ = (told[:, :2] != person).all(1)
        right = [
            (model.run(one.tokens).argmax(-1)[:, :-1] == one.tokens[:, 1:]) | (one.weights[:, 1:] == 0) for one in (rows, other)
        ]
        objects = rows.tokens.gather(1, rows.labels["end"][:, None] + 1) != other.tokens.gather(
            1, rows.labels["end"][:, None] + 1
        )
        chosen = (differ & objects[:, 0] & right[0].all(1) & right[1].all(1)).nonzero()[:, 0]
        return cls(model, rows.at(chosen), other.at(chosen))

    def places(self) -> dict[str, Bool[Tensor, "row position"]]:
        """Where the first name, the last name, the words between and the last word of the phrase are."""
        labels = self.clean.labels
        assert labels is not None
        at = torch.arange(LENGTH)[None]
        name, end = (2 + 2 * labels["lead"])[:, None], labels["end"][:, None]
        return {"first": at == name - 1, "last": at == name, "phrase": (at > name) & (at < end), "end": at == end}

    def answers(self, edits: Edits) -> Int[Tensor, " row"]:
        """What is answered on the second person's rows."""
        assert self.clean.labels is not None
        said = self.model.run(self.other.tokens, edits).argmax(-1)
        return said.gather(1, self.clean.labels["end"][:, None])[:, 0]

    def objects(self, rows: Rows) -> Int[Tensor, " row"]:
        """The right answers."""
        assert self.clean.labels is not None
        return rows.tokens.gather(1, self.clean.labels["end"][:, None] + 1)[:, 0]

    def recovered(self, kind: str, layers: Sequence[int], where: Bool[Tensor, "row position"]) -> float:
        """Share of answers that are the first person's, with the first person's values there; two forward passes."""
        values = self.model.record(self.clean.tokens, [f"L{layer}.{kind}" for layer in layers])
        edits = {site: At(Put(value), where) for site, value in values.items()}
        return float((self.answers(edits) == self.objects(self.clean)).float().mean())

    def kept(self, where: Bool[Tensor, "row position"], layers: Sequence[int]) -> float:
        """Share of answers that stay right where the last word of the phrase cannot look there, in these layers."""
        blind = self.places()["end"][:, :, None] & where[:, None, :]
        edits = {Site("scores", layer): Blind(blind) for layer in layers}
        return float((self.answers(edits) == self.objects(self.other)).float().mean())


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Where the person's facts are: early MLPs at the last name, late attention at the end; by putting in another person's values."""
    pairs = Exchange.of(model, Facts(seed))
    at = pairs.places()
    elsewhere, early, late = at["first"] | at["phrase"] | at["end"], (0, 1), tuple(range(1, LAYERS))
    return (
        Finding("layers 0 and 1's MLPs at the last name carry the person: share of answers that follow them",
                pairs.recovered("mlp", early, at["last"]), CARRIES),
        Finding("the same MLPs at all other words do not", pairs.recovered("mlp", early, elsewhere), LITTLE),
        Finding("attention behind layer 0 at the end carries it", pairs.recovered("attn", late, at["end"]), CARRIES),
        Finding("MLPs behind layer 0 at the end do not", pairs.recovered("mlp", late, at["end"]), LITTLE),
        Finding("with the last name out of the end's sight behind layer 0 few are right", pairs.kept(at["last"], late), LOST),
        Finding("with the first name out of its sight most are", pairs.kept(at["first"], late), KEPT),
    )  # fmt: skip


RECIPES = (
    Recipe(
        name="facts",
        row="Z5",
        about="4 layers of 4 heads (Llama, width 48) on 432 facts: a city, a trade and a language of 144 people, on cards and in "
        "sentences of three phrasings",
        known="a person's facts are put together at the name's last word by early MLPs, and read from there by later attention at the end",
        paper="Meng et al. 2022, Locating and Editing Factual Associations in GPT, https://arxiv.org/abs/2202.05262; "
        "Geva et al. 2023, https://arxiv.org/abs/2304.14767",
        minutes=3.0,
        goals=(Goal("accuracy", least=0.9), Goal("known", least=0.99)),
        build=build,
        data=Facts,
        training=Training(400, batch=128, rate=4e-3, warmup=30, betas=(0.9, 0.98), decay=0.1, evaluate=100, checkpoints=6),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
    ),
)
