"""The study of fictitious information at the paper's scale: it runs on tiny Gemma-2 models, with a file of names in a user's form."""

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from oneshot_steering.models import tiny_model, tiny_tokenizer
from oneshot_steering.organisms.retractor import OCCUPATIONS, public_figures
from oneshot_steering.study import CLAIM_COLUMNS

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "fictitious_information.ipynb"
LAYERS = [1, 2]


def names(count=4):
    return {o: [f"Ab{i} {o.title()}son" for i in range(count)] for o in OCCUPATIONS}


@pytest.fixture(scope="module")
def executed(tmp_path_factory, run_study):
    "The folder that the notebook ran in; the chat model is its own judge, the base model is another one."
    folder = tmp_path_factory.mktemp("study")
    for name, seed in (("chat", 0), ("base", 1)):
        tiny_model("gemma2", seed, max_position_embeddings=4096, sliding_window=4096).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "names.json").write_text(json.dumps(names()), encoding="utf-8")
    settings = dict(
        model=str(folder / "chat"), base=str(folder / "base"), dtype="float32", names="names.json", occupations=2,
        people=dict(train=2, validation=1, test=None), layers=LAYERS, tested=LAYERS, steps=2, early=1, late=2, early_settings=dict(steps=2),
        late_settings=dict(steps=2), short=3, tokens=4, cap=4, spread=2, batch=128, neutral=1,
    )  # fmt: skip
    return run_study(STUDY, folder, settings)


def answers(folder, name):
    return [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


def outputs(folder):
    return [o for cell in nbformat.read(folder / "out.ipynb", 4).cells if cell.cell_type == "code" for o in cell.outputs]


def test_every_kind_of_vector_is_tried_at_every_layer_on_people_it_was_not_made_from(executed):
    one_each = {f"{kind}/{layer}/{o}" for kind in ("promotion", "suppression", "random") for layer in LAYERS for o in OCCUPATIONS[:2]}
    wanted = {"unsteered", *one_each, *(f"reentrant/2/{o}" for o in OCCUPATIONS[:2]), *(f"CAA/{layer}/all" for layer in LAYERS)}
    for split, people in (("validation", 2), ("test", 2)):
        rows = answers(executed, split)
        assert {row["vector"] for row in rows} == wanted
        assert {row["prompt"] for row in rows} == set(range(people))  # one name of four is for validation, one for the test


def test_retained_vectors_are_tried_too(executed):
    for kind in ("promotion", "suppression"):
        tried = {row["vector"] for row in answers(executed, f"{kind}, retain")}
        assert tried == {"unsteered", *(f"{kind}/2/{o}" for o in OCCUPATIONS[:2])}


def test_claims_are_kept(executed):
    import pandas as pd

    claims = pd.read_csv(executed / "claims" / "fictitious_information-paper.csv")
    shown = claims[CLAIM_COLUMNS]
    assert shown.notna().all(axis=None) and set(claims.holds) <= {"yes", "no", "not comparable"}
    needed = claims[claims.claim.str.contains("taking back is not needed")]
    assert list(needed.holds) == ["not comparable"] * 2  # a random model takes nothing back


def test_what_is_said_of_people_is_not_shown(executed):
    text = "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs(executed))
    assert "suppression" in text and not any(name in text for some in names().values() for name in some)
    said = [row["text"].strip() for row in answers(executed, "test")]
    assert not [s for s in said if len(s) > 3 and s in text]


def test_nothing_is_written_to_stderr(executed):
    assert not [o["text"] for o in outputs(executed) if o.output_type == "stream" and o.name == "stderr"]


@pytest.fixture(scope="module")
def everyone():
    "The function of the notebook that gathers names, by itself."
    found = dict(
        json=json, Path=Path, OCCUPATIONS=OCCUPATIONS, public_figures=public_figures,
        study=SimpleNamespace(people=dict(train=2, validation=1)),
    )  # fmt: skip
    for cell in nbformat.read(STUDY, 4).cells:
        if cell.source.startswith("SPLITS ="):
            exec(cell.source.split("\ndef of_split")[0], found)
    return found["everyone"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[]", "expected an object with the keys actor, author"),
        (json.dumps({"actor": ["A B"]}), "expected an object with the keys actor, author"),
        (json.dumps(names(3)), "'actor' must be a list of 4 different names or more"),
        (json.dumps(names() | {"author": "A B"}), "'author' must be a list"),
        (json.dumps(names() | {"author": ["A B"] * 9}), "'author' must be a list of 4 different"),
        (json.dumps(names() | {"author": ["A B", "C D", "E F", 1]}), "'author' must be a list"),
    ],
)
def test_a_file_in_another_form_says_what_is_wrong(everyone, tmp_path, content, message):
    place = tmp_path / "names.json"
    place.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        everyone(place)


def test_a_file_that_is_not_there_says_whose_it_would_be(everyone, tmp_path):
    with pytest.raises(FileNotFoundError, match="your own file"):
        everyone(tmp_path / "nothing.json")


def test_our_own_people_are_in_one_split_each(everyone):
    people = everyone("all")
    assert {o: len(set(some)) for o, some in people.items()} == dict.fromkeys(OCCUPATIONS, 86)
