"""A made-up study of 5 layers x 8 heads, shaped like a real one, for the tests of store and report."""

import numpy as np
import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.scores import Agreement, Scores
from patchclamp.scores.statistics import Interval
from patchclamp.sites import Site
from patchclamp.store.record import Baseline, Claim, ModelInfo, Null, Patterns, Prompt, Provenance, Record, TaskInfo, Trust
from patchclamp.store.sections import Alternatives, Contrasts, Dynamics, KeptSets, Localisation, Relations

PARTS = [
    Site("embed"),
    *(site for layer in range(5) for site in (*(Site("head", layer, i) for i in range(8)), Site("mlp", layer))),
]
STRONG = {
    "L0.h3": 0.8,
    "L0.mlp": 1.4,
    "L1.h5": 0.6,
    "L2.h2": 1.1,
    "L3.h6": 2.3,
    "L4.h1": 1.7,
    "L4.h6": -1.2,
    "L3.h0": -0.5,
    "L4.mlp": 0.4,
}
TOKENS = ("<s>", "When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John", " gave", " a", " drink", " to")


def fake_record(hostile: str = "") -> Record:
    """The study; `hostile` is put into every text that comes from models and tasks."""
    random = np.random.default_rng(7)
    samples = np.stack([random.normal(STRONG.get(str(site), 0.0), 0.6, size=120) for site in PARTS])
    exact = Scores.from_samples(PARTS, samples, {"method": "exact"}).table
    model = ModelInfo(f"zoo/small{hostile}", "llama", 5, (8,) * 5, 1_843_200, "9f2c" * 16)
    task = TaskInfo(
        f"ioi{hostile}", "the indirect object of a sentence with two names", "41aa" * 16, 256, 128, 120, {"two tokens": 14}, 0.09
    )
    return Record(
        headline="zoo/small names the indirect object with 7 of 45 parts; L4.h6 and L3.h0 work against it.",
        plan={"metric": "logit_diff", "fallback": "resample", "seed": 0, "gating": {"lambda": 0.1, "seeds": 4}},
        provenance=Provenance(
            model, task, {"patchclamp": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}, "cpu, 2 threads", (0, 1, 2, 3),
            {"baseline": 0.8, "roles": 24.1, "scores": 3.2, "exact": 6.7, "circuit": 4.4, "trust": 8.0}, 812_000_000,
            "0f3a9c21b7de" * 5 + "ab12", "patchclamp map zoo/small ioi --seed 0", "2026-03-04T10:12:13+00:00",
        ),
        baseline=Baseline(
            "logit_diff", Interval(3.21, 3.02, 3.4, 120), Interval(-3.18, -3.37, -2.99, 120), 0.99, 0.95, 0.09, 120
        ),
        scores=scores_frame(exact, random),
        fallbacks=("resample", "mean"),
        agreement={
            "gradient": Agreement(0.81, 0.66, 1, 9, "L4.h6", 46),
            "integrated": Agreement(0.93, 0.8, 0, 9, "L3.h0", 46),
            "random": Agreement(-0.04, -0.02, 5, 9, "L3.h6", 46),
            "second fallback": Agreement(0.88, 0.71, 0, 9, "L0.mlp", 46),
            "random prefixes": Agreement(0.95, 0.84, 0, 9, "L1.h5", 46),
            "gate": Agreement(0.74, 0.6, 0, 9, "L4.mlp", 46),
        },
        nulls=(
            Null("shuffled answers", 0.022, 0.0, 0.41, 0.12, 45, 4),
            Null("re-initialised weights", 0.0, 0.0, 0.33, 0.27, 45, 4),
        ),
        toggles=toggles_frame(),
        toggled="log-probability of the answer",
        curve=curve_frame(),
        random=random_frame(random),
        circuit=Circuit([name for name, value in STRONG.items() if value > 0], {"method": "threshold", "faithfulness": 0.9}),
        trust=Trust(
            Interval(0.93, 0.9, 0.96, 120), Interval(0.14, -0.06, 0.36, 100), 100, Interval(0.11, 0.08, 0.15, 120),
            {name: round(0.1 + abs(value) / 4, 3) for name, value in STRONG.items() if value > 0}, 0.82,
        ),
        examples=examples(random, hostile),
        patterns=patterns(random, hostile),
        claims=claims(),
        relations=relations(random),
        dynamics=dynamics(hostile),
        contrast=contrast(),
        localisation=localisation(hostile),
        sets=sets(),
        alternatives=alternatives(),
        warnings=("Answers of 14 pairs take two tokens: these pairs were dropped.",),
    )  # fmt: skip


def scores_frame(exact: pl.DataFrame, random: np.random.Generator) -> pl.DataFrame:
    names, n = exact["site"].to_list(), exact.height
    true = np.array([STRONG.get(name, 0.0) for name in names])
    plus = np.clip(np.where(true < 0, 0.04, 0.96) + random.normal(0, 0.02, n), 0, 1)
    minus = np.clip(np.where(true > 0, 0.95, 0.05) + random.normal(0, 0.02, n), 0, 1)
    gate = np.clip(0.5 + true / 2, 0.02, 0.98)
    role = ["facilitating" if v > 0.3 else "interfering" if v < -0.3 else "irrelevant" for v in true]
    role[names.index("L1.h2")], role[names.index("L2.h7")] = "undecided", "redundant"
    frame = exact.rename({"score": "exact", **{name: f"exact_{name}" for name in ("low", "high", "p", "q")}}).with_columns(
        second=pl.Series(true * 0.8 + random.normal(0, 0.05, n)),
        gradient=pl.Series(true * 1.2 + random.normal(0, 0.2, n)),
        integrated=pl.Series(true + random.normal(0, 0.08, n)),
        random=pl.Series(random.normal(0, 1, n)),
        shifted=pl.Series(true * 0.95 + random.normal(0, 0.06, n)),
        gate=pl.Series(gate),
        gate_plus=pl.Series(plus),
        gate_minus=pl.Series(minus),
        facilitation=pl.Series(minus),
        interference=pl.Series(1 - plus),
        irrelevance=pl.Series((1 - minus) * plus),
        role=pl.Series(role),
        any_seed=pl.Series([f"{r} / irrelevant" if r in ("undecided", "redundant") else r for r in role]),
        every_seed=pl.Series(["" if r in ("undecided", "redundant") else r for r in role]),
        fragile=pl.Series([name in ("L4.mlp", "L3.h0") for name in names]),
        redundant_with=pl.Series(["L2.h2" if name == "L2.h7" else "" for name in names]),
        null_exact=pl.Series(random.normal(0, 0.05, n)),
        null_gate_plus=pl.Series(np.clip(random.normal(0.7, 0.2, n), 0, 1)),
        null_gate_minus=pl.Series(np.clip(random.normal(0.3, 0.2, n), 0, 1)),
        note=pl.Series(["gates say facilitating, the exact effect is zero" if r == "undecided" else "" for r in role]),
    )
    wide = [(name, 0.15) for name in ("second", "shifted")] + [(name, 0.05) for name in ("gate", "gate_plus", "gate_minus")]
    return frame.with_columns(
        *((pl.col(name) - width).alias(f"{name}_low") for name, width in wide),
        *((pl.col(name) + width).alias(f"{name}_high") for name, width in wide),
    )


def toggles_frame() -> pl.DataFrame:
    k = np.arange(20)
    return pl.concat(
        pl.DataFrame({"order": order, "k": k, "value": value, "low": value - 0.2, "high": value + 0.2})
        for order, value in (
            ("gate", -0.2 - 4 * (1 - np.exp(-k / 3))), ("exact", -0.2 - 4 * (1 - np.exp(-k / 2.6))), ("random", -0.2 - 0.2 * k)
        )
    )  # fmt: skip


def curve_frame() -> pl.DataFrame:
    k = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 45])
    value = np.array([0, 0.1, 0.34, 0.55, 0.84, 0.93, 1.04, 1.09, 1.06, 1.02, 1.0])
    low, high = value - 0.04 * (k % 45 > 0), value + 0.04 * (k % 45 > 0)
    return pl.DataFrame({"k": k, "faithfulness": value, "low": low, "high": high, "completeness": np.minimum(value, 0.92)})


def random_frame(random: np.random.Generator) -> pl.DataFrame:
    rows = [
        {"k": k, "draw": draw, "faithfulness": float(k / 45 * 0.6 + (k == 45) * 0.4 + (0 < k < 45) * random.normal(0, 0.1))}
        for k in (0, 3, 7, 15, 30, 45) for draw in range(100)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def marked(hostile: str) -> tuple[str, ...]:
    return tuple(token + (hostile if token == "," else "") for token in TOKENS)


def examples(random: np.random.Generator, hostile: str) -> tuple[Prompt, ...]:
    names = ((" Mary", " John"), (" Anna", " Peter"), (" Ruth", " Tom"))
    out: list[Prompt] = []
    for right, wrong in names:
        tokens = tuple(
            token.replace(" Mary", right).replace(" John", wrong) + (hostile if token == "," else "") for token in TOKENS
        )
        chance = (None, *(float(p) for p in random.beta(0.6, 1.2, len(TOKENS) - 1)))
        corrupt = (*tokens[:10], right, *tokens[11:])
        out.append(Prompt(tokens, chance, right, 0.91, 3.4, wrong, 0.03, corrupt))
    return tuple(out)


def patterns(random: np.random.Generator, hostile: str) -> Patterns:
    n = len(TOKENS)
    weights = np.tril(random.exponential(1, size=(4, n, n)) ** 3)
    for head, target in enumerate((2, 4, 10, 0)):
        weights[head, target:, target] += 25
    weights /= weights.sum(-1, keepdims=True)
    return Patterns(
        ("L3.h6", "L4.h1", "L2.h2", "L4.h6"), tuple(token + (hostile if token == "," else "") for token in TOKENS), weights
    )


def claims() -> tuple[Claim, ...]:
    scope = "zoo/small, ioi, 120 prompts not used for fitting, logit difference, resample fallback"
    return (
        Claim(
            "L3.h6 facilitates the behaviour.",
            scope,
            "Closing it alone costs 2.3 [2.2, 2.4] of 3.2; facilitating in 4 of 4 seeds.",
            "Closing L3.h6 on new prompts leaves the logit difference where it was.",
            "supported",
        ),
        Claim(
            "Seven parts are enough.",
            scope,
            "Faithfulness .93 [.90, .96]; random circuits of 7 parts .14 [-.06, .36].",
            "Closing every other part on new prompts takes more than a fifth of the logit difference.",
            "supported",
        ),
        Claim(
            "L1.h2 facilitates the behaviour.",
            scope,
            "Gates keep it in 3 of 4 seeds; its exact effect is 0.02 [-0.08, 0.12].",
            "Closing L1.h2 alone or with its substitutes changes nothing.",
            "not supported",
        ),
        Claim(
            "The circuit works in longer texts.",
            scope,
            "No texts longer than 16 tokens were tried.",
            "The same prompts after a paragraph of other text take away the effects.",
            "not tested",
        ),
    )


def relations(random: np.random.Generator) -> Relations:
    """Strong parts need each other within a community; L2.h2 and L2.h7 stand in for each other."""
    names = [*STRONG, "L1.h2", "L2.h7", "L0.h5"]
    names.sort(key=lambda name: PARTS.index(Site.parse(name)))
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            strong = a in STRONG and b in STRONG
            value = 0.3 * np.sqrt(abs(STRONG.get(a, 0) * STRONG.get(b, 0))) + random.normal(0, 0.02)
            word, relation = ("AND", "") if strong else ("none", "")
            if {a, b} == {"L2.h2", "L2.h7"}:
                value, word, relation = -0.9, "OR", "redundancy"
            rows.append({"a": a, "b": b, "interaction": value, "low": value - 0.05, "high": value + 0.05, "q": 0.001 if strong else 0.6,
                         "other": value * 0.7, "other_low": value * 0.7 - 0.05, "other_high": value * 0.7 + 0.05, "other_q": 0.01,
                         "frozen": value * 0.9, "word": word, "relation": relation, "association": random.normal(0, 0.3),
                         "association_q": float(random.uniform())})  # fmt: skip
    parts = pl.DataFrame(
        {"site": names, "layer": [Site.parse(name).layer for name in names], "effect": [STRONG.get(name, 0.0) for name in names],
         "community": [number % 3 for number in range(len(names))], "order": list(range(len(names))), "strength": [1.0] * len(names)}
    )  # fmt: skip
    changed = pl.DataFrame(
        {"a": ["L2.h2"], "b": ["L2.h7"], "open": [0.01], "score": [0.9], "open_role": ["nothing"], "role": ["facilitating"],
         "shift": [0.89], "shift_q": [0.001]}
    )  # fmt: skip
    families = pl.DataFrame(
        {"family": [0, 1], "n": [70, 50], "feature": ["template", "template"], "auroc": [0.98, 0.98], "on": [["went"], ["gave"]],
         "off": [["gave"], ["went"]], "examples": [["one"], ["two"]], "top": ["L3.h6 +2.30", "L4.h1 +1.70"]}
    )  # fmt: skip
    repair = pl.DataFrame({"a": ["L2.h2"], "b": ["L2.h7"], "score": [0.8], "low": [0.7], "high": [0.9], "q": [0.001]})
    about = {"of": 45, "n": 120, "fallback": "resample", "second": "mean", "communities": 3, "modularity": 0.31,
             "modularity_null": 0.18, "modularity_p": 0.004, "families": "2 families: silhouette 0.41, 0.12 permuted (p = 0.01)",
             "hubs": {"parts": ["L3.h6"], "effect": 2.3, "random_mean": 0.2, "p": 0.01}}  # fmt: skip
    shapley = pl.DataFrame(
        {"site": ["L3.h6", "L4.h6"], "score": [2.1, -1.1], "low": [1.9, -1.3], "high": [2.3, -0.9], "sampling": [0.05, 0.04]}
    )
    screened = pl.DataFrame(
        {"a": ["L2.h2"], "b": ["L2.h7"], "score": [-0.9], "low": [-1.0], "high": [-0.8], "q": [0.001], "by_masks": [-0.7]}
    )
    about |= {
        "sampling": "24 permutations of 12 parts",
        "missed": "of 978 pairs not verified, at most 1.0% (10) have |I| >= 0.45",
    }
    return Relations(pl.DataFrame(rows), parts, changed, repair, families, about, shapley=shapley, screened=screened)


def dynamics(hostile: str) -> Dynamics:
    """Two heads that take turns."""
    names = [f"prompt {number}{hostile}" for number in range(12)]
    gates = pl.DataFrame(
        [{"site": site, "input": name, "group": "seen" if n < 6 else "heard", "gate": float((n < 6) == (site == "L2.h2"))}
         for site in ("L2.h2", "L2.h7") for n, name in enumerate(names)]
    )  # fmt: skip
    parts = pl.DataFrame({"site": ["L2.h2", "L2.h7"], "role": ["switches", "switches"], "open_share": [0.5, 0.5]})
    advantage = pl.DataFrame(
        {"strength": [0.1], "open": [3.2], "d": [0.02], "static_d": [0.4], "difference": [0.38], "low": [0.3], "high": [0.5]}
    )
    controls = pl.concat([advantage.select(pl.lit(kind).alias("kind"), pl.all()) for kind in ("model", "untrained")])
    told = ("L2.h2 switches: open on 50% of 12 unseen inputs",)
    return Dynamics(parts, gates, advantage, controls, told, {"scope": "example", "sight": "L3.resid.pre, each example", "n": 60})


def contrast() -> Contrasts:
    """A mask that keeps one task and loses another."""
    evaluation = pl.DataFrame(
        [{"direction": direction, "side": side, "seed": 0, "size": 30, "closed": 15, "share_a": 0.93, "low_a": 0.9, "high_a": 0.96, "share_b": 0.1,
          "low_b": 0.05, "high_b": 0.15, "separates": direction == "A without B"}
         for direction in ("A without B", "A without A") for side in ("open", "few")]
    )  # fmt: skip
    parts = pl.DataFrame({"site": ["L2.h2"], "isolated": [1.0], "kept": [0.0]})
    about = {"a": "ioi", "b": "agreement", "n_a": 60, "n_b": 60, "fallback": "resample", "keep": 0.8, "lose": 0.2}
    return Contrasts(parts, evaluation, about, ("no control of mixed-up prompts",))


def localisation(hostile: str) -> Localisation:
    """Three methods on edges: exact and integrated agree, the gradient less."""
    random = np.random.default_rng(3)
    edges = ["embed>L0.kv3.v", "L0.h3>L0.mlp", "L0.mlp>L2.h2.q", "L0.mlp>L3.kv6.k", "L2.h2>L3.kv6.v", "L3.h6>L4.h1.q", "L3.h6>logits",
             "L4.h1>logits", "L4.h6>logits", "L0.mlp>logits"]  # fmt: skip
    exact = np.array([1.2, 0.8, 0.5, 0.3, 1.1, 0.9, 2.1, 1.5, -0.9, 0.05])
    scores = pl.DataFrame(
        {
            "site": edges,
            "exact": exact,
            "integrated": exact + random.normal(0, 0.1, 10),
            "gradient": exact + random.normal(0, 0.8, 10),
        }
    )
    pairs = [("exact", "integrated", 0.97), ("exact", "gradient", 0.61), ("gradient", "integrated", 0.7)]
    agreement = pl.DataFrame([{"a": a, "b": b, "spearman": value, "n": 10, "top": 0.8} for a, b, value in pairs])
    curves = pl.DataFrame(
        [{"method": method, "share": share, "parts": round(1000 * share), "faithfulness": min(1.0, good * share**0.2),
          "low": 0.9 * good * share**0.2, "high": min(1.1, 1.1 * good * share**0.2)}
         for method, good in (("exact", 1.1), ("integrated", 1.0), ("gradient", 0.8)) for share in (0.001, 0.01, 0.1, 0.5, 1.0)]
    )  # fmt: skip
    areas = pl.DataFrame(
        [{"method": method, "name": name, "value": value, "low": value - 0.05, "high": value + 0.05}
         for method, value in (("exact", 0.98), ("integrated", 0.95), ("gradient", 0.8)) for name in ("CPR", "CMD", "log_area")]
    )  # fmt: skip
    last = len(TOKENS) - 1
    flow = pl.DataFrame(
        [(0, 2, 3, "L0.h3", 0.5), (0, 10, 10, "residual", 0.4), (0, 10, 10, "L0.mlp", 0.6), (0, last, last, "residual", 0.9),
         (1, 10, 10, "residual", 1.0), (1, 3, 3, "residual", 1.0), (1, last, last, "residual", 1.0), (2, 3, 10, "L2.h2", 0.4),
         (2, 10, 10, "residual", 0.6), (2, last, last, "residual", 1.0), (3, 10, last, "L3.h6", 0.7), (3, last, last, "residual", 0.3)],
        schema=["level", "source", "target", "part", "share"], orient="row",
    )  # fmt: skip
    about = {"parts": "edges", "of": 1000, "methods": ["exact", "integrated", "gradient"], "n": 60, "judged": 60, "metric": "logit_diff",
             "fallback": "resample"}  # fmt: skip
    return Localisation(scores, agreement, curves, areas, Circuit(edges[:9], {"group": 1}), flow, marked(hostile), about)


def sets() -> KeptSets:
    """Sets of eight parts, by gates, by order and at random."""
    rows = [("exactly k", 8.0, 0, 8, "L0.mlp L3.h6", 0.9, 0.85, 0.95), ("exact effect", 8.0, 0, 8, "L0.mlp L3.h6", 0.88, 0.8, 0.93),
            ("random", 8.0, 0, 8, "L1.h1", 0.1, 0.0, 0.2), ("random", 8.0, 1, 8, "L1.h2", 0.2, 0.1, 0.3)]  # fmt: skip
    table = pl.DataFrame(rows, schema=["method", "knob", "seed", "size", "kept", "share", "low", "high"], orient="row")
    return KeptSets(table, {"n": 60, "metric": "logit_diff", "fallback": "resample"})


def alternatives() -> Alternatives:
    """Two sets that suffice; L2.h2 and L2.h7 take each other's place."""
    rows = [(0, "L0.mlp L2.h2", 2, 3, 0.9, 0.85, 0.95, True), (1, "L0.mlp L2.h7", 2, 1, 0.89, 0.84, 0.94, True)]
    table = pl.DataFrame(rows, schema=["solution", "kept", "size", "seeds", "share", "low", "high", "sufficient"], orient="row")
    pairs = pl.DataFrame(
        {"a": ["L2.h2"], "b": ["L2.h7"], "alone_a": [0.01], "alone_b": [0.02], "joint": [1.4], "substitutes": [True]}
    )
    return Alternatives(
        table, pairs, ("L0.mlp",), ("L0.mlp", "L2.h2", "L2.h7"), {"wanted": 0.8, "distinct": 2, "n": 60, "seeds": 4}
    )
