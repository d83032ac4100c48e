"""Calibration: the strongest effect inside a budget, in few evaluations, beside a fine grid."""

import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from oneshot_steering.calibrate import Budget, calibrate, mean_score, strength_curve
from oneshot_steering.evaluate import Contains, RefusalOdds, side_effects
from oneshot_steering.lm import block_input
from oneshot_steering.models import tiny_lm
from oneshot_steering.steering import Steering


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def vector():
    return Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)), 2)


def shaped(shape, vector):
    "A score that knows the strength: the shape of the first steered state's shift along the vector."

    def score(lm):
        score.calls += 1
        seen = []
        look = lambda module, args, kwargs: seen.append(block_input(args, kwargs))
        handle = lm.layers[2].register_forward_pre_hook(look, with_kwargs=True)
        lm.log_probs("the other", " dogs")
        handle.remove()
        along = (seen[0][0, 0] - plain) @ vector.vector / vector.vector.square().sum()
        return shape(along.item())

    plain, score.calls = tiny_lm().hidden_states("the other dogs", 2)[0], 0
    return score


SHAPES = dict(
    rising=lambda c: c,
    saturating=lambda c: math.tanh(3 * c),
    peaked=lambda c: math.exp(-((c - 0.8) ** 2) / 0.3),
    early=lambda c: c * math.exp(-3 * c),
    collapsing=lambda c: c if c < 1.1 else -c,
)


GROWTH = dict(  # of damage with strength: (kl, log of the ratio of perplexities)
    square=lambda c: (c * c, c * c / 3),
    linear=lambda c: (c, 0.5 * c),
    steep=lambda c: (c**4, math.expm1(c)),
    sudden=lambda c: (0.01 * c + 50 * max(0.0, c - 1.3), 0.01 * c + 50 * max(0.0, c - 1.2)),
)


def inside_grid(found, used, sign):
    "A fine grid of strengths up to the first that is beyond the budget."
    strengths = np.linspace(0, 2 * abs(found.edge), 201)[1:] * sign
    shares = used(strengths)
    return strengths[np.cumprod(np.array(shares) <= 1).astype(bool)]


def check(found, shape, strengths):
    values = [SHAPES[shape](abs(c)) for c in strengths]
    best, highest = strengths[int(np.argmax(values))], max(values)
    assert abs(found.edge) == pytest.approx(abs(strengths).max(), rel=0.03)
    assert found.score == pytest.approx(SHAPES[shape](abs(found.strength)), abs=1e-3)
    flat = dict(saturating=0.99, early=0.97)  # any strength on a plateau will do
    near = 0.25 if shape == "collapsing" else 0.1  # a cliff is a jump: eight evaluations halve their way to it
    assert abs(found.strength / best - 1) < near or found.score >= flat.get(shape, 2) * highest, (found.strength, best, found.curve)
    assert np.sign(found.strength) == np.sign(best) and found.steering.strength == pytest.approx(found.strength)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_ten_percent_of_a_fine_grid(lm, vector, shape, sign):
    score, budget = shaped(lambda c: SHAPES[shape](sign * c), vector), Budget(kl=0.5)
    found = calibrate(lm, vector, score, budget, sign=sign)
    assert score.calls == found.evaluations <= 8
    used = lambda strengths: side_effects(lm, [c * vector for c in strengths]).kl / budget.kl
    check(found, shape, inside_grid(found, used, sign))


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [Budget(kl=1.5), Budget(ratio=1.8), Budget(kl=2.0, ratio=3.0)], ids=["kl", "ratio", "both"])
def test_any_growth_of_damage(lm, vector, monkeypatch, budget, shape, growth):
    def damage(lm, steering, strengths, neutral):
        kl, ratio = zip(*(GROWTH[growth](abs(c)) for c in strengths), strict=True)
        return pd.DataFrame(dict(strength=strengths, kl=kl, ratio=np.exp(ratio), dose=strengths))

    monkeypatch.setattr(sys.modules["oneshot_steering.calibrate"], "_damage", damage)
    found = calibrate(lm, vector, shaped(SHAPES[shape], vector), budget, start=8.0 if growth == "linear" else 0.3)
    assert found.evaluations <= 8
    check(found, shape, inside_grid(found, lambda strengths: [budget.used(r) for r in damage(lm, vector, strengths, ()).itertuples()], 1))


def test_a_budget_that_does_not_end(lm, vector):
    found = calibrate(lm, vector, shaped(lambda c: c, vector), Budget(kl=1e6), most=4)
    assert found.edge == found.strength == 4


def test_no_strength_is_better_than_none(lm, vector):
    found = calibrate(lm, vector, shaped(lambda c: -c, vector), Budget(kl=0.5))
    assert found.strength == 0 and found.score == found.unsteered and found.steering.norm == 0


def test_scores_that_are_not_there_lose(lm, vector):
    found = calibrate(lm, vector, shaped(lambda c: c if c < 0.5 else math.nan, vector), Budget(kl=1.0))
    assert 0 < found.strength < 0.5 or found.strength == 0
    assert not math.isnan(found.score)


def test_the_curve_is_the_side_effects(lm, vector):
    curve = strength_curve(lm, vector, lambda lm: lm.log_probs("a", " fox").sum().item(), (1.0, -0.5, 0))
    assert curve.strength.tolist() == [-0.5, 0, 1]
    effects = side_effects(lm, [-0.5 * vector, None, vector])
    assert np.allclose(curve[["kl", "perplexity", "dose"]], effects[["kl", "perplexity", "dose"]], rtol=1e-4, atol=1e-5)
    for strength, score in zip(curve.strength, curve.score, strict=True):
        with lm.steer(strength * vector):
            assert score == pytest.approx(lm.log_probs("a", " fox").sum().item(), abs=1e-4)


def test_scores_of_answers(lm):
    prompts = ["the other", "a fox"]
    said = lm.generate(prompts, max_new_tokens=3)
    assert mean_score(prompts, Contains((said[0],)), max_new_tokens=3)(lm) in (0.5, 1.0)
    assert mean_score(prompts, lambda q, a: [None, 3.0], max_new_tokens=1)(lm) == 3
    assert mean_score(prompts, RefusalOdds())(lm) == pytest.approx(np.mean(RefusalOdds().under(lm, prompts)))


def test_bad_settings_are_refused(lm, vector):
    score = lambda lm: 0.0
    bad = (("sign", dict(sign=0)), ("at least 3", dict(evaluations=2)), ("start", dict(start=0)), ("start", dict(start=9, most=3)))
    for match, settings in bad:
        with pytest.raises(ValueError, match=match):
            calibrate(lm, vector, score, Budget(kl=1), **settings)
    with pytest.raises(ValueError, match="beyond the budget"):
        calibrate(lm, 1e6 * vector, score, Budget(kl=1e-9), start=50)
    with pytest.raises(ValueError, match="finite"):
        strength_curve(lm, vector, score, [math.inf])
    for bad in (dict(), dict(kl=-1), dict(ratio=1.0)):
        with pytest.raises(ValueError, match=r"bound|positive|above"):
            Budget(**bad)
