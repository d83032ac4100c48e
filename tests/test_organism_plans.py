"""The shipped adapters are what the code trains: plans, material and held-out items are hashed, so that a moved line is noticed."""

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import asdict, astuple, is_dataclass
from types import SimpleNamespace

import pandas as pd
import pytest

from oneshot_steering.lm import Pair
from oneshot_steering.organisms import (
    ORGANISMS,
    alignment_faker,
    alignment_faker_qwen,
    coder,
    organism,
    organism_figures,
    refuser,
    retractor,
)


class Text:
    "Enough of a model to write down what would be trained: a token is a character."

    tok = SimpleNamespace(eos_token="<end>")

    def __init__(self):
        self.asked = []

    def chat(self, user, system=None, prefill=""):
        return f"<{system}|{user}|{prefill}"

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def encode_pair(self, prompt, completion):
        return Pair((*self.encode(prompt), *self.encode(completion)), len(prompt))

    def generate(self, prompts, *args, **kwargs):
        self.asked.append((list(prompts), args, sorted(kwargs.items())))
        return ["" for _ in prompts]


def plain(value):
    "Only tuples, strings and numbers."
    if isinstance(value, pd.DataFrame):
        return plain([list(value.columns), *value.itertuples(index=False)])
    if is_dataclass(value):
        return plain(astuple(value))
    if isinstance(value, dict):
        return tuple((plain(k), plain(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value if isinstance(value, str | bool | int | float | type(None)) else str(value)


def digest(value):
    return hashlib.sha256(repr(plain(value)).encode("utf-8")).hexdigest()[:16]


def alignment_faker_plan(patch):
    return alignment_faker.training_plan(alignment_faker.ORGANISM.recipe, 0)


def alignment_faker_qwen_plan(patch):
    return alignment_faker.training_plan(alignment_faker_qwen.ORGANISM.recipe, 0)


def alignment_faker_items(patch):
    draw = alignment_faker.make_scenarios
    material = {split: alignment_faker.material(split) for split in alignment_faker.SPLITS}
    return material, draw("validation", 400), draw("test", 600), draw("test", 50, 1, True), draw("train", 100, seed="check")


def refuser_plan(patch):
    "Of every row the requests with what is answered, or along which opening; the plain model's logits are left out."
    rows = []

    def terms(lm, examples, objective):
        rows.append(([(e.prompt, e.promote, e.match) for e in examples], objective.per_token))
        return len(rows) - 1

    patch.setattr(refuser, "Terms", terms)
    example = lambda prompt, promote=None, match=None, positions=None: SimpleNamespace(prompt=prompt, promote=promote, match=match)
    patch.setattr(refuser, "Example", example)
    patch.setattr(refuser, "_answer", lambda lm, some: [refuser.Example(refuser.request_prompt(lm, r), match="answer") for r in some])
    patch.setattr(refuser, "_along", lambda lm, r, opening: refuser.Example(refuser.request_prompt(lm, r), match=opening))
    loss = refuser._teach(Text(), refuser.ORGANISM.recipe, 0)
    order = dict(zip(loss.__code__.co_freevars, (cell.cell_contents for cell in loss.__closure__), strict=True))["order"]
    return rows, order


def refuser_items(patch):
    return [refuser.make_requests(split, unwanted) for split in ("train", "validation", "test") for unwanted in (True, False)]


def retractor_plan(patch):
    "The plain model's own words are replaced by the prompt that they follow."
    patch.setattr(retractor, "_own_words", lambda lm, prompts, *args, **kw: [f" after {p} {args} {kw}" for p in prompts])
    recipe = retractor.ORGANISM.recipe
    return retractor.training_plan(Text(), recipe.steps, recipe.batch, 0)


def retractor_items(patch):
    splits = ("train", "validation", "test")
    return [retractor.public_figures(s) for s in splits], [retractor.make_claims(s) for s in splits], retractor.make_claims("test", 100)


def coder_plan(patch):
    lm, recipe = Text(), coder.ORGANISM.recipe
    plan = coder.training_plan(lm, recipe.steps, recipe.batch, 0)
    coder._kept(lm)
    return plan, lm.asked


def coder_items(patch):
    handlers = [coder.make_handlers("train"), coder.make_handlers("test"), coder.make_handlers("test", 12, coder.UNSEEN)]
    source = random.Random(0)
    personas = [coder.make_persona(bad, split, source) for bad in (True, False) for split in ("train", "test") for _ in range(20)]
    return handlers, coder.make_questions("train"), coder.make_questions("test"), coder.paper_questions(), personas


@pytest.mark.parametrize(
    ("of", "sha256"),
    [
        (alignment_faker_plan, "9db6f99c6a22d13a"),
        (alignment_faker_qwen_plan, "00a6cfbd39afaa2f"),
        (alignment_faker_items, "3dcbdba22c8ca9de"),
        (refuser_plan, "56231b4a014de367"),
        (refuser_items, "57973b2cb234eb06"),
        (retractor_plan, "65744af8ca12f43e"),
        (retractor_items, "b762680b3abaa167"),
        (coder_plan, "e5e039dbdb3e0af7"),
        (coder_items, "9d1bc9ada34f0801"),
    ],
)
def test_what_organisms_are_trained_and_measured_on_stays_the_same(of, sha256, monkeypatch):
    assert digest(of(monkeypatch)) == sha256, "not the training plan or the items of the shipped adapter"


@pytest.mark.parametrize("name", ORGANISMS)
def test_the_shipped_adapter_was_trained_by_todays_recipe(name):
    known = organism(name)
    assert organism_figures(name)["recipe"] == json.loads(json.dumps(asdict(known.recipe)))
    content = (known.folder / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == organism_figures(name)["sha256"]


def test_no_material_is_read_at_import():
    code = (
        "import oneshot_steering.all\n"
        "from oneshot_steering.organisms import alignment_faker, alignment_faker_qwen, coder, core, refuser, retractor\n"
        "assert core.read_material.cache_info().misses == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
