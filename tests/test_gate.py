"""A gate opens by the unsteered stream, lets a set share of other prompts pass, and leaves the answers of the rest as they are."""

import pytest
import torch

from oneshot_steering.evaluate import compare
from oneshot_steering.gate import Gate, fit_gate, separating_direction
from oneshot_steering.models import tiny_lm
from oneshot_steering.steering import Steering

PROMPTS = [f"{first} {second}" for first in ("the red", "one more", "a fox") for second in ("house", "river", "garden", "tree")]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("qwen2")


@pytest.mark.parametrize("share", [0, 0.1, 0.34, 0.5])
def test_no_more_than_the_share_of_other_prompts_passes(lm, share):
    gate = fit_gate(lm, (PROMPTS[:4], PROMPTS[4:8]), PROMPTS, 1, share=share)
    assert sum(gate.opens(lm, PROMPTS)) == int(share * len(PROMPTS))


@pytest.mark.parametrize("position", [-1, -2, 1])
def test_projections_are_dot_products_with_the_stream_at_the_token(lm, position):
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    found = Gate(direction, 2, position).projections(lm, PROMPTS, batch_size=5)
    expected = torch.stack([h[position] for h in lm.hidden_states(PROMPTS, 2)]) @ direction / direction.norm()
    assert torch.allclose(found, expected, atol=1e-5)


def test_steering_does_not_move_the_gate(lm):
    gate, vector = fit_gate(lm, (PROMPTS[:4], PROMPTS[4:]), PROMPTS, 2), Steering(torch.full((lm.d_model,), 3.0), 1)
    before = gate.projections(lm, PROMPTS)
    with lm.steer(vector):
        assert torch.equal(gate.projections(lm, PROMPTS), before)


def test_prompts_below_the_threshold_are_answered_as_without_the_vector(lm):
    gate, vector = fit_gate(lm, (PROMPTS[:4], PROMPTS[4:]), PROMPTS, 1, share=0.3), Steering(torch.full((lm.d_model,), 9.0), 1)
    plain, opened = lm.generate(PROMPTS, max_new_tokens=6), gate.opens(lm, PROMPTS)
    with lm.steer(vector):
        steered = lm.generate(PROMPTS, max_new_tokens=6)
    with lm.steer(rows=gate.rows(lm, vector, PROMPTS)):
        gated = lm.generate(PROMPTS, max_new_tokens=6)
    assert any(opened) and plain != steered
    assert gated == [s if is_open else p for s, p, is_open in zip(steered, plain, opened, strict=True)]


def test_answers_behind_the_gate_are_those_of_rows_that_pass(lm):
    gate, vector = fit_gate(lm, (PROMPTS[:4], PROMPTS[4:]), PROMPTS, 1, share=0.3), Steering(torch.full((lm.d_model,), 9.0), 1)
    sets = {"some": PROMPTS[:5], "others": PROMPTS[5:]}
    scorers = dict(long=lambda asked, texts: [len(text) > 12 for text in texts])
    table = compare(lm, dict(v=vector), sets, scorers, strengths=(0.5, 1), max_new_tokens=6, neutral=["A line."])
    gated = gate.behind(lm, table, sets)
    assert set(zip(gated.vector, gated.strength, strict=True)) == {("v, gated", 0.5), ("v, gated", 1)}
    assert gated.long.dtype == table.long.dtype
    for strength, part in gated.groupby("strength"):
        with lm.steer(rows=gate.rows(lm, strength * vector, PROMPTS)):
            assert list(part.sort_values("prompt").text) == lm.generate(PROMPTS, max_new_tokens=6)
    assert list(gated.long) == [len(text) > 12 for text in gated.text]
    assert list(gated.prompts) == list(table[table.vector == "v"].prompts) and gated.kl.notna().all()
    with pytest.raises(ValueError, match="no unsteered answer"):
        gate.behind(lm, table[table.vector == "v"], sets)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_direction_is_fishers_and_does_not_depend_on_the_unit(scale):
    source = torch.Generator().manual_seed(1)
    states = torch.randn(60, 8, generator=source, dtype=torch.float64) * torch.tensor([0.2, *[3.0] * 7], dtype=torch.float64)
    states[:30, 0] += 1
    means = states[:30].mean(0) - states[30:].mean(0)
    inner = torch.cat([states[:30] - states[:30].mean(0), states[30:] - states[30:].mean(0)])
    spread = inner.T @ inner / 60
    expected = torch.linalg.inv(spread + 0.5 * spread.trace() / 8 * torch.eye(8).double()) @ means
    found = separating_direction(scale * states[:30], scale * states[30:], 0.5).double()
    assert torch.cosine_similarity(found, expected, dim=0).item() == pytest.approx(1, abs=1e-6)
    plain = separating_direction(states[:30], states[30:], 1e9).double()
    assert torch.cosine_similarity(plain, means, dim=0).item() == pytest.approx(1, abs=1e-6)


def test_one_prompt_of_each_kind_gives_their_difference():
    one, other = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))
    difference = (one - other)[0]
    assert torch.allclose(separating_direction(one, other), difference / difference.norm(), atol=1e-6)
