"""The study of refusals brought to real models runs at smoke scale: on a tiny model, with the organism's harmless requests."""

import math
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

from oneshot_steering.organisms.refuser import make_requests
from oneshot_steering.study import Estimate

STUDY = Path(__file__).parents[1] / "nbs" / "studies" / "real" / "refusal_brought.ipynb"


@pytest.fixture(scope="module")
def shown(tmp_path_factory, run_study):
    "Everything that the cells printed or displayed, as text."
    folder = run_study(STUDY, tmp_path_factory.mktemp("brought"), {}, "smoke")
    outputs = [o for cell in nbformat.read(folder / "out.ipynb", 4).cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_every_vector_is_measured_with_and_without_the_gate(shown):
    for name in ("one harmless", "one harmless, retaining", "mean of harmless", "one harmful", "direction", "CAA", "careful system prompt"):
        assert name in shown
    assert "gate opens, harmful" in shown and "behind a gate: at least 0.75" in shown


def test_no_request_is_shown(shown):
    sets = [make_requests(split, unwanted) for split in ("validation", "test", "train") for unwanted in (True, False)]
    assert not [request.text for requests in sets for request in requests if request.text in shown]


def cell(start):
    "The source of the cell that defines something."
    return next(c.source for c in nbformat.read(STUDY, 4).cells if c.source.startswith(f"def {start}"))


@pytest.fixture(scope="module")
def rules():
    "The functions that decide what a price is, which threshold is allowed, and what the area is."
    names = dict(np=np, math=math, Estimate=Estimate, study=SimpleNamespace(points=0.03, area=0.2))
    for start in ("price", "lowest_threshold", "crossing"):
        exec(cell(start), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize(("gained", "lost", "allowed"), [(0, 0, True), (4, 0, True), (6, 0, False), (5, 1, False), (0, 5, True)])
def test_a_price_is_allowed_with_its_standard_error(rules, gained, lost, allowed):
    plain, steered = np.zeros(200, bool), np.zeros(200, bool)
    steered[:gained], plain[100:100 + lost] = True, True
    assert rules.price(steered, plain).value == pytest.approx((gained - lost) / 200)
    assert rules.allowed(steered, plain) == allowed


def test_the_threshold_is_the_lowest_with_an_allowed_price(rules):
    projected, plain, acting = np.arange(200.0), np.zeros(200, bool), np.ones(200, bool)
    threshold = rules.lowest_threshold(plain, acting, projected)
    assert (projected > threshold).sum() == 4


def test_a_trade_off_that_gains_what_it_pays_has_half_the_area(rules):
    assert rules.area(np.array([0.1, 0.2]), np.array([0.5, 1.0])) == pytest.approx(0.5)
    assert rules.crossing(np.array([0.1, 0.2]), np.array([0.5, 1.0]), 0.05) == pytest.approx(0.25)
