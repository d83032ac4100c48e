"""Optimisation: gradients, signs, stopping, interrupts, and the shortcut equal to the plain pass."""

import dataclasses
import math

import pytest
import torch

from oneshot_steering.lm import TINY_ARCHITECTURES, tiny_lm
from oneshot_steering.objective import Example, Objective, Terms
from oneshot_steering.optimize import Affine, Stop, optimize
from oneshot_steering.recipes import swapped_choice
from oneshot_steering.steering import MODES, Steering

EXAMPLE = Example("the other", promote=[" dogs", " fox s"], suppress=" cats")


def losses_by_hand(lm, example, steering, coldness=0.7):
    "The terms of one example, a full pass each, probabilities in fp64 from their definition."
    found = []
    for kind, texts in (("promote", example.promote), ("suppress", example.suppress)):
        for text in texts:
            pair = lm.encode_pair(example.prompt, text)
            signed = steering if example.sign == 1 else -steering
            with lm.steer(signed if example.positions is None else signed.replace(positions=example.positions)):
                ids, mask = lm.pad([pair.ids])
                logits = lm.run(ids, mask, torch.tensor([pair.boundary])).logits[0].double()
            p = (coldness * logits).softmax(-1)[range(pair.boundary - 1, len(pair.ids) - 1), pair.completion]
            found.append(-(p if kind == "promote" else 1 - p).log().sum().item())
    return torch.tensor(found)


@torch.no_grad()
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_terms_of_many_examples_by_hand(architecture):
    lm, steering = tiny_lm(architecture), Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)), (1, 2))
    examples = [EXAMPLE, Example("There is", promote=" no reason", sign=-1), Example("a", suppress=["b", " long dog"], positions="last_1")]
    by_hand = torch.cat([losses_by_hand(lm, e, steering) for e in examples])
    assert torch.allclose(Terms(lm, examples)(steering), by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", [Objective(), Objective(1.3, "log_prob", per_token=True)], ids=["default", "other"])
def test_gradients_by_finite_differences(mode, objective):
    lm = tiny_lm("gpt2")  # its layer norm computes in fp64
    lm.model.double()
    terms = Terms(lm, [EXAMPLE, dataclasses.replace(EXAMPLE, sign=-1, positions="last_1")], objective)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = (draw(32), draw(2, 32), draw(2, 32)) if mode == "affine" else (draw(32),)

    def loss(vector, left=None, right=None):
        return terms(Steering(vector, (1, 3), mode, left=left, right=right)).sum()

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_shortcut_changes_nothing(architecture):
    fast, plain = tiny_lm(architecture), tiny_lm(architecture)
    plain._can_resume = False
    fits = [optimize(lm, EXAMPLE, (2, 3), lr=0.5, steps=12, max_norm=10) for lm in (fast, plain)]
    assert fast.can_resume and torch.allclose(fits[0].losses, fits[1].losses, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lowers_the_loss_and_keeps_its_norms(mode):
    fit = optimize(tiny_lm(), EXAMPLE, 1, mode=mode, lr=0.5, steps=40, start_norm=5, max_norm=5, affine=Affine(rank=2, max_norm=1.5))
    assert fit.loss < fit.losses[0].sum()
    assert max(fit.norms) <= 5 + 1e-4
    if mode == "affine":
        assert fit.steering.left.norm(dim=-1).max() <= 1.5 + 1e-5 and fit.steering.left.shape == (2, 32)


def test_losses_belong_to_the_vector_that_is_returned():
    lm = tiny_lm("qwen2")
    fit = optimize(lm, EXAMPLE, 2, lr=0.5, steps=15, max_norm=8)
    with torch.no_grad():
        assert torch.allclose(Terms(lm, EXAMPLE)(fit.steering), fit.losses[fit.step], rtol=1e-4)
    assert len(fit.losses) == fit.steps + 1 == len(fit.norms)
    assert fit.steering.about["model"] == lm.name and fit.steering.about["settings"]["seed"] == 0


def test_steps_is_an_upper_bound_and_zero_is_allowed():
    assert optimize(tiny_lm(), EXAMPLE, 2, steps=0).steps == 0
    fit = optimize(tiny_lm(), EXAMPLE, 2, steps=3)
    assert (fit.steps, fit.stopped) == (3, "steps")


def test_patience_counts_consecutive_steps():
    target = optimize(tiny_lm(), EXAMPLE, 2, lr=0.5, steps=10).loss
    once, often = (optimize(tiny_lm(), EXAMPLE, 2, lr=0.5, steps=60, stop=Stop(target=target, patience=n)) for n in (1, 5))
    assert once.stopped == often.stopped == "target" and often.steps >= once.steps + 4
    assert (often.losses[-5:].sum(-1) <= target).all()


@pytest.mark.parametrize("nan_at", [0, 3])
def test_a_loss_that_is_not_finite(monkeypatch, nan_at):
    calls, compute = [], Terms.__call__

    def broken(self, steering=None):
        calls.append(1)
        return compute(self, steering) * (math.nan if len(calls) > nan_at else 1)

    monkeypatch.setattr(Terms, "__call__", broken)
    if nan_at == 0:
        with pytest.raises(ValueError, match="not finite at the start"):
            optimize(tiny_lm(), EXAMPLE, 2)
    else:
        fit = optimize(tiny_lm(), EXAMPLE, 2)
        assert fit.stopped == "non-finite loss" and fit.steps == 2 and fit.steering.vector.isfinite().all()


def test_an_interrupt_restores_the_model_and_keeps_the_best():
    lm = tiny_lm()

    def interrupt(step, losses, steering):
        if step == 5:
            raise KeyboardInterrupt

    fit = optimize(lm, EXAMPLE, 2, lr=0.5, callback=interrupt)
    assert fit.stopped == "interrupted" and fit.loss == pytest.approx(fit.losses.sum(-1).min().item())
    assert not [m for m in lm.model.modules() if m._forward_pre_hooks or "forward" in vars(m)]


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(examples=Example("the", promote="s" * 300)), "context of 256"),
        (dict(examples=[]), "one Example"),
        (dict(layer=4), "layers 0..3"),
        (dict(steps=-1), "steps must be"),
        (dict(max_norm=0), "max_norm must be positive"),
        (dict(lr=math.inf), "lr must be positive and finite"),
        (dict(mode="push"), "expected one of"),
    ],
)
def test_bad_input_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        optimize(tiny_lm(), **{"examples": EXAMPLE, "layer": 2} | wrong)


def test_empty_completion_is_refused():
    with pytest.raises(ValueError, match="completion is empty"):
        optimize(tiny_lm(), Example("the", promote=""), 2)


def test_swapped_choice_is_four_terms_and_mirrored():
    lm = tiny_lm()
    first, second, *kept = swapped_choice(lm, "A) fox B) dog: ", "A) dog B) fox: ", "A", "B", both_signs=True)
    assert (first.promote, first.suppress) == (second.suppress, second.promote) == (("A",), ("B",))
    assert [(k.sign, k.promote, k.suppress, k.targets) for k in kept] == [(-1, ("B",), ("A",), None), (-1, ("A",), ("B",), None)]
    with torch.no_grad():
        now = Terms(lm, [first, second])()
    fit = optimize(lm, [first, second, *kept], 2, lr=0.5, steps=30)
    assert not (now <= torch.tensor([*first.targets, *second.targets])).all() and fit.loss < fit.losses[0].sum()
