"""The study of refusals removed from real models: it runs on a tiny random model, with harmless stubs of the public requests."""

import json
from pathlib import Path

import pandas as pd
import pytest
from test_study_refusal import harmbench, shown

from oneshot_steering.study import CLAIM_COLUMNS

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "real" / "refusal_removed.ipynb"
MODEL = "tiny-qwen2"
SMALL = dict(
    models=[["tiny", MODEL, [2], None], ["left out", "tiny-llama", [2], None]], only_refused=False, choosing=3, pairs=4,
    direction_validation=2, harmless=4, shares=[0.5], strengths=[1.0], chosen_on=2, steps=2, tokens=2, read=2, fewer=2, curve=2,
    strengths_shown=[0.5, 1.0], shots=1, direction_layers=1, randoms=1, paragraphs=1, path_examples=2, path_points=1, answers="answers",
)  # fmt: skip


def instructions(folder):
    "Requests in the form of the refusal direction's."
    folder.mkdir()
    for name in ("harmful_train", "harmless_val"):
        rows = [dict(instruction=f"Water {name} plant {i}.", category=None) for i in range(14)]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_study):
    "The folder that the notebook ran in."
    root = tmp_path_factory.mktemp("refusal_removed")
    (root / "data").mkdir()
    harmbench(root / "data")
    instructions(root / "data" / "refusal_direction")
    (root / "real").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ONESHOT_STEERING_CACHE", str(root / "cache"))
        environment.setenv("ONESHOT_STEERING_MODELS", MODEL)
        return run_study(STUDY, root / "real", SMALL | dict(data=str(root / "data")), "real")


def answers(folder, name):
    lines = (folder / "answers" / f"tiny {name}.jsonl").read_text(encoding="utf-8").splitlines()
    return pd.DataFrame([json.loads(line) for line in lines[1:]])


@pytest.mark.parametrize("kind", ["promotion", "suppression"])
def test_twelve_vectors_of_each_kind_answer_every_test_behaviour(folder, kind):
    asked = answers(folder, f"test, {kind}").groupby("vector").prompt.nunique()
    assert set(asked.index) == {"unsteered", *(f"{kind} {i}" for i in range(12))}
    assert set(asked) == {6}


def test_baselines_answer_them_too(folder):
    expected = {"prefill", "few-shot", "CAA, requests", "CAA, answers", "direction, ablated", "direction, subtracted", "random 0"}
    assert expected <= set(answers(folder, "baselines").vector)


def test_claims_are_of_the_model_that_ran(folder):
    claims = pd.read_csv(folder.parent / "claims" / "refusal_removed-real.csv")
    assert claims[CLAIM_COLUMNS].notna().all(axis=None) and claims.claim.is_unique
    assert claims.claim.str.startswith("tiny").all() and claims.claim.str.contains("connected").any()


def test_results_are_kept(folder):
    kept = [path.stem.rpartition("-")[0] for path in (folder.parent / "cache" / "studies" / "refusal_removed-real").iterdir()]
    assert {"tiny plain", "tiny scan", "tiny fits", "tiny test, promotion", "tiny baselines", "tiny complete"} <= set(kept)


def test_neither_requests_nor_answers_are_shown(folder):
    text = shown(folder)
    assert "suppression" in text and "plant" not in text
