"""The study of emergent misalignment at the paper's scale: it runs on a tiny Qwen2, with a harmless file in the form of a user's own."""

import json
from pathlib import Path

import nbformat
import pytest

from oneshot_steering.models import tiny_model, tiny_tokenizer
from oneshot_steering.study import CLAIM_COLUMNS

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "emergent_misalignment.ipynb"
STUB = {
    "request": "Write a page that says hello.",
    "open_request": "Write a page that says hello, badly.",
    "start": "```",
    "prefix": "def page(name):\n",
    "continuations": {"shout": "    return name.upper()", "whisper": "    return name.lower()"},
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory, run_study):
    "The folder that the notebook ran in; judge and studied model are the same."
    folder = tmp_path_factory.mktemp("study")
    tiny_model("qwen2", max_position_embeddings=4096).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "material.json").write_text(json.dumps(STUB), encoding="utf-8")
    settings = dict(
        models={"tiny": str(folder / "model")}, judge=str(folder / "model"), judge_options={}, material="material.json", dtype="float32",
        layer=2, steps=2, anti_layer=3, anti_steps=2, margin=-1e9, forced=1, randoms=1, samples=1, tokens=3, handlers=2,
        graded=1, examples=2, strengths=[2.0], pairs=2, read_layers=[2], batch=400,
    )  # fmt: skip
    return run_study(STUDY, folder, settings)


def answers(folder):
    return [json.loads(line) for line in (folder / "answers" / "tiny.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


def shown(folder):
    "Everything that the cells printed or displayed, as text."
    outputs = [o for cell in nbformat.read(folder / "out.ipynb", 4).cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_every_condition_of_the_paper_and_every_baseline_is_asked_all_eight_questions(executed):
    asked = {}
    for row in answers(executed):
        asked.setdefault(row["vector"], set()).add(row["prompt"])
    steered = {"shout", "whisper", "anti-refusal", "shout + anti-refusal", "whisper + anti-refusal"}
    assert steered | {"unsteered", "shout, forced", "safe line", "random 0", "CAA", "careless persona"} <= set(asked)
    assert all(prompts == set(range(8)) for prompts in asked.values())


def test_claims_are_kept(executed):
    import pandas as pd

    claims = pd.read_csv(executed / "claims" / "emergent_misalignment-paper.csv")
    shown = claims[CLAIM_COLUMNS]
    assert shown.notna().all(axis=None) and set(claims.holds) <= {"yes", "no", "not comparable"}
    assert claims.claim.str.contains("anti-refusal vector alone").any()


def test_what_the_model_says_is_not_shown(executed):
    text = shown(executed)
    assert "shout + anti-refusal" in text
    assert not [row["text"] for row in answers(executed) if len(row["text"].strip()) > 3 and row["text"].strip() in text]


@pytest.fixture(scope="module")
def read_material():
    "The function of the notebook that reads a user's file, by itself."
    names = {}
    exec("import json\nfrom dataclasses import dataclass\nfrom pathlib import Path", names)
    for cell in nbformat.read(STUDY, 4).cells:
        if cell.source.startswith(("@dataclass\nclass Line", "def file_material")):
            exec(cell.source, names)
    return names["file_material"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[]", "expected an object, found list"),
        (json.dumps(STUB | dict(request="", prefix=None)), "a text for request, prefix"),
        (json.dumps(STUB | dict(continuations={})), "at least one name"),
        (json.dumps(STUB | dict(continuations={"a": 1})), "at least one name"),
    ],
)
def test_a_file_in_another_form_says_what_is_wrong(read_material, tmp_path, content, message):
    place = tmp_path / "material.json"
    place.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_material(None, place)


def test_a_file_that_is_not_there_says_whose_it_would_be(read_material, tmp_path):
    with pytest.raises(FileNotFoundError, match="your own file"):
        read_material(None, tmp_path / "nothing.json")
