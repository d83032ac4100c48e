"""Recipes: targets read off references, reentrant steering, unsupervised vectors, scores without labels."""

import pytest
import torch

from oneshot_steering.models import tiny_lm
from oneshot_steering.objective import Example, Objective, Shift, Terms, record_text
from oneshot_steering.optimize import Job, Stop, optimize_many
from oneshot_steering.recipes import beam_search, geodesic, label_free_scores, match_reference, melbo, reentrant, satisfice_to
from oneshot_steering.steering import Steering


def log_prob(lm, prompt, completion):
    return lm.log_probs(prompt, completion).sum().item()


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_likeliest_continuation_beats_the_greedy_one(architecture):
    lm = tiny_lm(architecture)
    lm.model.generation_config.eos_token_id = None
    ids = lm.encode("the other")
    greedy = [step[0] for step in lm.decode_steps([ids], 3)]
    beam = beam_search(lm, "the other", tokens=3, beams=30)
    assert lm.encode_pair("the other", beam).completion and "\ufffd" not in beam
    assert log_prob(lm, "the other", beam) >= log_prob(lm, "the other", lm.decode(greedy)) - 1e-4


def test_targets_are_the_losses_on_the_reference():
    lm, objective = tiny_lm(), Objective(coldness=1.0)
    example = match_reference(lm, "a fox", "the other dogs", tokens=3, objective=objective)
    assert example.prompt == "a fox"
    assert example.targets[0] == pytest.approx(-log_prob(lm, "the other dogs", example.promote[0]), rel=1e-4)
    vector = Steering(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
    with lm.steer(vector):
        steered = satisfice_to(lm, "a fox", " dogs", "the other", fraction=0.75, objective=objective)
        assert steered.targets[0] == pytest.approx(-0.75 * log_prob(lm, "the other", " dogs"), rel=1e-4)
    with pytest.raises(ValueError, match="fraction must be positive"):
        satisfice_to(lm, "a", "b", "c", fraction=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_reentrant_steering_learns_what_the_forced_model_says(architecture):
    lm = tiny_lm(architecture)
    options = dict(early_settings=dict(steps=30), late_settings=dict(steps=40, max_norm=None, lr=0.3))
    found = reentrant(lm, Example("the other", promote=" dogs"), early=1, late=3, tokens=4, **options)
    early = found.early.steering
    assert not early.vector.any() and early.mode == "affine" and early.layers == (1,)
    with lm.steer(early):
        said = [step[0] for step in lm.decode_steps([lm.encode("the other")], 4)]
    assert list(found.recorded.pair.completion) == [t for t in said if t is not None]
    assert found.steering.mode == "clamp" and found.steering.layers == (3,)
    assert found.late.loss < 0.7 * found.late.losses[0].sum()
    with pytest.raises(ValueError, match="must be above the early layer"):
        reentrant(lm, Example("a", promote="b"), early=2, late=1)


def test_unsupervised_vectors_move_the_target_layer():
    lm, prompts = tiny_lm(), ["the other dogs", "a fox"]
    found = melbo(lm, prompts, 1, norm=2.0, n=3, shift=Shift(3), steps=40)
    assert all(n == pytest.approx(2, rel=1e-4) for f in found for n in f.norms)
    for fit in found:
        plain = [lm.hidden_states(p, 3) for p in prompts]
        with lm.steer(fit.steering):
            moved = [lm.hidden_states(p, 3) for p in prompts]
        distances = sum((m - p).norm() for m, p in zip(moved, plain, strict=True)).item()
        assert distances == pytest.approx(-fit.loss, rel=1e-3) and -fit.loss > -fit.losses[0].sum()
    with pytest.raises(ValueError, match="must be above"):
        melbo(lm, prompts, 3, norm=1.0, shift=Shift(2))
    with pytest.raises(TypeError, match="Shift"):
        melbo(lm, prompts, 1, norm=1.0, target=3)


def test_geodesic_keeps_ends_and_norm():
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [3.0]])
    line = geodesic(a, b, 9)
    wanted = torch.linspace(0, 1, 11)[1:-1] * (b.norm() - a.norm()) + a.norm()
    assert torch.allclose(line.norm(dim=-1), wanted, rtol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(line, b[None], dim=-1)
    assert (cosines.diff() > 0).all()


def test_label_free_scores_by_hand():
    lm = tiny_lm("qwen3")
    prompts, text = ("the other", "There is"), "the fox is in the sun"
    jobs = [Job(Example(p, promote=" dogs"), 2, lr=0.3, steps=12, max_norm=8, stop=Stop(change=None)) for p in prompts]
    fits = optimize_many(lm, jobs)
    scores = label_free_scores(lm, jobs, fits, texts=[text], points=4)
    own = [Terms(lm, job.examples) for job in jobs]
    neutral = Terms(lm, Example(text, match=record_text(lm, text)), Objective(1.0, per_token=True))
    with torch.no_grad():
        for i, j in ((0, 1), (1, 0)):
            mine, other = fits[i].steering, fits[j].steering
            assert scores["cross-example loss"][i] == pytest.approx(own[j](mine).item(), rel=1e-3)
            assert scores.KL[i] == pytest.approx(neutral(mine).item(), rel=1e-3, abs=1e-5)
            between = [own[i](mine.replace(vector=v)).item() for v in geodesic(mine.vector, other.vector, 4)]
            rise = max(0.0, max(between) - max(own[i](mine).item(), own[i](other).item()))
            assert scores.barrier[i] == pytest.approx(rise, rel=1e-2, abs=1e-3)
    cosine = torch.nn.functional.cosine_similarity(fits[0].steering.vector, fits[1].steering.vector, dim=0).item()
    assert scores["mean cosine distance"].tolist() == pytest.approx([1 - cosine] * 2, abs=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        label_free_scores(lm, jobs[:1], fits[:1])
