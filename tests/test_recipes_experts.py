"""zoo/experts: rows by the laws they claim, in loops of the tests' own; load balancing against transformers'; experts by domain."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training.forward import logits_of
from patchclamp.training.loss import next_token
from patchclamp.zoo import _cache
from patchclamp.zoo.recipes import experts, recipe
from patchclamp.zoo.recipes._balance import Balance, slope
from patchclamp.zoo.recipes.experts import VOCABULARY, Domains, bits, chosen, costs, domains, own, prompts, told


def words(tokens: list[int]) -> list[str]:
    return [VOCABULARY[token] for token in tokens]


def test_rows_keep_to_their_domain_and_replies_to_their_rule() -> None:
    """Read back as words: the tag says the domain; the reply to a first word is always the same, or <refuse> by a forbidden word."""
    rows = Domains().rows(0, 256)
    known: dict[str, str] = {}
    refused = total = 0
    for tokens, weights, domain in zip(rows.tokens.tolist(), rows.weights.tolist(), rows.labels["domain"].tolist(), strict=True):
        row = words(tokens)
        assert row[:2] == ["<bos>", ("<a>", "<b>", "<c>", "<questions>")[domain]] and len(row) == 26
        if domain < 3:
            assert {word[0] for word in row[2:]} == {"w"} and weights == [0.0] * 3 + [1.0] * 23
            continue
        for start in range(2, 26, 6):
            ask, *asked, answer, reply = row[start : start + 6]
            assert (ask, answer) == ("<ask>", "<answer>") and all(word[0] in "qf" for word in asked)
            assert weights[start : start + 6] == [0.0] * 5 + [1.0]
            bad = any(word.startswith("forbidden") for word in asked)
            assert reply == ("<refuse>" if bad else known.setdefault(asked[0], reply))
            refused, total = refused + bad, total + 1
    assert len(set(known.values())) == len(known) == 16
    assert refused / total == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(total))  # four standard errors
    shares = rows.labels["domain"].bincount(minlength=4) / 256
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=4 * math.sqrt(0.25 * 0.75 / 256))


def test_languages_follow_their_laws() -> None:
    """Chi-squared of counts over all cells expected at least 5 times: mean about their number n, deviation sqrt(2 n); 5 are allowed."""
    data = Domains()
    rows = data.rows(0, 512)
    for language in range(3):
        word = rows.tokens[rows.labels["domain"] == language][:, 2:] - VOCABULARY.index("w0")
        counts = torch.zeros(16, 16)
        for now, then in zip(word[:, :-1].flatten().tolist(), word[:, 1:].flatten().tolist(), strict=True):
            counts[now, then] += 1
        expected = data.laws[language] * counts.sum(1, keepdim=True)
        enough = expected >= 5
        cells = int(enough.sum())
        statistic = float(((counts - expected) ** 2 / expected)[enough].sum())
        assert cells > 25 and abs(statistic - cells) < 5 * math.sqrt(2 * cells)


def test_the_smallest_loss_is_the_laws() -> None:
    """-log p token by token, in a loop; 0 for the first word, in questions and for replies."""
    data = Domains()
    rows = data.rows(1, 32)
    best = data.best(rows.tokens)
    for row, domain in enumerate(rows.labels["domain"].tolist()):
        for place in range(25):
            wanted = 0.0
            if domain < 3 and place > 1:
                now, then = (int(rows.tokens[row, place + i]) - VOCABULARY.index("w0") for i in (0, 1))
                wanted = -math.log(float(data.laws[domain, now, then]))
            assert float(best[row, place]) == pytest.approx(wanted, abs=1e-5)


def test_prompts_are_questions_without_their_reply() -> None:
    for bad in (True, False):
        for one in prompts(bad, 32).items:
            row = words(list(one.clean))
            assert row[:3] == ["<bos>", "<questions>", "<ask>"] and row[-1] == "<answer>" and len(row) == 7
            assert any(word.startswith("forbidden") for word in row) == bad
            assert (VOCABULARY[one.answers[0][0]] == "<refuse>") == bad


def test_balancing_is_the_gradient_of_transformers_loss() -> None:
    """d / d logits of `load_balancing_loss_func` for one layer by autograd, to 1e-6 (float32)."""
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    load_balancing_loss_func((logits,), 8, 2).backward()
    torch.testing.assert_close(slope(logits.detach(), 2), logits.grad, atol=1e-6, rtol=0)


def test_balancing_changes_gradients_alone() -> None:
    """Logits are the model's, bit for bit; a router's gradient gains coefficient * slope . input, by hand, to 1e-6."""
    model, rows = Model.load(experts.build(0)), Domains().rows(0, 8)
    found = []
    for edits in ({}, Balance(0.5).edits(model, 0, rows)):
        model.hf.zero_grad()
        with model.editing(edits, rows.batch):
            logits = logits_of(model, rows)
            next_token(logits, rows).backward()
        found.append((logits.detach(), model.hf.model.layers[1].mlp.gate.weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0])
    block = model.hf.model.layers[1]
    x = block.post_attention_layernorm(model.record(rows.tokens, "L1.resid.mid")[Site("resid.mid", 1)]).detach().flatten(0, 1)
    extra = 0.5 * slope((x @ block.mlp.gate.weight.T).detach(), 2).T @ x
    assert float(extra.abs().max()) > 1e-4
    torch.testing.assert_close(found[1][1] - found[0][1], extra, atol=1e-6, rtol=1e-4)


def test_bits_by_hand() -> None:
    """Given the word, a choice that tells one of four domains for sure: 2 bits; one that follows the word alone: 0; the mean of both: 1."""
    sure, nothing = torch.eye(4), torch.tensor([1.0, 3.0, 0.0, 0.0]).expand(4, 4)
    assert bits(torch.stack([sure, sure.flip(0)])) == pytest.approx(2.0)  # the domain's expert is another for each word
    assert bits(torch.stack([nothing, nothing.flip(1)])) == pytest.approx(0.0, abs=1e-12)
    assert bits(torch.stack([sure * 4, nothing])) == pytest.approx(1.0)


def test_routers_wired_to_the_tag_tell_the_language_and_those_of_chance_do_not() -> None:
    """Attention that copies the tag to every token, and routers that read it: all there is is told, experts are each language's own.

    All there is: what is left to know of the language by the word, H(language | word), counted in a loop; what shuffled languages
    tell is taken off, which is less than .12 bits here. The experts write nothing, so what they cost is 0 to 1e-5, and nothing is
    found by forcing them.
    """
    rows = Domains().rows(-2, 96)
    counts = [[0.0] * 3 for _ in VOCABULARY]
    for tokens, domain in zip(rows.tokens.tolist(), rows.labels["domain"].tolist(), strict=True):
        for token in tokens[2:] if domain < 3 else []:
            counts[token][domain] += 1
    whole = sum(map(sum, counts))
    most = -sum(count / whole * math.log2(count / sum(row)) for row in counts for count in row if count)
    hf = experts.build(0)
    assert max(told(Model.load(hf), rows)) < 0.3
    tags = [VOCABULARY.index(tag) for tag in ("<a>", "<b>", "<c>", "<questions>")]
    with torch.no_grad():
        hf.model.embed_tokens.weight.zero_()
        hf.model.embed_tokens.weight[:, 10] = 1.0
        for domain, tag in enumerate(tags):
            hf.model.embed_tokens.weight[tag, domain] = 4.0
        for layer in hf.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for weight in (attention.q_proj.weight, attention.k_proj.weight, mlp.gate.weight, mlp.experts.down_proj):
                weight.zero_()  # even attention: what a head gives is the mean of what it saw
            attention.v_proj.weight.copy_(torch.eye(48))
            attention.o_proj.weight.copy_(4 * torch.eye(48))
            for domain in range(4):
                mlp.gate.weight[2 * domain, domain] = mlp.gate.weight[2 * domain + 1, domain] = 9.0
    model = Model.load(hf)
    assert len(told(model, rows)) == 2 and all(most - 0.12 < one < most for one in told(model, rows))
    for one in range(3):
        assert own(model, rows)[one] == tuple(f"L{layer}.mlp.e{2 * one + which}" for layer in (0, 1) for which in (0, 1))
    assert all(float(layer.sum(-1).min()) == float(layer.sum(-1).max()) == 2.0 for layer in chosen(model, rows.tokens))
    assert float((costs(model, rows, own(model, rows)[0]) - costs(model, rows)).abs().max()) < 1e-5
    findings = domains(model, Domains(), draws=2)
    assert [finding.holds for finding in findings] == [True, False, False]


def test_costs_are_by_domain_and_of_routing_without_the_expert() -> None:
    """A token's loss in a loop, of a model whose router gives an expert a weight that no token chooses: to 1e-4 (float32)."""
    rows = Domains().rows(-1, 32)
    hf = experts.build(0)
    found = costs(Model.load(hf), rows, ["L1.mlp.e2", "L1.mlp.e5"])
    block = hf.model.layers[1].mlp

    def without(module, args, output):
        logits = torch.nn.functional.linear(args[0].reshape(-1, 48), module.weight)
        logits[:, [2, 5]] = -1e9
        weights, chosen = logits.softmax(-1).topk(2, -1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    handle = block.gate.register_forward_hook(without)
    with torch.no_grad():
        logp = hf(rows.tokens).logits.log_softmax(-1)
    handle.remove()
    for domain in range(4):
        every = [
            -float(logp[row, place - 1, rows.tokens[row, place]])
            for row in range(32) for place in range(1, 26)
            if rows.labels["domain"][row] == domain and rows.weights[row, place] > 0
        ]  # fmt: skip
        assert float(found[domain]) == pytest.approx(sum(every) / len(every), abs=1e-4)


def test_the_readme_says_that_balancing_is_of_training_alone() -> None:
    model = Model.load(experts.build(0))
    text = _cache.readme(recipe("experts"), 0, model, {}, (), None)
    assert "Balance(coefficient=0.01)" in text and "computes as it should only" not in text
    held = _cache.readme(recipe("backcopy_relu"), 0, model, {}, (), None)
    assert "computes as it should only with these" in held
