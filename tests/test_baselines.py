"""Baselines: equal to sums by hand and to another package, whatever the padding; prompts rendered as the template would."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from oneshot_steering.baselines import (
    NoDirection,
    Prompted,
    Selection,
    caa,
    few_shot,
    pca_direction,
    prefill,
    random_like,
    refusal_direction,
    states_of,
)
from oneshot_steering.lm import LM
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm
from oneshot_steering.next_token import refusal_scores
from oneshot_steering.steering import Steering, load_steering

FIXTURES = Path(__file__).parent / "fixtures"
MADE = json.loads((FIXTURES / "caa.json").read_text(encoding="utf-8"))
RECIPES = {"caa": caa, "pca_direction": pca_direction}
POSITIVE, NEGATIVE = (list(texts) for texts in zip(*MADE["pairs"], strict=True))
each_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
some_architectures = pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox"])


def pads_left(lm):
    "The same model, padded on the other side."
    lm.pad = lambda sequences, side="right": LM.pad(lm, sequences, side="left")
    return lm


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def maker():
    spec = importlib.util.spec_from_file_location("make_caa", FIXTURES / "make_caa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("architecture", MADE["fingerprints"])
def test_equals_the_vectors_of_steering_vectors(architecture):
    lm = tiny_lm(architecture)
    weights = sum(p.double().abs().sum().item() for p in lm.model.parameters())
    assert weights == pytest.approx(MADE["fingerprints"][architecture]), "other tiny weights: run tests/fixtures/make_caa.py again"
    cases = [case for case in MADE["cases"] if case["architecture"] == architecture]
    assert {case["layer"] for case in cases} == {1, 2, 3}
    for case in cases:
        found = RECIPES[case["recipe"]](lm, POSITIVE, NEGATIVE, case["layer"], case["token"]).vector
        assert relative(found, torch.tensor(case["vector"])) < 1e-4, (case["recipe"], case["token"], case["layer"])


@pytest.mark.parametrize("architecture", MADE["fingerprints"])
def test_equals_the_installed_package(architecture):
    pytest.importorskip("steering_vectors", reason="pip install --no-deps steering-vectors==0.12.2")
    made = maker()
    lm = tiny_lm(architecture)
    for recipe, ours in RECIPES.items():
        theirs = made.vectors(lm, -1, recipe)
        assert sorted(theirs) == [1, 2, 3]
        for layer, vector in theirs.items():
            assert relative(ours(lm, POSITIVE, NEGATIVE, layer).vector, vector) < 1e-4


@each_architecture
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_states_are_those_of_each_text_alone(architecture, left):
    lm = pads_left(tiny_lm(architecture)) if left else tiny_lm(architecture)
    alone = [lm.hidden_states(text, 2) for text in POSITIVE]
    tokens = {-1: slice(-1, None), 2: slice(2, 3), -2: slice(-2, -1), "all": slice(None), "last_2": slice(-2, None), "1:3": slice(1, 3)}
    for rule, wanted in [*tokens.items(), (slice(0, 1), slice(0, 1)), (slice(-2, None), slice(-2, None))]:
        expected = torch.stack([h[wanted].mean(0) for h in alone])
        assert torch.allclose(states_of(lm, POSITIVE, 2, rule, batch_size=3), expected, atol=1e-5), rule


@some_architectures
def test_states_of_completions_stop_at_the_boundary(architecture):
    lm = tiny_lm(architecture)
    pairs = [("the other", " dogs are sleeping"), ("There is", " no")]
    expected = []
    for prompt, completion in pairs:
        pair = lm.encode_pair(prompt, completion)
        ids, mask = lm.pad([pair.ids])
        h = lm.states_at(3, ids, mask, mask.sum(-1))[0]
        expected.append((h[: pair.boundary].mean(0), h[pair.boundary :].mean(0), h[-1]))
    for i, rule in enumerate(["prompt", "completion", -1]):
        assert torch.allclose(states_of(lm, pairs, 3, rule), torch.stack([e[i] for e in expected]), atol=1e-5)


@some_architectures
def test_caa_is_the_mean_difference(architecture):
    lm = tiny_lm(architecture)
    by_hand = sum(lm.hidden_states(p, 1).mean(0) - lm.hidden_states(n, 1).mean(0) for p, n in MADE["pairs"]) / len(POSITIVE)
    found = caa(lm, POSITIVE, NEGATIVE, layer=1, positions="all")
    assert torch.allclose(found.vector, by_hand, atol=1e-5)
    assert (found.layers, found.mode, found.positions, found.strength) == ((1,), "add", "all", 1.0)
    assert found.about["recipe"] == "caa" and found.about["pairs"] == 4 and found.about["model"] == lm.name
    scaled = caa(lm, POSITIVE, NEGATIVE, layer=-3, positions="all", norm=5)
    assert scaled.norm == pytest.approx(5) and relative(scaled.vector / 5, by_hand / by_hand.norm()) < 1e-4
    left = caa(pads_left(tiny_lm(architecture)), POSITIVE, NEGATIVE, layer=1, positions="all", batch_size=3)
    assert torch.allclose(left.vector, by_hand, atol=1e-5)


def test_pca_is_the_first_uncentred_component_and_points_to_the_positives():
    lm = tiny_lm("qwen2")
    d = (states_of(lm, POSITIVE, 2) - states_of(lm, NEGATIVE, 2)).double()
    top = torch.linalg.eigh(d.T @ d).eigenvectors[:, -1]
    found = pca_direction(lm, POSITIVE, NEGATIVE, 2)
    assert found.norm == pytest.approx(1) and abs(top @ found.vector.double()) > 0.99999
    assert (d @ found.vector.double()).mean() > 0
    turned = pca_direction(lm, NEGATIVE, POSITIVE, 2, norm=3.0)
    assert torch.allclose(turned.vector, -3 * found.vector, atol=1e-4)


def test_what_cannot_be_read_is_said_before_the_model_runs():
    lm = tiny_lm()
    with pytest.raises(ValueError, match="4 positive and 3 negative texts"):
        caa(lm, POSITIVE, NEGATIVE[:3], 1)
    with pytest.raises(ValueError, match="give pairs, at least one"):
        pca_direction(lm, [], [], 1)
    with pytest.raises(ValueError, match=r"positions=40 selects no token of 'the fox is in the sun', which has \d+ tokens"):
        caa(lm, POSITIVE, NEGATIVE, 1, 40)
    with pytest.raises(ValueError, match="selects no token"):
        states_of(lm, ["a fox"], 1, "completion")
    with pytest.raises(ValueError, match="No texts"):
        states_of(lm, [], 1)
    with pytest.raises(ValueError, match="positions='first'"):
        states_of(lm, ["a fox"], 1, "first")
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        caa(lm, POSITIVE, NEGATIVE, 7)
    for recipe in RECIPES.values():
        with pytest.raises(ValueError, match="the same states at layer 0"):
            recipe(lm, ["a fox", "a dog"], ["the fox", "the dog"], 0, 0)  # position 0 is <bos> in both


def test_a_random_vector_differs_in_direction_only():
    source = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 2, 32, generator=source)
    about = dict(model="tiny")
    for s in (
        Steering(torch.randn(32, generator=source), (1, 3), "clamp", "last_2", 0.5, about=about),
        Steering(torch.zeros(32), 1, "affine", left=left, right=right),
    ):
        one, again, other = random_like(s), random_like(s, seed=0), random_like(s, seed=1)
        assert one.norm == pytest.approx(s.norm) and torch.equal(one.vector, again.vector)
        assert (one.layers, one.mode, one.positions, one.strength) == (s.layers, s.mode, s.positions, s.strength)
        assert one.about == s.about | dict(random_seed=0)
        for t in ("vector", "left", "right"):
            mine, theirs, drawn = getattr(one, t), getattr(s, t), getattr(other, t)
            if theirs is not None and theirs.any():
                assert torch.allclose(mine.norm(dim=-1), theirs.norm(dim=-1))
                assert abs(torch.cosine_similarity(mine, theirs, dim=-1)).max() < 0.6
                assert abs(torch.cosine_similarity(mine, drawn, dim=-1)).max() < 0.6


REQUESTS = ["the fox?", "a dog is sleeping", "There is no sun", "think that the thing", "brown", "over the lazy fox", "a reason", "morning"]
LETTERS = tuple("aeiourstln .")
EVERYTHING = Selection(refused=None, kl=float("inf"), induced=-float("inf"))


def next_logits(lm, prompt):
    ids, mask = lm.pad([lm.encode(prompt)])
    return lm.run(ids, mask, mask.sum(-1)).logits[0, -1].double()


def score_by_hand(lm, prompt, refusals=LETTERS):
    p = next_logits(lm, prompt).softmax(-1)
    tokens = {lm.encode_pair(prompt, r).completion[0] for r in refusals}
    refused = sum(p[t] for t in tokens)
    return (refused.log() - (1 - refused).log()).item()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@torch.no_grad()
@some_architectures
@pytest.mark.parametrize("batch_size", [1, 7])
def test_refusal_candidates_by_hand(architecture, batch_size):
    lm = tiny_lm(architecture)
    harmful, harmless, validation = REQUESTS[:2], REQUESTS[2:4], (REQUESTS[4:6], REQUESTS[6:])
    options = dict(refusals=LETTERS, selection=EVERYTHING, batch_size=batch_size)
    found = refusal_direction(lm, harmful, harmless, validation, **options)
    table = found.candidates
    after = lm.tok("\n\nAssistant:", add_special_tokens=False).input_ids
    end = lm.encode(lm.chat("the fox?"))[-len(after) :]
    assert lm.decode(end) == "\n\nAssistant:" and sorted(set(table.position)) == list(range(-len(end), 0))
    assert set(table.layer) == ({0, 1, 2} if architecture == "gpt2" else {1, 2})  # layer 3 is in the last fifth
    assert [lm.decode([end[p]]) for p in table.position] == table.token.tolist()
    bad, good = ([lm.chat(r) for r in some] for some in validation)
    for row in table.sample(5, random_state=0).itertuples():
        states = [[lm.hidden_states(lm.chat(r), row.layer)[row.position] for r in some] for some in (harmful, harmless)]
        direction = sum(states[0]) / 2 - sum(states[1]) / 2
        assert row.norm == pytest.approx(direction.norm().item(), rel=1e-4)
        plain = [next_logits(lm, p).log_softmax(-1) for p in good]
        with lm.steer(Steering(direction, [0, 1, 2, 3], mode="ablate")):
            assert row.ablated == pytest.approx(mean(score_by_hand(lm, p) for p in bad), abs=2e-3)
            ablated = [next_logits(lm, p).log_softmax(-1) for p in good]
        assert row.kl == pytest.approx(mean((b.exp() * (b - a)).sum().item() for a, b in zip(ablated, plain, strict=True)), abs=2e-3)
        with lm.steer(Steering(direction, row.layer)):
            assert row.induced == pytest.approx(mean(score_by_hand(lm, p) for p in good), abs=2e-3)
    assert found.unsteered["harmful"] == pytest.approx(mean(score_by_hand(lm, p) for p in bad), abs=2e-3)
    assert found.unsteered["harmless"] == pytest.approx(mean(score_by_hand(lm, p) for p in good), abs=2e-3)
    best = table.loc[table.ablated.idxmin()]
    assert best.picked and table.picked.sum() == 1
    assert found.ablating.layers == (0, 1, 2, 3) and found.ablating.mode == "ablate"
    assert found.adding.layers == (best.layer,) and found.adding.mode == "add" and found.adding.norm == pytest.approx(best.norm, rel=1e-5)
    assert torch.equal(found.adding.vector, found.ablating.vector)


def test_refusal_selection_keeps_to_its_bounds(tmp_path):
    lm, given = tiny_lm("qwen2"), (REQUESTS[:2], REQUESTS[2:4], (REQUESTS[4:6], REQUESTS[6:]))
    options = dict(refusals=LETTERS)
    table = refusal_direction(lm, *given, **options, selection=EVERYTHING).candidates
    bounds = Selection(refused=None, kl=table.kl.median(), induced=table.induced.median())
    allowed = table[(table.kl <= bounds.kl) & (table.induced > bounds.induced)]
    assert 0 < len(allowed) < len(table) and table.ablated.idxmin() not in allowed.index, "other tiny weights: choose other bounds"
    found = refusal_direction(lm, *given, **options, selection=bounds)
    assert found.candidates.index[found.candidates.picked].tolist() == [allowed.ablated.idxmin()]
    again = load_steering(found.adding.save(tmp_path / "refusal.safetensors"))
    assert again.about["recipe"] == "refusal_direction" and again.about["kl"] == pytest.approx(allowed.kl[allowed.ablated.idxmin()])
    with pytest.raises(NoDirection, match=r"none may be picked: KL <= -1 holds for 0, .* both for none") as caught:
        refusal_direction(lm, *given, **options, selection=Selection(refused=None, kl=-1.0))
    assert caught.value.candidates.table.equals(table.drop(columns="picked"))
    assert torch.equal(caught.value.candidates.pick(bounds).adding.vector, found.adding.vector)
    some = refusal_direction(lm, *given, **options, selection=dataclasses.replace(EVERYTHING, layers=[2, -1], positions=2)).candidates
    assert set(some.layer) == {2, 3} and set(some.position) == {-1, -2}
    same = table.set_index(["layer", "position"]).ablated
    assert some[some.layer == 2].ablated.tolist() == pytest.approx([same[2, -2], same[2, -1]], abs=1e-4)


def test_requests_may_be_conversations():
    lm, given = tiny_lm(), (REQUESTS[:2], REQUESTS[2:4], (REQUESTS[4:6], REQUESTS[6:]))
    spoken = lambda requests: [[dict(role="user", content=r)] for r in requests]
    briefly = lambda requests: [[dict(role="system", content="Be brief."), *r] for r in spoken(requests)]
    ask = lambda form: refusal_direction(lm, *map(form, given[:2]), tuple(map(form, given[2])), refusals=LETTERS, selection=EVERYTHING)
    plain = ask(list)
    assert torch.equal(ask(spoken).adding.vector, plain.adding.vector) and ask(spoken).unsteered == plain.unsteered
    by_hand = mean(score_by_hand(lm, lm.chat(r, system="Be brief.")) for r in REQUESTS[4:6])
    assert ask(briefly).unsteered["harmful"] == pytest.approx(by_hand, abs=2e-3) != plain.unsteered["harmful"]


def test_candidates_are_the_same_where_blocks_cannot_be_skipped():
    given = (REQUESTS[:2], REQUESTS[2:4], (REQUESTS[4:6], REQUESTS[6:]))
    tables = []
    for can_resume in (True, False):
        lm = tiny_lm("gemma3_text")
        assert lm.can_resume
        lm.shortcuts["resume"] = can_resume
        tables.append(refusal_direction(lm, *given, refusals=LETTERS, selection=EVERYTHING).candidates)
    for column in ("ablated", "kl", "induced"):
        assert tables[0][column].tolist() == pytest.approx(tables[1][column].tolist(), abs=1e-4)


@torch.no_grad()
def test_requests_that_are_answered_otherwise_are_left_out():
    lm = tiny_lm("llama")
    prompts = [lm.chat(r) for r in REQUESTS]
    p = torch.stack([next_logits(lm, prompt).softmax(-1) for prompt in prompts])
    sayable = [t for t in range(3, 320) if all(lm.encode_pair(prompt, lm.decode([t])).completion == (t,) for prompt in prompts)]
    ranked = sorted(sayable, key=lambda t: (p[0, t] - p[:, t].mean()).item(), reverse=True)
    enough = next(n for n in range(len(ranked)) if p[0, ranked[:n]].sum() > 0.5)
    refusals = [lm.decode([t]) for t in ranked[:enough]]
    refused = [r for r in REQUESTS if score_by_hand(lm, lm.chat(r), refusals) > 0]
    answered = [r for r in REQUESTS if r not in refused]
    assert refused and answered, "other tiny weights: choose other refusals"
    divided = dataclasses.replace(EVERYTHING, refused=0.0)
    found = refusal_direction(lm, REQUESTS, REQUESTS, (REQUESTS, REQUESTS), refusals=refusals, selection=divided)
    clean = refusal_direction(lm, refused, answered, (refused, answered), refusals=refusals, selection=EVERYTHING)
    count = {"harmful": len(refused), "harmless": len(answered)}
    assert found.requests == clean.requests == {**count, **{f"{kind} validation": n for kind, n in count.items()}}
    assert found.candidates.ablated.tolist() == pytest.approx(clean.candidates.ablated.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match=f"refuses none of the {len(answered)} harmful validation requests"):
        refusal_direction(lm, refused, answered, (answered, answered), refusals=refusals)
    with pytest.raises(ValueError, match=f"refuses all of the {len(refused)} harmless requests"):
        refusal_direction(lm, refused, refused, (refused, answered), refusals=refusals)


def test_refusal_scores_are_those_of_each_prompt_and_follow_the_steering():
    lm = tiny_lm("gpt_neox")
    prompts = [lm.chat(r) for r in REQUESTS]
    expected = [score_by_hand(lm, p, ("I", "As")) for p in prompts]
    assert refusal_scores(lm, prompts, batch_size=3).tolist() == pytest.approx(expected, abs=1e-3)
    vector = Steering(3 * torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)
    with lm.steer(vector):
        steered = [score_by_hand(lm, p, ("I", "As")) for p in prompts]
        assert refusal_scores(lm, prompts, batch_size=5).tolist() == pytest.approx(steered, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(expected, steered, strict=True)) > 0.1
    with pytest.raises(ValueError, match="give a list of beginnings"):
        refusal_scores(lm, prompts, refusals="I")
    with pytest.raises(ValueError, match="No prompts"):
        refusal_scores(lm, [])


def test_refusal_direction_says_what_is_missing():
    lm = tiny_lm()
    with pytest.raises(ValueError, match="no harmless validation requests"):
        refusal_direction(lm, ["a"], ["b"], (["c"], []))
    with pytest.raises(ValueError, match="do not depend on the request"):
        refusal_direction(lm, ["a"], ["b"], (["c"], ["d"]), selection=dataclasses.replace(EVERYTHING, layers=[0]))
    for positions in (0, 100):
        with pytest.raises(ValueError, match=f"positions={positions}: the shortest prompt has"):
            refusal_direction(lm, ["a"], ["b"], (["c"], ["d"]), selection=dataclasses.replace(EVERYTHING, positions=positions))


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TURNS = [("the fox?", "a dog."), ("the sun?", "the morning.")]
CONVERSATION = [dict(role=role, content=text) for turn in TURNS for role, text in zip(("user", "assistant"), turn, strict=True)]


@pytest.mark.parametrize("template", [None, CHATML, GEMMA], ids=["plain", "chatml", "gemma"])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_few_shot_is_the_whole_conversation_as_the_template_writes_it(template, system):
    lm = tiny_lm()
    lm.tok.chat_template = template
    shown = few_shot(lm, TURNS, system=system)
    for user in ("a thing?", "two\n\nlines, Assistant", "{braces} and \\n"):
        prompt = lm.chat(user, system=system)
        expected = lm.chat([*CONVERSATION, dict(role="user", content=user)], system=system)
        assert shown.rewrite(prompt) == expected and shown.said == ""
        assert shown.rewrite(prompt + " It is") == expected + " It is"
        assert lm.encode(expected).count(lm.tok.bos_token_id) == 1
    before_and_after = prefill(" It is").rewrite(shown.rewrite(prompt))
    assert before_and_after == lm.chat([*CONVERSATION, dict(role="user", content=user)], system=system, prefill=" It is")


def test_few_shot_asks_for_prompts_of_its_own_template():
    lm = tiny_lm()
    lm.tok.chat_template = CHATML
    shown = few_shot(lm, TURNS)
    for prompt in ("the fox", lm.chat("the fox", system="Be brief."), lm.chat("the fox")[:-9]):
        with pytest.raises(ValueError, match="If the prompts have another system message, pass it to few_shot"):
            shown.rewrite(prompt)
    for turns in ([], [("a", "")], [("a",)], ["ab"]):
        with pytest.raises(ValueError, match="at least one turn"):
            few_shot(lm, turns)
    lm.tok.chat_template = "nothing of what was said"
    with pytest.raises(ValueError, match="leaves out what is said by: user"):
        few_shot(lm, TURNS)


def test_prefill_counts_as_the_beginning_of_the_answer():
    lm, begun = tiny_lm(), prefill(" It is")
    assert begun.rewrite(lm.chat("a thing?")) == lm.chat("a thing?", prefill=" It is") and begun.said == " It is"
    assert repr(begun) == "Prompted(said=' It is')" and Prompted(str.upper).rewrite("a") == "A"
    with pytest.raises(ValueError, match="changes nothing"):
        prefill("")
