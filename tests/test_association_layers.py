"""Information plane, shape metrics, rank, dimensions and layers' dependence, against closed forms and by hand."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from cases import tiny
from patchclamp.dependence.association import (
    Representation,
    akde,
    bures,
    dimension_use,
    ebab,
    embedded,
    information_plane,
    layer_dependence,
    rank_curve,
    rank_residual,
    regressed,
    shape_distance,
    shape_distances,
)
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.zoo import wired
from test_parts import examples


def turned(rng: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


# --- information plane


def test_adaptive_bins_know_what_the_activity_tells():
    """Four levels that tell two labels: I(T; X) = log 4, I(T; Y) = log 2; growth by any monotone function changes nothing."""
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(4.0), 50)
    states, label = np.stack([level, -level], 1), (level >= 2).astype(int).tolist()
    assert ebab(states, label) == pytest.approx((np.log(4), np.log(2)), abs=1e-12)
    noisy = rng.normal(size=(200, 3))
    assert ebab(np.exp(5 * noisy), label) == ebab(noisy, label)
    counts = np.unique(ebab_codes := noisy[:, 0].argsort().argsort() * 30 // 200, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1 and ebab(noisy[:, :1], ebab_codes.tolist())[1] == pytest.approx(
        ebab(noisy[:, :1], label)[0]
    )


def test_adaptive_kernels_count_far_points_and_do_not_mind_scale():
    """k points far apart under the noise: log k; all in one: 0. Scaling activity scales the noise with it."""
    points = np.repeat(np.eye(5), 8, 0)
    label = np.repeat(np.arange(5) % 2, 8).tolist()
    own, known = akde(points, label)
    share = np.array([3, 2]) / 5
    assert own == pytest.approx(np.log(5), abs=1e-6) and known == pytest.approx(-(share * np.log(share)).sum(), abs=1e-6)
    assert akde(1000 * points, label) == pytest.approx((own, known), abs=1e-9)
    assert akde(np.ones((6, 2)), [0, 1] * 3) == pytest.approx((0, 0), abs=1e-9)


def test_the_plane_over_checkpoints_rises_as_the_label_becomes_known():
    rng = np.random.default_rng(1)
    label = np.repeat([0, 1], 60)
    steps = {
        step: (amount * label)[:, None] + rng.normal(size=(120, 1))
        for step, amount in (("step0", 0.0), ("step1", 2.0), ("step2", 8.0))
    }
    for how, options in (("ebab", {"bins": 8}), ("akde", {"noise": 0.01})):
        rows = information_plane(steps, label.tolist(), how=how, **options)
        assert rows["output"].is_sorted() and rows["output"][2] > 4 * rows["output_null"][2], rows
        assert rows["output"][0] < 3 * rows["output_null"][0]
    with pytest.raises(PatchclampError, match="by ebab or akde"):
        information_plane(steps, label.tolist(), how="bins")


# --- shape metrics


def noisy(rng: np.random.Generator, stimuli: int = 6, width: int = 4, scale: float = 1.0) -> Representation:
    root = rng.normal(size=(stimuli, width, width))
    mean = rng.normal(size=(stimuli, width))
    return Representation(mean - mean.mean(0), scale * root @ root.transpose(0, 2, 1))


def test_bures_is_its_formula_and_normal_in_one_dimension():
    rng = np.random.default_rng(0)
    one, two = noisy(rng).covariance[:2]
    root = sqrtm(one)
    assert bures(one, two) == pytest.approx(np.trace(one + two - 2 * sqrtm(root @ two @ root)).real, abs=1e-9)
    assert bures(np.array([[4.0]]), np.array([[1.0]])) == pytest.approx(1.0)  # (sd 2 - sd 1)^2


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_shape_distance_is_a_metric_up_to_turns(alpha: float):
    """Zero for a turned copy (1e-4: the square root of rounding and of the iteration's end), symmetric, triangle inequality."""
    rng = np.random.default_rng(3)
    a, b, c = noisy(rng), noisy(rng), noisy(rng)
    turn = turned(rng, 4)
    copy = Representation(a.mean @ turn.T, turn @ a.covariance @ turn.T)
    starts = 20
    assert shape_distance(a, copy, alpha, starts=starts) < 1e-3
    ab, ba, bc, ac = (shape_distance(x, y, alpha, starts=starts) for x, y in ((a, b), (b, a), (b, c), (a, c)))
    assert ab == pytest.approx(ba, rel=1e-3) and ac <= ab + bc + 1e-6 and ab > 0.1


def test_shape_distance_by_search_over_all_turns_of_the_plane():
    """Width 2: the best of 4,000 rotations and reflections, by the definition itself; 1e-3 is the grid's width."""
    rng = np.random.default_rng(4)
    a, b = noisy(rng, width=2), noisy(rng, width=2)
    best = np.inf
    for angle in np.linspace(0, 2 * np.pi, 2000, endpoint=False):
        c, s = np.cos(angle), np.sin(angle)
        for turn in (np.array([[c, -s], [s, c]]), np.array([[c, s], [s, -c]])):
            means = ((a.mean - b.mean @ turn.T) ** 2).sum(1)
            best = min(best, float(np.mean([
                means[i] + bures(a.covariance[i], turn @ b.covariance[i] @ turn.T) for i in range(6)
            ])) if means.mean() < best else best)  # fmt: skip
    assert shape_distance(a, b, 1.0, starts=20) == pytest.approx(np.sqrt(best), abs=1e-3)


def test_networks_with_like_noise_lie_together():
    """Same means, noise of six sizes: distances tell the size, which the nearest others foretell."""
    rng = np.random.default_rng(5)
    mean = rng.normal(size=(5, 3))
    sizes = (0.5, 0.6, 0.7, 2.0, 2.1, 2.2)
    nets = {}
    for number, size in enumerate(sizes):
        turn = turned(rng, 3)
        nets[f"net{number}"] = Representation((mean - mean.mean(0)) @ turn.T, size**2 * np.repeat(np.eye(3)[None], 5, 0))
    names, apart = shape_distances(nets)
    assert names == tuple(nets)
    assert apart[0, 3] == pytest.approx(1.5 * np.sqrt(3), rel=1e-2)  # Bures of s^2 I and t^2 I: width (s - t)^2
    points = embedded(apart, 1)[:, 0]
    assert abs(np.corrcoef(points, sizes)[0, 1]) > 0.99
    rows = regressed(apart, sizes, neighbours=2)
    assert np.abs(rows["value"] - rows["predicted"]).max() < 0.2


def test_a_representation_is_means_and_spreads_of_repeats():
    rng = np.random.default_rng(6)
    states, stimulus = rng.normal(size=(30, 3)), np.arange(30) % 3
    made = Representation.of(states, stimulus.tolist())
    np.testing.assert_allclose(made.covariance[1], np.cov(states[stimulus == 1].T), atol=1e-12)
    assert np.abs(made.mean.sum(0)).max() < 1e-12
    with pytest.raises(PatchclampError, match="shown once"):
        Representation.of(states[:4], [0, 0, 1, 2])
    with pytest.raises(PatchclampError, match="stimuli must be the same"):
        shape_distance(made, noisy(rng))


# --- rank


def test_rank_residual_is_zero_for_equal_tokens():
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 8))
    assert rank_residual(np.repeat(row, 5, 0)) < 1e-12
    x = rng.normal(size=(5, 8))
    left = x - x.mean(0)
    wanted = np.sqrt(np.linalg.norm(left, 1) * np.linalg.norm(left, np.inf) / (np.linalg.norm(x, 1) * np.linalg.norm(x, np.inf)))
    assert rank_residual(x) == pytest.approx(wanted)


def test_rank_collapses_without_skips_and_not_with_them():
    """A random network of 6 layers; "whole" against the model's own hidden states, "without skips" against blocks run one by one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4, n_positions=64)).double().eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.05 if "c_attn" in name else 0.15)
    model, some = Model.load(hf), examples(6)
    rows = rank_curve(model, some)
    curve = {name: rows.filter(rows["variant"] == name)["residual"].to_numpy() for name in rows["variant"].unique()}
    assert curve["attention alone"][-1] < 0.1 * curve["whole"][-1]
    assert curve["without MLPs"][-1] > 5 * curve["attention alone"][-1]
    tokens = torch.tensor([item.clean for item in some])
    with torch.no_grad():
        hidden = hf.transformer(tokens, output_hidden_states=True).hidden_states
        x = hidden[0]
        for block in hf.transformer.h[:2]:
            out = block(x)
            x = (out if isinstance(out, torch.Tensor) else out[0]) - x
    assert curve["whole"][3] == pytest.approx(np.mean([rank_residual(one.numpy()) for one in hidden[3]]), abs=1e-9)
    assert curve["without skips"][2] == pytest.approx(np.mean([rank_residual(one.numpy()) for one in x]), abs=1e-9)


# --- dimensions


def test_shared_and_special_dimensions_are_told_apart():
    """Dimension 0 is in every token, 1 to 4 each in a tenth of them, 5 in none."""
    states = np.zeros((100, 6))
    states[:, 0] = 3.0
    for number in range(4):
        states[10 * number : 10 * number + 10, 1 + number] = 2.0
    found = dimension_use(states, share=0.95)
    assert found.shared.tolist() == [0] and found.special.tolist() == [1, 2, 3, 4]
    assert found.needed == pytest.approx((0.6 * 1 + 0.4 * 2) / 6) and found.active[0] == 1
    assert found.energy_shared == pytest.approx(900 / (900 + 160)) and found.to_record()["dimensions"] == 6


# --- layers


@pytest.mark.parametrize("kind", ["hsic", "coco"])
def test_layers_come_to_know_the_answer(kind: str):
    """induction: the last token's embedding says nothing of the answer; the final state says it, and nothing else changes it."""
    one = wired("induction")
    rows = layer_dependence(
        Model.load(one.hf, tokenizer=one.tokenizer), one.task.examples(one.tokenizer, 60, seed=1), kind=kind, permutations=19
    )
    assert rows["site"].to_list() == ["embed", "L0.resid.post", "L1.resid.post"]
    assert rows["output_p"].to_list()[2] == 0.05 and rows["output"][2] > 1.2 * rows["output"][0]
    assert rows["output_p"][0] > 0.05
    with pytest.raises(PatchclampError, match="hsic or coco"):
        layer_dependence(Model.load(tiny("gpt2")), examples(6), kind="cka")
