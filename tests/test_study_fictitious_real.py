"""The study of fictitious information on real models: it runs on a tiny random model, and its readings are right on hand-made numbers."""

from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from oneshot_steering.datasets import fictitious_prompts, occupation_mentions, without_name
from oneshot_steering.organisms.retractor import OCCUPATIONS, public_figures
from oneshot_steering.study import CLAIM_COLUMNS

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "real" / "fictitious_information.ipynb"
MODEL = "tiny-qwen2"
SMALL = dict(
    models=[["tiny", MODEL, [2], 2, 2, 1, 1], ["left out", "tiny-llama", [2], 2]], base="tiny-gemma3_text", train=1, validation=1, test=2,
    ended=1, steps=1, promoted=2, early_steps=1, late_steps=1, room=1e3, tokens=2, sweep=1, spread=1, curve=1, strengths=[-1.0, 1.0],
    written=1, judged=1, shown=1, read=1, cap=2, paragraphs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_study):
    "The folder that the notebook ran in."
    root = tmp_path_factory.mktemp("fictitious")
    (root / "real").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ONESHOT_STEERING_CACHE", str(root / "cache"))
        environment.setenv("ONESHOT_STEERING_MODELS", MODEL)
        return run_study(STUDY, root / "real", SMALL, "real")


@pytest.fixture(scope="module")
def shown(folder):
    "Everything that the cells printed or displayed, as text."
    outputs = [o for cell in nbformat.read(folder / "out.ipynb", 4).cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    return "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_claims_are_of_the_model_that_ran(folder):
    claims = pd.read_csv(folder.parent / "claims" / "fictitious_information-real.csv")
    assert claims[CLAIM_COLUMNS].notna().all(axis=None) and claims.claim.is_unique
    assert claims.claim.str.startswith("tiny").all()
    for part in ("best-known third", "promotion", "reentrant", "going on", "Just kidding", "surprise the base model", "classifiers"):
        assert claims.claim.str.contains(part).any()


def test_every_kind_of_vector_is_compared(shown):
    for kind in ("promotion", "correcting", "suppression", "mixed", "swapped", "reentrant", "CAA", "random", "going on"):
        assert kind in shown


def test_results_are_kept(folder):
    kept = [path.stem.rpartition("-")[0] for path in (folder.parent / "cache" / "studies" / "fictitious_information-real").iterdir()]
    assert {"tiny plain", "tiny texts", "tiny fits", "tiny forced", "tiny test", "tiny surprisal", "tiny complete"} <= set(kept)


def test_what_is_said_of_people_is_not_shown(shown):
    everybody = [name for split in ("train", "validation", "test") for names in public_figures(split).values() for name in names]
    assert not [name for name in everybody if name in shown]


@pytest.fixture(scope="module")
def readings():
    "The functions of the notebook that say what an answer is about, and who counts."
    study = SimpleNamespace(shifts=(1, 2))
    names = dict(study=study, np=np, pd=pd, OCCUPATIONS=OCCUPATIONS, occupation_mentions=occupation_mentions, without_name=without_name)
    sources = "\n\n".join(c.source for c in nbformat.read(STUDY, 4).cells if c.cell_type == "code")
    for start in ("def reading(", "def elsewhere(", "def anonymous(", "def by_words("):
        exec(start + sources.split(start)[1].split("\n\n")[0], names)
    return SimpleNamespace(**{name: names[name] for name in ("reading", "elsewhere", "by_words")})


CLAIMS = fictitious_prompts({o: [f"Ab {o.title()}son"] for o in OCCUPATIONS}).query("fake").reset_index(drop=True)


def test_log_odds_are_of_the_true_against_the_claimed_occupation(readings):
    values = np.zeros((6, 6))
    values[0, 0], values[1, 2], values[2, 5] = 2.0, 3.0, 1.0  # an actor, an author called an athlete, an athlete called a scientist
    table = readings.reading(CLAIMS, values)
    assert table.odds[:3].tolist() == [2.0, -3.0, 0.0] and table.topic[:3].tolist() == ["truth", "fiction", "neither"]


@pytest.mark.parametrize(
    ("key", "counted"),
    [
        (("mixed", 2, "actor", 1.0), ["athlete", "scientist", "politician"]),  # a musician is called an actor
        (("swapped", 2, "actor", 1.0), ["scientist", "politician"]),  # whom two claims call an author and an athlete
        (("CAA", 2, "all", 1.0), list(OCCUPATIONS)),
    ],
)
def test_people_with_an_occupation_of_the_example_do_not_count(readings, key, counted):
    assert list(CLAIMS.occupation[readings.elsewhere(CLAIMS, key)]) == counted


def test_the_topic_has_more_than_half_of_the_words(readings):
    texts = ["He won an Oscar.", "He wrote novels.", "He wrote novels and won an Oscar for a film.", "He was born in Lyon."]
    table = CLAIMS.iloc[[0] * 4].reset_index(drop=True).assign(text=texts)
    assert list(readings.by_words(table)) == ["truth", "fiction", "neither", "neither"]
