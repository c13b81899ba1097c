"""Facts: "The city of Lyon lies in the country of" -> " France". Knowledge in the weights, with the subject as a span.

The corrupt prompt has another subject of the same relation and as many tokens. Two subjects matched this way form a group, so
that the sets of a split share no subject.

Papers: Meng et al. 2022, Locating and Editing Factual Associations in GPT, https://arxiv.org/abs/2202.05262; Geva et al. 2023,
Dissecting Recall of Factual Associations, https://arxiv.org/abs/2304.14767.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import count_tokens, fill, partners

Which = Literal["all", "city", "landmark", "athlete", "company", "language"]


class Relation(NamedTuple):
    """How a fact is told, and its answers with the subjects that have them."""

    templates: tuple[str, ...]
    subjects: dict[str, tuple[str, ...]]


RELATIONS = {
    "city": Relation(
        (
            "The city of {subject} lies in the country of",
            "A traveller who arrives in {subject} is in the country of",
            "Q: In which country is the city of {subject}? A: It is in",
            "My friend was born in {subject}, which is a city in",
        ),
        {
            "France": ("Lyon", "Marseille", "Nice", "Bordeaux", "Toulouse", "Strasbourg"),
            "Germany": ("Munich", "Hamburg", "Cologne", "Frankfurt", "Stuttgart", "Leipzig"),
            "Italy": ("Milan", "Naples", "Turin", "Florence", "Venice", "Bologna"),
            "Spain": ("Barcelona", "Seville", "Valencia", "Bilbao"),
            "Japan": ("Kyoto", "Osaka", "Hiroshima", "Nagasaki"),
            "China": ("Shanghai", "Guangzhou", "Shenzhen", "Nanjing"),
            "India": ("Mumbai", "Kolkata", "Bangalore", "Chennai"),
            "Canada": ("Montreal", "Vancouver", "Toronto", "Calgary"),
            "Australia": ("Sydney", "Melbourne", "Brisbane", "Adelaide"),
            "England": ("Manchester", "Liverpool", "Sheffield", "Leeds"),
            "Scotland": ("Glasgow", "Aberdeen"),
            "Pakistan": ("Karachi", "Lahore"),
            "Brazil": ("Rio de Janeiro", "Salvador"),
        },
    ),
    "landmark": Relation(
        (
            "A tourist who wants to see {subject} should go to the city of",
            "You will find {subject} in the city of",
            "Q: In which city is {subject}? A: It is in the city of",
            "We took a picture of {subject} when we were in",
        ),
        {
            "Paris": ("the Eiffel Tower", "the Louvre", "the Arc de Triomphe", "the Moulin Rouge"),
            "London": ("Big Ben", "Buckingham Palace", "Tower Bridge", "Hyde Park"),
            "Rome": ("the Colosseum", "the Trevi Fountain", "the Spanish Steps", "the Pantheon"),
            "Berlin": ("the Brandenburg Gate", "the Reichstag", "Checkpoint Charlie"),
            "Moscow": ("the Kremlin", "Red Square", "the Bolshoi Theatre"),
            "Athens": ("the Acropolis", "the Parthenon"),
            "Beijing": ("the Forbidden City", "Tiananmen Square"),
            "Istanbul": ("the Blue Mosque", "the Hagia Sophia"),
            "Boston": ("Fenway Park", "Faneuil Hall"),
            "Chicago": ("Wrigley Field", "the Willis Tower"),
            "Seattle": ("the Space Needle", "Pike Place Market"),
            "Dubai": ("the Burj Khalifa", "the Palm Jumeirah"),
            "Madrid": ("the Prado Museum", "the Royal Palace of Spain"),
            "Amsterdam": ("the Anne Frank House", "the Rijksmuseum"),
            "Toronto": ("the CN Tower", "the Royal Ontario Museum"),
        },
    ),
    "athlete": Relation(
        (
            "The athlete {subject} is famous for playing the sport of",
            "As a professional, {subject} played the game of",
            "Q: Which sport did {subject} play? A:",
            "My brother admires {subject}, because he also plays",
        ),
        {
            "basketball": ("Michael Jordan", "LeBron James", "Kobe Bryant", "Larry Bird", "Magic Johnson", "Tim Duncan"),
            "soccer": ("Lionel Messi", "Cristiano Ronaldo", "David Beckham", "Diego Maradona"),
            "tennis": ("Roger Federer", "Rafael Nadal", "Novak Djokovic", "Andre Agassi", "Pete Sampras", "Andy Murray"),
            "baseball": ("Babe Ruth", "Derek Jeter", "Barry Bonds", "Mickey Mantle", "Joe DiMaggio", "Willie Mays"),
            "hockey": ("Wayne Gretzky", "Sidney Crosby", "Bobby Orr", "Mario Lemieux", "Gordie Howe"),
            "golf": ("Tiger Woods", "Phil Mickelson", "Jack Nicklaus", "Arnold Palmer", "Rory McIlroy"),
            "football": ("Tom Brady", "Peyton Manning", "Joe Montana", "Jerry Rice", "Brett Favre"),
        },
    ),
    "company": Relation(
        (
            "The company {subject} was founded in the country of",
            "The headquarters of {subject} are in the country of",
            "Q: From which country does the company {subject} come? A: It comes from",
            "The first products of {subject} were sold in the country of",
        ),
        {
            "Japan": ("Toyota", "Honda", "Sony", "Nintendo", "Nissan", "Toshiba", "Mitsubishi"),
            "Germany": ("BMW", "Volkswagen", "Siemens", "Adidas", "Porsche", "Bosch"),
            "Italy": ("Ferrari", "Fiat", "Gucci", "Lamborghini", "Prada"),
            "France": ("Renault", "Peugeot", "Michelin", "Danone", "Chanel"),
            "Sweden": ("Volvo", "Ericsson", "Spotify", "Electrolux"),
            "Finland": ("Nokia", "Rovio"),
            "China": ("Huawei", "Alibaba", "Lenovo", "Xiaomi"),
            "India": ("Infosys", "Tata Motors"),
            "Switzerland": ("Rolex", "Novartis"),
            "Russia": ("Gazprom", "Lada"),
        },
    ),
    "language": Relation(
        (
            "The mother tongue of {subject} was",
            "In the letters home, {subject} wrote in the language called",
            "Q: Which language did {subject} grow up with? A:",
            "To read {subject} in the original, one has to learn",
        ),
        {
            "French": ("Victor Hugo", "Voltaire", "Marcel Proust", "Gustave Flaubert", "Jules Verne", "Charles Baudelaire"),
            "German": ("Friedrich Nietzsche", "Immanuel Kant", "Karl Marx", "Franz Kafka", "Thomas Mann", "Bertolt Brecht"),
            "Spanish": ("Miguel de Cervantes", "Pablo Neruda", "Jorge Luis Borges", "Federico Garcia Lorca"),
            "Italian": ("Dante Alighieri", "Niccolo Machiavelli", "Umberto Eco", "Italo Calvino"),
            "Russian": ("Leo Tolstoy", "Anton Chekhov", "Alexander Pushkin", "Ivan Turgenev", "Vladimir Lenin", "Maxim Gorky"),
            "English": ("William Shakespeare", "Charles Dickens", "Jane Austen", "Mark Twain", "George Orwell", "Oscar Wilde"),
        },
    ),
}


def task(*, relation: Which = "all") -> Task:
    """The task with one relation or all."""
    return Task(
        "facts",
        "Facts: what the model knows of a subject",
        partial(_candidates, relation),
        single=True,
        options={"relation": relation},
    )


def _candidates(which: Which, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    pairs: list[Pair] = []
    for name in RELATIONS if which == "all" else (which,):
        relation = RELATIONS[name]
        rows = [(subject, answer) for answer, subjects in relation.subjects.items() for subject in subjects]
        tokens = count_tokens(tokenizer, (word for row in rows for word in row))

        def kind(row: tuple[str, str], tokens: dict[str, int] = tokens) -> tuple[int, bool, bool]:
            return tokens[row[0]], tokens[row[1]] == 1, row[0].startswith("the ")

        for one, two in partners(rng, rows, kind, lambda row: row[1]):
            for template in relation.templates:
                for (subject, answer), (other, wrong) in ((one, two), (two, one)):
                    clean, spans = fill(template, {"subject": subject})
                    corrupt, _ = fill(template, {"subject": other})
                    group = f"{name}: {'/'.join(sorted((subject, other)))}"
                    pairs.append(Pair(clean, f" {answer}", corrupt, f" {wrong}", spans, group))
    rng.shuffle(pairs)
    return iter(pairs)
