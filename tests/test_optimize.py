"""Optimisation: gradients, signs, stopping, interrupts, and the shortcut equal to the plain pass."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oneshot_steering.lm import LM
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm
from oneshot_steering.objective import Example, Objective, Shift, Terms, record
from oneshot_steering.optimize import Affine, Constraints, Job, Noise, Refine, Retain, Stop, _Run, _Shared, optimize, optimize_many
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
    plain.use_shortcuts = False
    fits = [optimize(lm, EXAMPLE, (2, 3), lr=0.5, steps=12, max_norm=10) for lm in (fast, plain)]
    assert fast.can_resume and torch.allclose(fits[0].losses, fits[1].losses, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lowers_the_loss_and_keeps_its_norms(mode):
    chosen = Affine(rank=2, max_norm=1.5) if mode == "affine" else mode
    fit = optimize(tiny_lm(), EXAMPLE, 1, mode=chosen, lr=0.5, steps=40, start=5.0, max_norm=5)
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
    calls, compute = [], Terms._losses

    def broken(self, *args):
        calls.append(1)
        return compute(self, *args) * (math.nan if len(calls) > nan_at else 1)

    monkeypatch.setattr(Terms, "_losses", broken)
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

    fit = optimize(lm, EXAMPLE, 2, lr=0.5, stop=Stop(callback=interrupt))
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


@pytest.mark.parametrize(
    "old, new",
    [
        ("start_norm", "start="),
        ("min_norm", r"constraints=Constraints\(min_norm"),
        ("orthogonal_to", r"constraints=Constraints\(orthogonal_to"),
        ("affine", r"mode=Affine\("),
        ("satisfice", r"objective=Objective\(satisfice=True\)"),
        ("callback", r"stop=Stop\(callback="),
        ("learning_rate", "it has examples, layer, max_norm, lr"),
    ],
)
def test_an_argument_that_moved_says_where_it_is(old, new):
    with pytest.raises(TypeError, match=new):
        optimize(tiny_lm(), EXAMPLE, 2, **{old: 1})


def test_a_number_and_nothing_are_norms_of_a_random_start():
    lm = tiny_lm()
    fits = [optimize(lm, EXAMPLE, 2, steps=0, seed=3, start=start).steering for start in (None, 1.0, 3.0)]
    assert torch.equal(fits[0].vector, fits[1].vector) and torch.allclose(fits[2].vector, 3 * fits[1].vector)
    given = optimize(lm, EXAMPLE, 2, steps=0, start=fits[2]).steering
    assert torch.equal(given.vector, fits[2].vector)
    assert [f.about["settings"]["start_norm"] for f in (*fits, given)] == [1.0, 1.0, 3.0, None]


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


LONG = Example("the other dogs are sleeping in the warm morning sun", promote=[" dogs", " fox"], suppress=" cats")


@torch.no_grad()
@pytest.mark.parametrize("example", [EXAMPLE, LONG], ids=["short", "longer than the window"])
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_packed_rows_change_nothing(architecture, example):
    lm, steering = tiny_lm(architecture), Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
    twin = dataclasses.replace(example, prompt=example.prompt + " while")
    terms = Terms(lm, [example, twin])
    packed = (lm.window or 99) > len(lm.encode(example.prompt)) + 5
    assert (terms.layout(steering).attention is not None) == packed
    by_hand = torch.cat([losses_by_hand(lm, e, steering) for e in (example, twin)])
    assert torch.allclose(terms(steering), by_hand, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_terms_whose_prompts_end_elsewhere_do_not_share_a_row_of_prompt_steering():
    lm, steering = tiny_lm(), Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1, positions="prompt")
    longer = record(lm, "the other dogs", " are")
    both = Terms(lm, Example("the other", promote=" dogs are", match=longer))(steering)
    alone = Example("the other", promote=" dogs are"), Example("the other", match=longer)
    apart = torch.cat([Terms(lm, example)(steering) for example in alone])
    assert torch.allclose(both, apart, rtol=1e-4)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_many_at_once_equal_single_runs(architecture):
    lm = tiny_lm(architecture)
    other = Example("There is", promote=" no reason", suppress=["a", " long dog"], sign=-1)
    options = dict(lr=0.3, steps=8, max_norm=6)
    jobs = [
        Job(EXAMPLE, 1, **options),
        Job([EXAMPLE, other], 1, seed=3, **options),
        Job(other, 3, positions="last_2", **options),
        Job(EXAMPLE, (1, 2), mode=Affine(rank=2), **options),
        Job(other, 1, mode="clamp", retain=Retain(("the fox is here", "a dog")), **options),
        Job(LONG, 2, stop=Stop(target=1e9), **options),
    ]
    for tokens in (10_000, 30):
        for fit, job in zip(optimize_many(lm, jobs, tokens_per_pass=tokens), jobs, strict=True):
            alone = optimize_many(lm, [job])[0]
            assert (fit.stopped, fit.steps) == (alone.stopped, alone.steps)
            assert torch.allclose(fit.losses, alone.losses, rtol=2e-3, atol=1e-5)


def test_many_are_interrupted_together_and_keep_their_best():
    lm, seen = tiny_lm(), []

    def interrupt(step, losses, steering):
        seen.append(step)
        if len(seen) == 9:
            raise KeyboardInterrupt

    short = Job(EXAMPLE, 2, steps=1)
    fits = optimize_many(lm, [Job(EXAMPLE, 1, lr=0.3), Job(EXAMPLE, 2, seed=1, lr=0.3, stop=Stop(callback=interrupt)), short])
    assert [f.stopped for f in fits] == ["interrupted", "interrupted", "steps"] and all(f.loss <= f.losses[0].sum() for f in fits)
    assert not [m for m in lm.model.modules() if m._forward_pre_hooks or "forward" in vars(m)]


def test_one_broken_job_leaves_the_others_alone():
    lm = tiny_lm()
    alone = optimize(lm, EXAMPLE, 1, lr=0.3, steps=6)
    broken = Job(EXAMPLE, 1, lr=1e30, steps=6, start=1e18)
    fits = optimize_many(lm, [broken, Job(EXAMPLE, 1, lr=0.3, steps=6)])
    assert torch.allclose(fits[1].losses, alone.losses, rtol=1e-3) and fits[0].steering.vector.isfinite().all()


def test_retaining_lowers_the_divergence_and_a_budget_is_kept():
    lm, texts = tiny_lm(), ("the fox is in the sun", "a dog and other dogs")
    free, weighted, bound = (
        optimize(lm, EXAMPLE, 1, lr=0.3, steps=60, retain=Retain(texts, weight, budget))
        for weight, budget in ((0.0, None), (30.0, None), (1.0, 0.3))
    )
    kl = [f.retained[f.step] for f in (free, weighted, bound)]
    assert kl[1] < kl[0] / 2 and kl[2] <= 0.301 < kl[0] and bound.loss < bound.losses[0].sum()
    prompts = [lm.encode(t) for t in texts]
    with torch.no_grad():
        by_hand = []
        for ids in prompts:
            at, mask = lm.pad([ids])
            plain = lm.run(at, mask, mask.sum(-1)).logits[0, :-1].log_softmax(-1)
            with lm.steer(bound.steering):
                steered = lm.run(at, mask, mask.sum(-1)).logits[0, :-1].log_softmax(-1)
            by_hand.append((plain.exp() * (plain - steered)).sum(-1).mean().item())
    assert kl[2] == pytest.approx(sum(by_hand) / 2, rel=1e-3)


def test_refinement_shrinks_the_vector_and_keeps_the_losses():
    lm = tiny_lm()
    fit = optimize(lm, EXAMPLE, 1, lr=0.5, steps=80, stop=Stop(target=26.0), refine=Refine(steps=150))
    reached = fit.losses[: fit.refined].sum(-1)
    start = int((reached <= 26.0).nonzero()[0])
    assert fit.norms[fit.step] < 0.95 * fit.norms[start] and fit.step >= fit.refined
    assert (fit.losses[fit.step] <= fit.losses[start] + 1e-3 * (1 + fit.losses[start].max())).all()


def test_refinement_takes_any_objective():
    lm, away = tiny_lm(), torch.eye(32)[3]
    options = dict(lr=0.5, steps=80, stop=Stop(target=26.0))
    least = lambda s: (s.vector @ away).square() + 1
    plain, fit = optimize(lm, EXAMPLE, 1, **options), optimize(lm, EXAMPLE, 1, refine=Refine(steps=100, least=least), **options)
    assert abs(fit.steering.vector @ away) < 0.5 * abs(plain.steering.vector @ away) and fit.loss <= plain.loss + 0.1
    assert "lambda" in fit.steering.about["settings"]["refine"]["least"]


def test_refinement_can_look_for_the_greatest_shift():
    lm = tiny_lm()
    options = dict(lr=0.5, steps=80, max_norm=16, stop=Stop(target=26.0))
    plain, far = optimize(lm, EXAMPLE, 1, **options), optimize(lm, EXAMPLE, 1, refine=Refine(steps=150, least=Shift(3)), **options)
    shift = Terms(lm, Example(EXAMPLE.prompt, shift=Shift(3)))
    with torch.no_grad():
        assert shift(far.steering) < shift(plain.steering)
    assert far.losses[far.step].sum() <= plain.loss + 0.05


@torch.no_grad()
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_shift_by_hand(architecture):
    lm, steering = tiny_lm(architecture), Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
    plain = lm.hidden_states("the other dogs", 3)
    with lm.steer(steering):
        moved = lm.hidden_states("the other dogs", 3) - plain
    for power, root in ((2, 2), (4, 1)):
        wanted = -moved.norm(dim=-1).pow(power).sum().pow(1 / root).item()
        assert Terms(lm, Example("the other dogs", shift=Shift(3, power, root)))(steering).item() == pytest.approx(wanted, rel=1e-3)


def test_satisficing_converges_to_the_targets():
    lm = tiny_lm()
    wanted = Example("the other", promote=" dogs", suppress=" cats", targets=[6.0, 0.05])
    fit = optimize(lm, wanted, 1, lr=0.1, steps=400, objective=Objective(satisfice=True))
    assert fit.losses[fit.step].tolist() == pytest.approx([6.0, 0.05], abs=0.02)
    early = optimize(lm, wanted, 1, lr=0.1, steps=400)
    assert early.stopped == "every term's target" and early.steps < fit.steps


def test_lbfgs_needs_fewer_steps_and_never_takes_a_worse_point():
    lm = tiny_lm()
    reached = [optimize(lm, EXAMPLE, 1, steps=60, max_norm=15, optimizer=o, lr=0.1, stop=Stop(change=None)) for o in ("adam", "lbfgs")]
    target = reached[0].loss
    fast = optimize(lm, EXAMPLE, 1, steps=60, max_norm=15, optimizer="lbfgs", lr=0.1, stop=Stop(target=target))
    assert fast.stopped == "target" and fast.steps < reached[0].step
    assert max(reached[1].norms) <= 15 + 1e-4


NOISES = [Noise(0.2), Noise(0.2, draws=3), Noise(0.2, tangent=True), Noise(0.2, anti=True, tangent=True)]


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_noise_is_drawn_as_asked(noise):
    lm = tiny_lm()
    run = _Run(_Shared(lm), Job(EXAMPLE, 1, noise=noise, lr=0.1, steps=3))
    fit = optimize(lm, EXAMPLE, 1, noise=noise, lr=0.3, steps=40)
    assert fit.loss < fit.losses[0].sum() and torch.equal(fit.losses, optimize(lm, EXAMPLE, 1, noise=noise, lr=0.3, steps=40).losses)
    vector = run.parameters.tensors["vector"]
    vector.grad = torch.randn(32, generator=torch.Generator().manual_seed(0))
    draws = [torch.stack(run._noises()) for _ in range(200)]
    assert all(d.shape == (noise.draws, 32) for d in draws)
    drawn = torch.stack(draws).double()
    spread = 0.2 * math.sqrt(2 if noise.anti else 1)
    assert drawn.std().item() == pytest.approx(spread, rel=0.1)
    if noise.tangent:
        assert (drawn @ vector.grad.double()).abs().max() < 1e-4
    follows = (drawn[1:] * drawn[:-1]).mean() / drawn.square().mean()
    assert follows.item() == pytest.approx(-0.5 if noise.anti else 0, abs=0.1)


def test_vectors_stay_orthogonal_and_on_their_sphere():
    lm = tiny_lm()
    first = optimize(lm, EXAMPLE, 1, lr=0.3, steps=10)
    second = optimize(lm, EXAMPLE, 1, lr=0.3, steps=10, max_norm=4, constraints=Constraints(4, [first.steering]))
    assert second.norms == pytest.approx([4] * 11, rel=1e-5)
    assert abs(torch.cosine_similarity(first.steering.vector, second.steering.vector, dim=0).item()) < 1e-5


def test_a_sharded_model_with_weights_on_disk_gives_the_same_losses(tmp_path):
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "model")
    homes = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    homes |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=homes, offload_folder=tmp_path / "offload")
    sharded = LM(model, lm.tok, name=lm.name)
    for layer in (1, 3):
        fits = [optimize(m, EXAMPLE, layer, lr=0.3, steps=5) for m in (lm, sharded)]
        assert torch.allclose(fits[0].losses, fits[1].losses, rtol=1e-4)
    assert sharded.can_resume and sharded.can_pack


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_give_a_gradient_to_the_vector_alone(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    lm = tiny_lm(hidden_size=64, head_dim=16, intermediate_size=128)
    lm.model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantised = LM(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu"), lm.tok)
    fit = optimize(quantised, EXAMPLE, 2, lr=0.3, steps=15)
    assert fit.loss < 0.9 * fit.losses[0].sum() and all(p.grad is None for p in quantised.model.parameters())


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "recurrent_gemma", "falcon_mamba"])
def test_models_that_cannot_be_packed_say_so_and_are_right(architecture):
    "Positions that are counted from a mask, and state that is carried from token to token."
    lm = tiny_lm(architecture, **(dict(block_types=["recurrent", "attention"]) if architecture == "recurrent_gemma" else {}))
    assert not lm.can_pack
    steering = Steering(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)), 1)
    with torch.no_grad():
        found = Terms(lm, EXAMPLE)(steering)
        assert torch.allclose(found, losses_by_hand(lm, EXAMPLE, steering), rtol=1e-3, atol=1e-5)


def test_half_precision_stays_close_to_full():
    lm = tiny_lm("qwen2")
    full = optimize(lm, EXAMPLE, 1, lr=0.3, steps=10)
    lm.model.bfloat16()
    half = optimize(lm, EXAMPLE, 1, lr=0.3, steps=10)
    assert half.steering.vector.dtype == torch.float32
    assert torch.allclose(full.losses.sum(-1), half.losses.sum(-1), rtol=0.05)
