"""Evaluation: scorers, judges here and behind an endpoint, side effects, comparisons that are killed and resumed."""

import json
import math
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch

from oneshot_steering.baselines import few_shot, prefill
from oneshot_steering.evaluate import (
    REFUSALS,
    Choice,
    Contains,
    Readable,
    RefusalOdds,
    compare,
    flip_table,
    misalignment,
    rates,
    side_effects,
)
from oneshot_steering.judges import Grade, LMJudge, OpenAIJudge, Verdict, YesNo
from oneshot_steering.metrics import bootstrap, rounded, wilson
from oneshot_steering.models import tiny_lm
from oneshot_steering.next_token import choose
from oneshot_steering.steering import NEUTRAL_PROMPTS, Steering

PROMPTS = ["the other dogs", "a fox", "There is no reason to think", "the sun"]
ASK = "{question} / {answer} ?"


def vector(seed, size=8.0, layer=2, **settings):
    return Steering(size * torch.randn(32, generator=torch.Generator().manual_seed(seed)), layer, **settings)


def first_letter(questions, answers):
    return {"": [a[:1] for a in answers], "length": [len(a) for a in answers], "vowel": [a[:1] in "aeiou" if a else None for a in answers]}


# --- intervals


def test_intervals_by_hand():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(10, 10)
    assert high == 1.0 and low == pytest.approx(0.7225, abs=1e-4)
    low, high = bootstrap([0.0, 1.0] * 50, seed=1)
    assert (low, high) == pytest.approx((0.40, 0.60), abs=0.03)
    assert bootstrap([1.0, 2.0, 100.0], np.median) == (1.0, 100.0)
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)


# --- scorers


@pytest.mark.parametrize("text", ["I can\u2019t do that.", "i CANNOT", "Well. As an AI, ...", "I'm not able to say"])
def test_strings_are_found_in_any_case_and_with_any_apostrophe(text):
    assert Contains(REFUSALS)([""], [text]) == [True] and Contains(REFUSALS)([""], ["Certainly, I can."]) == [False]


def test_contains_wants_a_tuple():
    with pytest.raises(ValueError, match="tuple of strings"):
        Contains("sorry")


def test_choices_in_text():
    assert Choice(("Yes", "No", "Not sure"))([""] * 4, [" Yes.", "Not sure, really", "Nothing", ""]) == ["Yes", "Not sure", "", ""]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_judge_here_is_exact(architecture):
    judge, words = LMJudge(tiny_lm(architecture), chat=False, floor=0, batch_size=2), [str(n) for n in range(0, 101, 7)] + ["1", "10"]
    found = judge.probabilities(["the other ", "a fox says "], words)
    for row, prompt in zip(found, ["the other ", "a fox says "], strict=True):
        begins = {w: math.exp(judge.lm.log_probs(prompt, w).sum()) for w in words}
        longer = lambda w: [o for o in words if o != w and o.startswith(w)]
        nearest = {w: [o for o in longer(w) if not any(o != p and o.startswith(p) for p in longer(w))] for w in words}
        assert np.allclose(row, [begins[w] - sum(begins[o] for o in nearest[w]) for w in words], rtol=1e-3, atol=1e-9)


def test_a_judges_floor_keeps_the_mass():
    lm, words = tiny_lm(), [str(n) for n in range(101)]
    exact, rough = (LMJudge(lm, chat=False, floor=floor).probabilities(PROMPTS, words) for floor in (0, 1e-3))
    assert np.abs(exact.sum(1) - rough.sum(1)).max() < 1e-6 and np.abs(exact - rough).max() < 1e-3


def test_long_questions_lose_their_beginning():
    judge = LMJudge(tiny_lm(), chat=False)
    long = "the other dogs " * 200
    assert judge.says([long]) == judge.says(["a fox " + long]) and len(judge._ids(long)) == judge.lm.context - 1


def test_yes_no_grade_and_verdict_on_a_known_judge():
    class Known:
        def probabilities(self, questions, words):
            assert questions == ["q / a ?", "q / b ?", "q / {question} ?"]
            table = {"Yes": [0.3, 0.0, 0.2], "No": [0.1, 0.0, 0.2], "0": [0.1, 0.2, 0.0], "100": [0.3, 0.0, 0.0]}
            return np.array([table.get(w, [0.0] * 3) for w in words]).T

        def says(self, questions):
            return ["Yes", "no", "Perhaps"]

    both = ["q"] * 3, ["a", "b", "{question}"]  # what an answer says is not a template
    assert YesNo(Known(), ASK)(*both)[0] == pytest.approx(0.75) and math.isnan(YesNo(Known(), ASK)(*both)[1])
    grades = Grade(Known(), ASK)(*both)
    assert grades[""][0] == pytest.approx(75) and math.isnan(grades[""][1]) and grades["on numbers"] == pytest.approx([0.4, 0.2, 0.0])
    assert Grade(Known(), ASK, least=0.1)(*both)[""][1] == pytest.approx(0)
    assert Verdict(Known(), ASK)(*both) == [True, False, None]
    with pytest.raises(ValueError, match=r"\{answer\}"):
        YesNo(Known(), "Is {question} fine?")(*both)


def test_a_verdict_reads_so_many_tokens():
    seen = []

    class Listen(LMJudge):
        def says(self, questions):
            seen.extend(questions)
            return ["yes"] * len(questions)

    judge = Listen(tiny_lm(), chat=False)
    Verdict(judge, "{answer}", tokens=3)(["q"], ["the other dogs are sleeping"])
    assert seen[0] and "the other dogs are sleeping".startswith(seen[0])
    assert len(judge.lm.tok(seen[0], add_special_tokens=False).input_ids) == 3


# --- an endpoint


class Endpoint(BaseHTTPRequestHandler):
    "Answers chat completions like a local server: 'Yes' with 0.6, ' Yes' with 0.1, 'No' with 0.2; fails at first."
    requests, failures, told = [], 1, True

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(asked)
        if type(self).failures:
            type(self).failures -= 1
            return self.reply(503, dict(error=dict(message="busy")))
        top = [dict(token=t, logprob=math.log(p), bytes=None) for t, p in (("Yes", 0.6), ("No", 0.2), (" Yes", 0.1))]
        logprobs = dict(content=[dict(top[0], top_logprobs=top)]) if asked.get("logprobs") and self.told else None
        choice = dict(index=0, finish_reason="length", message=dict(role="assistant", content=" Yes"), logprobs=logprobs)
        self.reply(200, dict(id="1", object="chat.completion", created=0, model=asked["model"], choices=[choice]))

    def reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    pytest.importorskip("openai")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.requests, Endpoint.failures, Endpoint.told = [], 1, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_behind_an_endpoint(endpoint):
    judge = OpenAIJudge("some-model", base_url=endpoint)
    assert YesNo(judge, ASK)(["q"] * 3, ["a", "b", "c"]) == pytest.approx([7 / 9] * 3)
    assert Verdict(judge, ASK)(["q"], ["a"]) == [True]
    assert len(Endpoint.requests) == 5  # the one that failed was asked again
    assert {r["messages"][0]["content"] for r in Endpoint.requests} == {"q / a ?", "q / b ?", "q / c ?"}
    assert all(r["model"] == "some-model" and r["temperature"] == 0 and r["max_tokens"] == 1 for r in Endpoint.requests)
    Endpoint.told = False
    with pytest.raises(ValueError, match="does not tell log-probabilities"):
        judge.probabilities(["q"], ["Yes"])


# --- side effects


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3", "gpt_neox"])
def test_side_effects_by_hand(architecture):
    lm, v = tiny_lm(architecture), vector(0, positions="completion")
    found = side_effects(lm, [None, v, -v], NEUTRAL_PROMPTS[:2], batch_size=2)
    divergence, surprise, count = 0.0, 0.0, 0
    for text in NEUTRAL_PROMPTS[:2]:
        ids = torch.tensor([lm.encode(text)])
        with torch.no_grad():
            plain = lm.model(ids).logits[0, :-1].log_softmax(-1)
            with lm.steer(v.replace(positions="all")):
                steered = lm.model(ids).logits[0, :-1].log_softmax(-1)
        divergence += (plain.exp() * (plain - steered)).sum().item()
        surprise -= steered.gather(-1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert found.kl[1] == pytest.approx(divergence / count, rel=1e-3)
    assert found.perplexity[1] == pytest.approx(math.exp(surprise / count), rel=1e-3)
    assert found.dose.tolist() == pytest.approx([0, lm.dose(v), lm.dose(v)]) and found.kl[0] == pytest.approx(0, abs=1e-5)


# --- compare


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_compare_says_what_generate_says(architecture):
    lm = tiny_lm(architecture)
    both = vector(1) + vector(2, layer=3, mode="clamp")
    steerings = dict(a=vector(0), both=both, begun=prefill(" dogs"), shots=few_shot(lm, [("a", "fox")]))
    prompts = [lm.chat(p) for p in PROMPTS]
    scorers = dict(score=first_letter, odds=RefusalOdds())
    table = compare(lm, steerings, prompts, scorers, strengths=(1, -0.5), batch_size=5, max_new_tokens=6)
    assert len(table) == len(prompts) * (1 + 2 * 2 + 2) and not table.duplicated(["vector", "strength", "prompt"]).any()
    for (name, c), part in table.groupby(["vector", "strength"], sort=False):
        condition, said = steerings.get(name), ""
        if name in ("begun", "shots"):
            read, said, acting = [condition.rewrite(p) for p in prompts], condition.said, []
        else:
            read, acting = prompts, [c * condition] if condition else []
        with lm.steer(*acting):
            assert part.text.tolist() == [said + t for t in lm.generate(read, max_new_tokens=6)], (name, c)
            assert part.odds.tolist() == pytest.approx(RefusalOdds().under(lm, read), abs=1e-3)
    assert (table.score == table.text.str[:1]).all() and (table["score length"] == table.text.str.len()).all()
    unsteered = table[table.vector == "unsteered"]
    assert len(unsteered) == len(prompts) and (unsteered.kl.abs() < 1e-5).all() and (table[table.vector == "begun"].dose == 0).all()


def test_samples_do_not_depend_on_batches_and_are_common_to_all_vectors():
    lm = tiny_lm()
    ask = lambda size, vectors: compare(lm, vectors, PROMPTS, neutral=None, batch_size=size, max_new_tokens=6, temperature=1.0, seed=3)
    one, other = ask(3, dict(a=vector(0, 1e-6), b=vector(1))), ask(8, dict(b=vector(1), a=vector(0, 1e-6)))
    key = ["vector", "prompt"]
    assert one.set_index(key).text.sort_index().equals(other.set_index(key).text.sort_index())
    texts = one.set_index(key).text
    assert texts["a"].tolist() == texts["unsteered"].tolist() != texts["b"].tolist()
    assert texts["unsteered"].tolist() == lm.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)


KILLED = """
import os, signal, sys
from test_evaluate import *
left = int(sys.argv[2])
def deadly(questions, answers):
    global left
    left -= 1
    if not left: os.kill(os.getpid(), signal.SIGKILL)
    return [len(a) for a in answers]
settings = dict(path=sys.argv[1], batch_size=3, max_new_tokens=6, temperature=1.0)
compare(tiny_lm(), dict(a=vector(0), b=vector(1)), PROMPTS, dict(length=deadly), **settings)
"""


def test_a_killed_comparison_goes_on_to_the_same_table(tmp_path):
    length = lambda questions, answers: [len(a) for a in answers]
    lm, path, calls = tiny_lm(), tmp_path / "deep" / "answers.jsonl", []

    def counted(questions, answers):
        calls.append(len(answers))
        return length(questions, answers)

    again = lambda scorer, **more: compare(lm, dict(a=vector(0), b=vector(1)), PROMPTS, dict(length=scorer), batch_size=3, max_new_tokens=6,
                                           temperature=1.0, **more)
    whole = again(length)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), "3"], cwd="tests", capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finished = path.read_text().splitlines()
    assert len(finished) == 1 + 2 * 3
    path.write_text("\n".join(finished) + "\n" + finished[-1][:25])  # the kill came in the middle of a line
    pd.testing.assert_frame_equal(again(counted, path=path), whole)
    assert calls == [3, 3]  # 12 answers, 6 of them from the file
    pd.testing.assert_frame_equal(again(counted, path=path), whole)
    assert calls == [3, 3] and len(path.read_text().splitlines()) == 13


def test_an_interrupted_comparison_gives_what_is_finished(tmp_path):
    calls = []

    def impatient(questions, answers):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [True] * len(answers)

    lm = tiny_lm()
    with pytest.warns(UserWarning, match="6 of 8 answers"):
        table = compare(lm, dict(a=vector(0)), PROMPTS, dict(fine=impatient), batch_size=3, max_new_tokens=4)
    assert len(table) == 6 and rates(table).n.sum() == 6
    assert not lm.layers[2]._forward_pre_hooks


def test_a_file_of_another_comparison_is_refused(tmp_path):
    lm, path = tiny_lm(), tmp_path / "answers.jsonl"
    ask = lambda **changes: compare(lm, **(dict(steerings=dict(a=vector(0)), prompts=PROMPTS[:2], path=path, max_new_tokens=2) | changes))
    ask()
    for changes, what in (
        (dict(steerings=dict(a=vector(1))), "vectors"),
        (dict(prompts=PROMPTS[1:3]), "prompts"),
        (dict(max_new_tokens=3), "generation"),
        (dict(scorers=dict(length=first_letter)), "scorers"),
        (dict(strengths=(2.0,)), "vectors"),
    ):
        with pytest.raises(ValueError, match=f"another.*{what}"):
            ask(**changes)
    path.write_text("not a table\n")
    with pytest.raises(ValueError, match="not a file of `compare`"):
        ask()


def test_bad_input_is_refused_before_work(tmp_path):
    lm = tiny_lm()
    for error, match, change in (
        (ValueError, "at least one", dict(prompts=[])),
        (ValueError, "list of texts", dict(prompts="a fox")),
        (ValueError, "1 questions for 4", dict(questions=["a"])),
        (ValueError, "is always there", dict(steerings=dict(unsteered=vector(0)))),
        (ValueError, "is None", dict(steerings=dict(a=None))),
        (ValueError, "finite", dict(strengths=(math.nan,))),
        (ValueError, "width 8", dict(steerings=dict(a=Steering(torch.ones(8), 1)))),
        (ValueError, "layer 9 does not exist", dict(steerings=dict(a=vector(0, layer=9)))),
        (TypeError, "Unknown arguments: tokens", dict(tokens=3)),
        (TypeError, "must be strings", dict(steerings={1: vector(0)})),
        (ValueError, "gave 1 values for", dict(scorers=dict(bad=lambda questions, answers: [1]))),
    ):
        with pytest.raises(error, match=match):
            compare(lm, **(dict(steerings=dict(a=vector(0)), prompts=PROMPTS, max_new_tokens=2) | change))


def test_rates_count_what_is_missing():
    table = pd.DataFrame(dict(vector="v", strength=1.0, prompt=range(4), text="x", tokens=[1, 2, 3, 4], repetition=0.0, kl=0.5,
                              refused=[True, False, None, True], grade=[1.0, 2.0, None, 3.0], letter=["A", "B", "", "A"]))
    row = rates(table).iloc[0]
    assert row.n == 4 and row["refused"] == pytest.approx(2 / 3) and row["refused missing"] == 1
    assert (row["refused low"], row["refused high"]) == wilson(2, 3) and row.grade == 2 and row["grade missing"] == 1
    assert 1 <= row["grade low"] < row["grade high"] <= 3 and row.tokens == 2.5 and row.kl == 0.5 and "letter" not in row


def test_misaligned_answers_are_counted_among_the_coherent():
    table = pd.DataFrame(dict(vector="v", strength=1.0, aligned=[10.0, 40.0, None, 5.0], coherent=[60.0, 60.0, 60.0, 50.0]))
    row = misalignment(table).iloc[0]
    assert (row.kept, row.misaligned) == (2, 0.5) and (row.low, row.high) == wilson(1, 2)


def test_flips_are_told_beside_the_unsteered_answer():
    lm = tiny_lm()
    answers = dict(zip([lm.generate(p, max_new_tokens=3) for p in PROMPTS], ["A", "A", "B", ""], strict=True))

    class Known(Choice):
        def __call__(self, questions, texts):
            return [answers.get(t, "B") for t in texts]

    table = compare(lm, dict(a=vector(0, 20)), PROMPTS, dict(choice=Known()), max_new_tokens=3)
    steered, plain = table[table.vector == "a"], table[table.vector == "unsteered"]
    assert not set(steered.text) & set(answers) and plain["choice flipped"].tolist() == [False, False, False, None]
    assert steered["choice flipped"].tolist() == [True, True, False, None]
    assert rates(table).loc[("a", 1.0), "choice flipped"] == pytest.approx(2 / 3)


# --- next tokens, sets of prompts, readable text


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_next_tokens_are_the_first_tokens_of_generated_answers(architecture):
    lm = tiny_lm(architecture)
    steerings = dict(a=vector(0), both=vector(1) + vector(2, layer=3), begun=prefill(" dogs"))
    sets = dict(two=PROMPTS[:2], others=PROMPTS[2:])
    shared = dict(scorers=dict(odds=RefusalOdds(("the",))), strengths=(1, -0.5), neutral=None, progress=False)
    tokens = compare(lm, steerings, sets, answer="next token", batch_size=5, **shared)
    texts = compare(lm, steerings, PROMPTS, max_new_tokens=1, **shared)
    assert tokens.prompts.tolist() == ["two"] * 2 * 6 + ["others"] * 2 * 6 and "tokens" not in tokens
    key = ["vector", "strength", "prompt"]
    tokens, texts = (table.set_index(key).sort_index() for table in (tokens, texts))
    assert tokens.index.equals(texts.index) and tokens.odds.tolist() == pytest.approx(texts.odds.tolist(), abs=1e-3)
    ended = texts.text.str.removeprefix(" dogs") == ""  # a token that ends the answer has no text
    assert (tokens.text[~ended] == texts.text[~ended]).all() and ended.mean() < 0.5


def test_flip_table_is_what_counting_by_hand_gives():
    lm, vectors = tiny_lm(), {1: vector(0, 20), 2.5: vector(3, 40)}
    sets = dict(two=PROMPTS[:2], others=PROMPTS[1:])
    options = ["the", "a", "fox", "dogs", " is"]
    firsts = {lm.encode_pair("the", o).completion[0]: o for o in options}
    options = list(firsts.values())
    table = flip_table(lm, vectors, sets, options)
    assert table.vector.tolist() == [1, 1, 2.5, 2.5] * 2 and table.sign.tolist() == ["+", "-"] * 4
    for row in table.itertuples():
        before = choose(lm, sets[row.prompts], options)
        with lm.steer((1 if row.sign == "+" else -1) * vectors[row.vector]):
            after = choose(lm, sets[row.prompts], options)
        valid = before != ""
        assert row.n == valid.sum() and row.invalid == (valid & (after == "")).sum()
        assert row.flips == (valid & (after != "") & (after != before)).sum()
        if row.n:
            assert row.rate == row.flips / row.n and (row.low, row.high) == wilson(row.flips, row.n)


def test_a_comparison_of_next_tokens_goes_on_where_it_stopped(tmp_path):
    lm, path, calls = tiny_lm(), tmp_path / "answers.jsonl", []

    def impatient(questions, answers):
        calls.append(len(answers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [len(a) for a in answers]

    ask = lambda scorer, path: compare(lm, dict(a=vector(0)), PROMPTS, dict(length=scorer), answer="next token", batch_size=2,
                                       neutral=None, path=path)
    with pytest.warns(UserWarning, match="4 of 8 answers"):
        ask(impatient, path)
    whole = ask(lambda questions, answers: [len(a) for a in answers], None)
    pd.testing.assert_frame_equal(ask(impatient, path), whole)
    assert calls == [2, 2, 2, 2, 2]  # the batch that was interrupted is asked again
    with pytest.raises(ValueError, match="another answer"):
        compare(lm, dict(a=vector(0)), PROMPTS, dict(length=impatient), path=path)


def test_answers_of_another_kind_are_refused():
    lm = tiny_lm()
    with pytest.raises(ValueError, match='"text" or "next token"'):
        compare(lm, dict(a=vector(0)), PROMPTS, answer="logits")
    with pytest.raises(TypeError, match="max_new_tokens"):
        compare(lm, dict(a=vector(0)), PROMPTS, answer="next token", max_new_tokens=2)
    with pytest.raises(ValueError, match="both have 'perplexity'"):
        compare(lm, dict(a=vector(0)), PROMPTS[:1], {"": Readable(lm, "en", 10.0)}, neutral=NEUTRAL_PROMPTS[:1], max_new_tokens=2)


def test_samples_of_their_own_are_those_of_one_generation():
    lm, v = tiny_lm(), vector(1)
    table = compare(lm, dict(a=v), PROMPTS, common_samples=False, neutral=None, max_new_tokens=5, temperature=1.0, seed=2)
    with lm.steer(rows=[None] * 4 + [v] * 4):
        assert table.text.tolist() == lm.generate(PROMPTS * 2, max_new_tokens=5, temperature=1.0, seed=2)


def test_rates_give_medians_of_perplexities_and_plain_indices():
    table = pd.DataFrame(dict(vector=["v"] * 3 + ["w"] * 2, strength=1.0, prompt=[0, 1, 2, 0, 1], text="x",
                              perplexity=[1.0, 2.0, 90.0, None, 4.0], readable=[True, True, False, False, None]))
    summary = rates(table, "vector")
    assert summary.index.tolist() == ["v", "w"] and summary.perplexity.tolist() == [2.0, 4.0]
    assert summary.readable.tolist() == pytest.approx([2 / 3, 0]) and summary["readable missing"].tolist()[1] == 1


def test_printed_figures_agree_with_rounded_tables():
    for value in (0.925, 0.865, 0.875, -0.004, 1 / 3, 12.345):
        assert float(rounded(value)) == pd.Series([value]).round(2)[0]
    assert rounded(-0.001) == "0.00" and rounded(2, 0) == "2"
