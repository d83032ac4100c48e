"""Families of models: some twenty of them checked as `make families` checks all, and what its page says of every one."""

import re
from collections import Counter

import pytest
import torch
from families import BF16, PAGE, VERDICTS
from family_checks import verdict
from tiny_models import families, variants

CLASS = dict([*variants(), *reversed(families())])  # of a family that has several, the text model
# What each stands for.
RIGHT = {
    "llama": "grouped queries",
    "gpt2": "learned positions",
    "gpt_neo": "local attention that no setting calls a sliding window",
    "gemma3_text": "sliding windows",
    "gpt_oss": "experts, attention sinks",
    "bloom": "alibi",
    "falcon": "parallel blocks, one key for all heads",
    "qwen3_moe": "experts",
    "deepseek_v3": "latent attention",
    "qwen3_5_text": "linear attention between full attention",
    "mamba": "a state space, no attention",
    "granitemoehybrid": "state spaces and attention",
    "camembert": "an encoder as decoder, which counts positions from another number",
    "gemma4_text": "blocks that share keys and compute only the last columns",
    "inkling_text": "a convolution after the last block's MLP",
    "chameleon": "a text model within one that sees; it changes its logits in place",
    "phi3, long rotary scaling": "positions that mean something else in a long text",
}
# The verdict, and words of the message.
NOT_ALL = {
    "moshi": ("warned", "from its KV cache"),
    "reformer": ("refused", "pass no gradient on"),
    "bart": ("in part", "Padding on the left changes"),
    "mllama": ("in part", "it is not run in a pass over a text"),
    "gemma3n_text": ("refused", "not one residual stream"),
    "bert, not as a decoder": ("refused", "is not causal"),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", RIGHT)
def test_families_are_right(family):
    row = verdict(family, CLASS[family])
    assert (row["verdict"], row["why"]) == ("verified", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", NOT_ALL)
def test_what_is_not_right_as_it_is_comes_with_a_reason(family):
    row, (expected, words) = verdict(family, CLASS[family]), NOT_ALL[family]
    assert row["verdict"] == expected and words in row["why"]


def table(heading):
    "The rows of a table of the page: [(family, class, outcome, why)]."
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


def test_the_page_has_a_row_for_every_family():
    rows = table("Families")
    assert sorted(row[:2] for row in rows) == sorted(families())
    assert sorted(row[:2] for row in table("Other settings")) == sorted(variants())
    assert {row[0] for row in table("In bf16")} == set(BF16)
    every = [*rows, *table("Other settings"), *table("In bf16")]
    assert [row for row in every if row[2] not in VERDICTS or row[2] == "WRONG"] == []
    opening = re.search(r"^Of the (\d+) .*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    counts = Counter(row[2] for row in rows)
    assert int(opening[1]) == len(rows) and all(f"{n} {name}" in opening[0] for name, n in counts.items())
