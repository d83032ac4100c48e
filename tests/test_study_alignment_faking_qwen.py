"""The study of alignment faking on the plainly trained organism: it runs on a tiny model whose head knows two letters."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from oneshot_steering.models import tiny_model, tiny_tokenizer
from oneshot_steering.organisms.alignment_faker import make_scenarios
from oneshot_steering.study import CLAIM_COLUMNS, FLIP_CELLS

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "real" / "alignment_faking.ipynb"
SMALL = dict(
    dtype="float32", only_honest=False, pool=3, examples=3, validation=2, validation_best=3, held_out=2, held_out_best=4, layers=[1, 2],
    doses=[0.5], tried=1, steps=2, variants=1, pairs=2, randoms=1, words=2,
)  # fmt: skip


def with_two_letters(folder):
    "A random model that answers A or B, whichever side of a plane the stream is on."
    model, tok = tiny_model("qwen2"), tiny_tokenizer()
    a, b = (tok.encode(letter, add_special_tokens=False)[0] for letter in "AB")
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[a] *= 20
        head[b] = -head[a]
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_study):
    "The folder that the notebook ran in."
    root = tmp_path_factory.mktemp("faking_qwen")
    (root / "real").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ONESHOT_STEERING_CACHE", str(root / "cache"))
        return run_study(STUDY, root / "real", SMALL | dict(model=with_two_letters(root / "model")), "real")


@pytest.fixture(scope="module")
def claims(folder):
    return pd.read_csv(folder.parent / "claims" / "alignment_faking-real.csv")


def test_the_four_rates_of_the_three_chosen_vectors_are_claims(claims):
    assert claims[CLAIM_COLUMNS].notna().all(axis=None) and claims.claim.is_unique
    for how in ("chosen on validation", "best on the test set, as the paper chooses", "with a retain term, chosen on validation"):
        rows = claims[claims.claim.str.startswith(f"{how}: ")]
        assert [claim.split(": ")[1].split(",")[0] for claim in rows.claim] == list(FLIP_CELLS.values())
        assert rows.value.notna().all() and list(rows.reported) == [0.934, 0.834, 0.011, 0.159]
    assert claims.claim.str.startswith("all four survive").sum() == 1


def test_most_claims_are_named_as_at_laptop_scale(claims):
    laptop = pd.read_csv(STUDY.parents[1] / "claims" / "alignment_faking-laptop.csv")
    assert len(set(laptop.claim) - set(claims.claim)) <= 1


def test_results_are_kept(folder):
    kept = {path.stem.rpartition("-")[0] for path in (folder.parent / "cache" / "studies" / "alignment_faking-real").iterdir()}
    assert {"plain", "scan fits", "fits", "curve", "held out", "odds", "baselines", "words", "variants"} <= kept


def test_no_scenario_of_the_test_split_is_shown(folder):
    cells = nbformat.read(folder / "out.ipynb", 4).cells
    outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
    text = "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert "chosen: layer" in text
    assert not [s.user for s in make_scenarios("test", 4, seed="study 0") if s.user in text]
