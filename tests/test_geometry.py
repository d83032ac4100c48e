"""Geometry: every number against one computed by hand, and no answer where the question makes no sense."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_steering.geometry import (
    Classifier,
    Connectivity,
    auc_interval,
    classify,
    cosine_summary,
    cosines,
    effective_dimension,
    mode_connectivity,
    projections,
    subspace_basis,
    subspace_overlap,
)
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm
from oneshot_steering.objective import Example, Objective, Terms
from oneshot_steering.recipes import geodesic
from oneshot_steering.steering import Steering

TEXTS = ["the other dogs", "There is no reason to think that the thing is a fox", "a fox"]
EXAMPLES = [Example("the other", promote=" dogs"), Example("There is", promote=" no", suppress=" reason"), Example("a", suppress=" fox")]
each_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)


def vectors(count, seed=0, layer=2, size=32, **changes):
    source = torch.Generator().manual_seed(seed)
    return [Steering((1 + i) * torch.randn(size, generator=source), layer, **changes) for i in range(count)]


def test_cosines_by_hand():
    some = [*vectors(3), Steering(torch.ones(32), 1, strength=-2.0)]
    table = cosines(dict(zip("abcd", some, strict=True)))
    assert list(table.index) == list(table.columns) == list("abcd")
    for i, a in enumerate(some):
        for j, b in enumerate(some):
            expected = torch.nn.functional.cosine_similarity(a.strength * a.vector, b.strength * b.vector, dim=0).item()
            assert table.iloc[i, j] == pytest.approx(expected, abs=1e-6)
    summary = cosine_summary(some)
    off = sorted(abs(table.iloc[i, j]) for i in range(4) for j in range(i))
    assert summary.pairs == 6 and summary["max"] == off[-1] and summary["median"] == pytest.approx((off[2] + off[3]) / 2)


def test_cosines_of_what_cannot_be_compared():
    one, two = vectors(2)
    for message, given_ in [
        ("at least 2 vectors, not 1", [one]),
        ("at least 2 vectors, not 0", {}),
        ("different widths", {"one": one, "wide": Steering(torch.ones(8), 2)}),
        ("number 1 is zero", [one, 0 * two]),
    ]:
        with pytest.raises(ValueError, match=message):
            cosines(given_)
    with pytest.raises(TypeError, match="Give Steerings, not Tensor"):
        cosines([one.vector, two.vector])


@each_architecture
@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_every_loss_is_that_of_one_vector_alone(architecture, mode):
    lm, some, objective = tiny_lm(architecture), vectors(3, mode=mode, strength=-1.5), Objective(coldness=1.0)
    found = mode_connectivity(lm, some, EXAMPLES, points=4, objective=objective, tokens_per_pass=40)
    assert found.losses.shape == (3, 3, 6) and found.names == [0, 1, 2]
    alone = lambda i, vector: Terms(lm, EXAMPLES[i], objective)(Steering(vector, 2, mode)).sum().item()
    for i in range(3):
        start = -1.5 * some[i].vector
        assert found.losses[i, i] == pytest.approx([alone(i, start)] * 6, rel=1e-3, abs=1e-3)
        for j in set(range(3)) - {i}:
            end = -1.5 * some[j].vector
            by_hand = [alone(i, v) for v in (start, *geodesic(start, end, 4), end)]
            assert found.losses[i, j] == pytest.approx(by_hand, rel=1e-3, abs=1e-3)
            rise = max(by_hand[1:-1]) - max(by_hand[0], by_hand[-1])
            assert found.barriers.iloc[i, j] == pytest.approx(rise, rel=1e-2, abs=3e-3)
            assert found.ends.iloc[i, j] == pytest.approx(by_hand[-1], rel=1e-3, abs=1e-3)


def test_positions_and_one_example_for_all():
    lm = tiny_lm("gemma3_text")
    some = vectors(2, positions="prompt", layer=1)
    found = mode_connectivity(lm, dict(x=some[0], y=some[1]), EXAMPLES[1], points=3)
    for v, loss in zip(some, found.losses[0, 1, [0, -1]], strict=True):
        with lm.steer(v):
            assert Terms(lm, EXAMPLES[1])().sum().item() == pytest.approx(loss, rel=1e-3)
    assert found.losses[0, 1] == pytest.approx(found.losses[1, 0][::-1], rel=1e-3)  # one example: the way back is the same way


def test_barriers_shares_and_differences():
    losses = np.zeros((3, 3, 4))
    losses[0, 1] = [1, 2, 1.5, 1]  # a hill of 1
    losses[0, 2] = [1, 2, 2, 3]  # uphill, no barrier
    losses[1, 0] = [2, 1, 0, 1]  # a valley
    losses[1, 2] = [2, 2 + 5e-5, 2, 2]  # flat, but for rounding
    losses[2, 0] = losses[2, 1] = [4, 4, 9, 5]
    found = Connectivity(["a", "b", "c"], losses)
    assert found.barriers.isna().sum().sum() == 3 and found.barriers.loc["a", "b"] == 1 and found.barriers.loc["a", "c"] == -1
    assert found.barriers.loc["c"].tolist()[:2] == [4, 4]
    assert found.connected == pytest.approx(3 / 6)
    assert Connectivity(["a", "b", "c"], losses, tolerance=0.0).connected == pytest.approx(2 / 6)
    assert found.difference == pytest.approx((0 + 2 + 1 + 0 + 1 + 1) / 6)
    assert "50.0% of 6 ordered pairs" in repr(found)


def test_no_way_between_what_differs():
    lm, (a, b) = tiny_lm(), vectors(2)
    for message, pair in [
        ("different mode", [a, b.replace(mode="clamp")]),
        ("different positions", [a, b.replace(positions="prompt")]),
        ("different layers", [a, b.replace(layers=(2, 3))]),
        ("different widths", [a, Steering(torch.ones(8), 2)]),
        ("width 8", [Steering(torch.ones(8), 2), Steering(torch.arange(8.0), 2)]),
        ("layer 9 does not exist", [a.replace(layers=9), b.replace(layers=9)]),
        ("mode='ablate'", [a.replace(mode="ablate"), b.replace(mode="ablate")]),
        ("are opposite", [a, -3 * a]),
        ("number 1 is zero", [a, 0 * b]),
        ("at least 2 vectors, not 1", [a]),
    ]:
        with pytest.raises(ValueError, match=message):
            mode_connectivity(lm, pair, EXAMPLES[0])
    with pytest.raises(ValueError, match="3 examples for 2 vectors"):
        mode_connectivity(lm, [a, b], EXAMPLES)
    with pytest.raises(ValueError, match="points must be at least 1"):
        mode_connectivity(lm, [a, b], EXAMPLES[0], points=0)
    mode_connectivity(lm, [a, b.replace(layers=-2)], EXAMPLES[0], points=1)  # layer -2 of 4 is layer 2


@each_architecture
def test_projections_by_hand_whatever_the_padding(architecture):
    lm, v = tiny_lm(architecture), vectors(1, layer=-2)[0]
    unit = v.vector / v.vector.norm()
    for sign in (1, -3):
        for batch_size in (1, 2, 16):
            found = projections(lm, sign * v, TEXTS, batch_size=batch_size)
            for text, dots, mean in zip(TEXTS, found.tokens, found.means, strict=True):
                by_hand = math.copysign(1, sign) * lm.hidden_states(text, 2) @ unit
                assert torch.allclose(dots, by_hand, atol=1e-4)
                assert mean.item() == pytest.approx(by_hand[1:].mean().item(), abs=1e-4)


@pytest.mark.parametrize("rule, chosen", [(":", slice(None)), ("1:", slice(1, None)), ("last_2", slice(-2, None)), (slice(1, 3),) * 2])
def test_projections_are_averaged_where_asked(rule, chosen):
    lm, v = tiny_lm(), vectors(1)[0]
    found = projections(lm, v, TEXTS, positions=rule)
    assert found.means.tolist() == pytest.approx([dots[chosen].mean().item() for dots in found.tokens], abs=1e-5)


def test_projections_refuse():
    lm, v = tiny_lm(), vectors(1)[0]
    for message, call in [
        ("selects none of the 1 tokens of ''", lambda: projections(lm, v, ["a", ""])),
        ("selects none", lambda: projections(lm, v, ["a fox"], positions="completion")),
        (r"layers \[1, 2\]; pick one", lambda: projections(lm, v.replace(layers=(1, 2)), TEXTS)),
        ("list of at least one text", lambda: projections(lm, v, [])),
        ("list of at least one text", lambda: projections(lm, v, "a fox")),
        ("longer than the context of 256", lambda: projections(lm, v, ["a fox " * 300])),
        ("width 8", lambda: projections(lm, Steering(torch.ones(8), 2), TEXTS)),
        ("one without", lambda: classify(lm, v, TEXTS, [])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_classify_ranks_means():
    lm, v = tiny_lm("qwen3"), vectors(1)[0]
    yes, no = ["the other dogs", "a fox in the sun", "There is"], ["no reason to think", "the morning", "a dog", "the quick fox"]
    found = classify(lm, v, yes, no, batch_size=2)
    means = projections(lm, v, [*yes, *no]).means.tolist()
    wins = np.mean([a > b for a in means[:3] for b in means[3:]])
    assert found.auc == pytest.approx(wins) and found.positives.tolist() == pytest.approx(means[:3], rel=1e-4)
    assert classify(lm, -v, yes, no).auc == pytest.approx(1 - wins)


def test_known_areas():
    for yes, no, auc in [([2, 3], [0, 1], 1), ([0, 1], [2, 3], 0), ([1, 1], [1, 1], 0.5), ([1, 2], [1, 0], 0.875), ([5], [5], 0.5)]:
        found = Classifier(yes, no)
        assert found.auc == auc
        low, high = found.interval
        assert 0 <= low <= auc <= high <= 1 and low < high
    curve = Classifier([2, 3], [0, 1]).curve
    assert curve.iloc[0, :2].tolist() == [0, 0] and curve.iloc[-1, :2].tolist() == [1, 1] and (curve["true positives"] == 1).any()
    with pytest.raises(ValueError, match="one without"):
        Classifier([], [1])


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.integers(1, 400), st.integers(1, 400))
def test_intervals_of_areas(auc, m, n):
    low, high = auc_interval(auc, m, n)
    assert 0 <= low <= auc + 1e-9 and auc - 1e-9 <= high <= 1 and low < high
    mirrored = auc_interval(1 - auc, m, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)
    narrow = auc_interval(auc, m, n, level=0.5)
    assert low <= narrow[0] + 1e-9 and narrow[1] <= high + 1e-9
    for bound in (low, high):  # the bound is where the distance equals z standard errors
        extra = (m + n) / 2 - 1
        variance = bound * (1 - bound) * (1 + extra * ((1 - bound) / (2 - bound) + bound / (1 + bound))) / (m * n)
        if 1e-6 < bound < 1 - 1e-6:
            assert abs(auc - bound) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="An area of"):
        auc_interval(auc + 2, m, n)


def test_subspaces():
    source = torch.Generator().manual_seed(0)
    axes, mix = torch.eye(32), torch.randn(4, 4, generator=source)
    same = subspace_overlap(axes[:4], mix @ axes[:4])
    assert same.overlap == pytest.approx(1, abs=1e-9) and same.ranks == (4, 4) and same.expected == 4 / 32
    assert subspace_overlap(axes[:4], axes[4:9]).overlap == 0
    assert subspace_overlap(axes[:2], axes[:5]).overlap == pytest.approx(1)  # one holds the other
    assert subspace_overlap(axes[:4], torch.cat([axes[2:4], axes[8:10]])).overlap == pytest.approx(0.5)
    tilted = math.cos(0.3) * axes[:1] + math.sin(0.3) * axes[1:2]
    found = subspace_overlap([Steering(axes[0], 2)], [Steering(tilted[0], 2, strength=-5)])
    assert found.cosines.tolist() == pytest.approx([math.cos(0.3)])
    basis = subspace_basis(torch.cat([mix @ axes[:4], 1e-3 * axes[:2], axes[5:6]]))
    assert len(basis) == 5 and torch.allclose(basis @ basis.T, torch.eye(5, dtype=torch.float64), atol=1e-9)
    a, b = torch.randn(2, 5, 32, generator=source, dtype=torch.float64)
    q, r = torch.linalg.qr(a.T).Q, torch.linalg.qr(b.T).Q
    assert subspace_overlap(a, b).overlap == pytest.approx(((q.T @ r) ** 2).sum().item() / 5)
    with pytest.raises(ValueError, match="different widths: 32 and 16"):
        subspace_overlap(axes, torch.eye(16))
    with pytest.raises(ValueError, match="at least 1 vectors"):
        subspace_overlap(axes, axes[:0])


def test_effective_dimension():
    axes = torch.eye(32)
    assert effective_dimension(axes[:6] * torch.arange(1.0, 7)[:, None]) == pytest.approx(6)  # lengths do not matter
    assert effective_dimension([Steering(axes[0], 2), Steering(-3 * axes[0], 1)]) == pytest.approx(1)
    assert effective_dimension(torch.cat([axes[:1].expand(3, -1), axes[1:2]])) == pytest.approx(16 / 10)
