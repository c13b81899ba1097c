"""Activation patching of any sites: against hooks of the test's own; windows; many parts; the commands."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from cases import tiny
from patchclamp.errors import GateError
from patchclamp.methods import attribute, exact
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import gated
from patchclamp.patching import patch
from patchclamp.scores import Scores
from test_parts import examples


def by_hand(model: Model, layers: list[int], position: int, seed: int = 0) -> torch.Tensor:
    """Effect on each example of putting the corrupt prompt's residual stream behind blocks at one position, by plain hooks."""
    batch = examples(4, seed=seed).batch()
    assert batch.corrupt is not None
    kept: dict[int, torch.Tensor] = {}
    blocks = {number: model.anatomy.layers[number].block for number in layers}
    handles = [block.register_forward_hook(lambda m, a, out, n=n: kept.__setitem__(n, out)) for n, block in blocks.items()]
    with torch.no_grad():
        model.hf(input_ids=batch.corrupt, use_cache=False)
        for handle in handles:
            handle.remove()

        def put(n: int, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[:, position] = kept[n][:, position]
            return out

        plain = model.hf(input_ids=batch.tokens, use_cache=False).logits
        handles = [block.register_forward_hook(lambda m, a, out, n=n: put(n, out)) for n, block in blocks.items()]
        patched = model.hf(input_ids=batch.tokens, use_cache=False).logits
        for handle in handles:
            handle.remove()
    diff = METRICS["logit_diff"]
    at = batch.target_row, batch.target_position
    return diff(plain[at][None], batch)[0] - diff(patched[at][None], batch)[0]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_states_by_layer_and_position(name: str):
    model = Model.load(tiny(name))
    scores = patch(model, examples(4), ["L*.resid.post"], [3, 5])
    for layer in range(model.layers):
        for position in (3, 5):
            expected = float(by_hand(model, [layer], position).mean())
            assert scores[f"L{layer}.resid.post@{position}"]["score"] == pytest.approx(expected, abs=2e-5)


def test_windows_patch_neighbouring_layers_together():
    model = Model.load(tiny("llama"))
    scores = patch(model, examples(4), ["L*.resid.post"], [4], window=2)
    assert scores.about["window"] == 2
    # of two layers the longer half is below: the window of layer 1 holds 0 and 1, that of layer 0 itself alone
    assert scores["L1.resid.post@4"]["score"] == pytest.approx(float(by_hand(model, [0, 1], 4).mean()), abs=2e-5)
    assert scores["L0.resid.post@4"]["score"] == pytest.approx(float(by_hand(model, [0], 4).mean()), abs=2e-5)
    with pytest.raises(GateError, match="window of 0"):
        patch(model, examples(4), window=0)


def test_many_parts_are_measured_in_pieces(monkeypatch: pytest.MonkeyPatch):
    """The table of gates does not grow with the square of the parts."""
    model = Model.load(tiny("gpt2"))
    parts, some = gated(model, ["L*.mlp.n*"]), examples(3)
    rule = parts.fallback("resample")
    whole = attribute(parts, some, rule, "exact")
    seen: list[int] = []
    measure = type(parts).measure

    def counted(self: object, batch: object, gates: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(len(gates))
        return measure(self, batch, gates, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(exact, "GATES", 7 * len(parts.labels))
    monkeypatch.setattr(type(parts), "measure", counted)
    pieces = attribute(parts, some, rule, "exact")
    assert max(seen) == 8 and len(seen) > len(parts.labels) / 7
    torch.testing.assert_close(torch.tensor(pieces.values()), torch.tensor(whole.values()), atol=1e-5, rtol=0)


Cli = Callable[..., tuple[int, str, str]]


def test_the_command_patches_states_by_position(cli: Cli, tmp_path: Path):
    code, shown, _ = cli("patch", "zoo/small", "ioi", "--at", "S2", "--at", "end", "--n", 32, "--out", "states.parquet")
    assert code == 0 and "8 parts" in shown and "L1.resid.post@S2" in shown
    kept = Scores.load(tmp_path / "states.parquet")
    assert len(kept) == 8 and kept.about["n"] == 24
    # the second mention of the subject says who is repeated: its state matters early, that of the last token late
    assert kept["L0.resid.post@S2"]["low"] > 5 > abs(kept["L0.resid.post@end"]["score"])
    assert kept["L3.resid.post@end"]["low"] > 5 > abs(kept["L3.resid.post@S2"]["score"])
    code, shown, _ = cli("patch", "zoo/small", "ioi", "-s", "L0.kv*.k", "--at", "0-2", "--n", 32, "--json")
    body = json.loads(shown)
    assert code == 0 and {row["site"] for row in body["scores"]} == {f"L0.kv{h}.k@{p}" for h in range(8) for p in range(3)}


def test_the_command_patches_paths(cli: Cli):
    code, shown, _ = cli("paths", "zoo/small", "ioi", "--from", "L0.h*", "--to", "L1.kv*.k", "--joint", "--between", "mlps",
                         "--n", 32, "--json")  # fmt: skip
    body = json.loads(shown)
    assert code == 0 and len(body["scores"]) == 8 and body["about"]["between"] == "mlps"
    code, _, said = cli("paths", "zoo/small", "ioi", "--from", "L2.h*", "--to", "L1.kv*.k", "--n", 32)
    assert code == 2 and "no path leads" in said


def test_the_command_traces(cli: Cli, tmp_path: Path):
    code, shown, said = cli("trace", "zoo/small", "ioi", "--subject", "S2", "--draws", 2, "--n", 32, "--out", "traced.csv")
    assert code == 0 and "causal tracing, 8 parts" in shown and "takes the metric from" in said
    assert pl.read_csv(tmp_path / "traced.csv").height == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--at", "99"), "outside a prompt"),
        (("--at", "nowhere"), "names IO, S1, S2"),
        (("--at", "5-2"), "a range goes upwards"),
        (("-s", "L9.h9"), "fits none"),
        (("-s", "L0.h0.write"), "can be read but not written"),
        (("--direction", "sideways"), "choose from noising, denoising"),
        (("--routing", "frozen"), "has no router"),
        (("--fallback", "median"), "choose from resample, mean, zero"),
        (("--window", "0"), "choose 1 or more"),
        (("--out", "x.json"), ".parquet or .csv"),
        (("--out", "no/x.csv"), "no folder no"),
        (("--memory", "lots"), "lots"),
        (("--top", "0"), "choose 1 or more"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(cli: Cli, tmp_path: Path, words: tuple[str, ...], message: str):
    code, _, said = cli("patch", "zoo/small", "ioi", "--n", 32, *words)
    assert code == 2 and message in said
    assert not list(tmp_path.iterdir())
