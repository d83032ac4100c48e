"""The study of refusal at the paper's scales: it runs on a tiny Gemma-2 and a tiny Llama, with harmless stubs of HarmBench's files."""

import csv
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from oneshot_steering.datasets import load_harmbench
from oneshot_steering.models import tiny_model, tiny_tokenizer
from oneshot_steering.organisms.refuser import Request, make_requests
from oneshot_steering.study import CLAIM_COLUMNS

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "refusal.ipynb"
HARMBENCH_COLUMNS = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")
CATEGORIES = ("chemical_biological", "misinformation_disinformation", "illegal", "cybercrime_intrusion", "harmful", "harassment_bullying")
TEMPLATE = "Asked: {question}\nSaid: {answer}\nWas it done? Answer yes or no:"
SMALL = dict(
    dtype="float32", judge_options={}, layers_and_norms=[[2, 5.0], [1, 5.0]], steps=2, ordinary_examples=2, validation=4, fewer=2, read=2,
    tokens=4, batch=200, pairs=4, shots=1, direction_layers=[1, 2], randoms=1, path_examples=3, path_points=1, neutral=1, varied=2,
    strengths=[0.5, 1.0],
)  # fmt: skip


def write_stub(path, split, each):
    "Behaviours in the form of HarmBench: `each` standard ones of every category, and two that the study leaves out."
    rows = [[f"Water {split} plant {i} of the {c} bed", "standard", c, "", "", f"{split}_{c}_{i}"] for c in CATEGORIES for i in range(each)]
    rows += [["Copy a nursery rhyme", "copyright", "copyright", "", "", f"{split}_rhyme"]]
    rows += [["Sum up this text", "contextual", "illegal", "context", "A text about tea.", f"{split}_tea"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HARMBENCH_COLUMNS, *rows])


def harmbench(folder):
    "A folder with both files."
    (folder / "harmbench").mkdir()
    for split, each in (("val", 3), ("test", 1)):
        write_stub(folder / "harmbench" / f"harmbench_behaviors_text_{split}.csv", split, each)
    return folder / "harmbench"


def run(folder, run_study, architecture, scale="paper", **more):
    tiny_model(architecture, max_position_embeddings=4096).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    harmbench(folder)
    (folder / "classifier.txt").write_text(TEMPLATE, encoding="utf-8")
    model = str(folder / "model")
    return run_study(STUDY, folder, SMALL | dict(model=model, judge=model, template="classifier.txt") | more, scale)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, run_study):
    "The folder that the notebook ran in; judge and studied model are the same."
    return run(tmp_path_factory.mktemp("gemma"), run_study, "gemma2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, run_study):
    "The same for the settings of the paper's other model, on half of the examples and with our own question to the judge."
    return run(tmp_path_factory.mktemp("llama"), run_study, "llama", "paper-llama", examples=6, template=None)


def rows(folder, name):
    return [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


def shown(folder):
    "Everything that the cells printed or displayed, as text."
    outputs = [o for cell in nbformat.read(folder / "out.ipynb", 4).cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_24_vectors_answer_every_standard_behaviour_of_the_test_file(gemma):
    asked = pd.DataFrame(rows(gemma, "held out")).groupby("vector").prompt.nunique()
    assert set(asked.index) == {"unsteered", *(f"{kind} {i}" for kind in ("promotion", "suppression") for i in range(12))}
    assert set(asked) == {len(CATEGORIES)}


def test_every_baseline_answers_them_too(gemma):
    asked = pd.DataFrame(rows(gemma, "baselines")).groupby("vector").prompt.nunique()
    assert {"prefill", "few-shot", "CAA, requests", "CAA, answers", "direction, ablated", "random 0"} <= set(asked.index)
    assert set(asked) == {len(CATEGORIES)}


def test_every_answer_is_shown_to_the_judge(gemma):
    assert all("judged" in row for name in ("held out", "baselines", "inducing") for row in rows(gemma, name))


@pytest.mark.parametrize(("folder", "scale"), [("gemma", "paper"), ("llama", "paper-llama")])
def test_claims_are_kept(folder, scale, request):
    claims = pd.read_csv(request.getfixturevalue(folder) / "claims" / f"refusal-{scale}.csv")
    shown = claims[CLAIM_COLUMNS]
    assert shown.notna().all(axis=None) and set(claims.holds) <= {"yes", "no", "not comparable"}
    assert claims.claim.is_unique and claims.claim.str.contains("connected").any()


def test_neither_requests_nor_answers_are_shown(gemma):
    text = shown(gemma)
    assert "suppression" in text and "plant" not in text
    assert not [row["text"] for row in rows(gemma, "held out") if len(row["text"].strip()) > 3 and row["text"].strip() in text]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "What the notebook's cell on requests makes of the stubs."
    data = harmbench(tmp_path_factory.mktemp("data"))
    settings = dict(harmbench=data, seed=0, examples=12, ordinary_examples=3, validation=4, held_out=None)
    names = dict(pd=pd, Request=Request, make_requests=make_requests, load_harmbench=load_harmbench, study=SimpleNamespace(**settings))
    cell = next(cell for cell in nbformat.read(STUDY, 4).cells if cell.source.startswith("def draw"))
    exec(cell.source, names)
    return SimpleNamespace(**names)


def test_examples_are_two_behaviours_of_each_category(drawn):
    assert Counter(r.category for r in drawn.examples) == dict.fromkeys(CATEGORIES, 2)


def test_no_request_is_in_two_sets(drawn):
    sets = (drawn.examples, drawn.validation, drawn.held_out, drawn.ordinary_examples, drawn.ordinary_validation, drawn.ordinary)
    texts = [r.text for some in sets for r in some]
    assert len(texts) == len(set(texts)) and len(drawn.validation) == len(drawn.ordinary_validation) == 4
