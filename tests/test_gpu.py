"""`make gpu`: the script runs here at tiny shapes, and says what is missing. Whether an accelerator is right, it says there."""

from dataclasses import replace

import gpu
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

CPU = ["--tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    assert gpu.main([*CPU, "--out", str(folder)]) == 0
    (page,) = folder.iterdir()
    return page.read_text(encoding="utf-8")


def rows(page, first):
    "The cells of the rows that begin so."
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith(f"| {first}")]


@pytest.mark.parametrize("family", gpu.TINY.families)
def test_what_is_the_same_is_called_right(page, family):
    ((_, fp32, bf16),) = rows(page, f"{family} ")
    assert fp32 == "right (0e+00)"  # both are this processor
    assert bf16.startswith("right (") and bf16 != fp32


@pytest.mark.parametrize("shape", gpu.TINY.shapes, ids=lambda shape: shape.name)
def test_a_row_for_every_work(page, shape):
    *measured, (_, _, losses, *_) = rows(page, shape.name)
    works = ["1 fit, 2 steps", "4 fits together, 2 steps", "4 tokens, batch 1", "4 tokens, batch 3"]
    assert [row[1] for row in measured] == works
    for _, work, ours, plain, ratio, bound, share, *_ in measured:
        unit = " s" if "fit" in work else " tokens/s"
        assert all(cell.endswith(unit) for cell in (ours, plain, bound))
        assert float(ratio) > 0 and 0 <= float(share) < 1
    assert float(losses.removeprefix("differ by ").split("%")[0]) < 2


def test_a_wrong_device_is_noticed(monkeypatch):
    def wrong(lm, honest=gpu.some_log_probs):
        return honest(lm) * (1.01 if lm.name == "there" else 1)

    names, kind = iter(["here", "there"]), gpu.LM

    def named(model, tok):
        return kind(model, tok, name=next(names))

    monkeypatch.setattr(gpu, "some_log_probs", wrong)
    monkeypatch.setattr(gpu, "LM", named)
    faults, difference = gpu.check("llama", "fp32", "cpu")
    assert faults == ["log-probabilities differ by 1.0%"]
    assert difference == pytest.approx(0.01, rel=1e-2)


def test_what_does_not_fit_is_said(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "plain_fits", too_large)
    scale = replace(gpu.TINY, steps=1, batches=(1,))
    gpu.measure_model(gpu.Page(None), scale.shapes[1], scale, gpu.Device("cpu", scale), gpu.Clock(60), (1e11, 1e12))
    one, many, *texts, last = rows(capsys.readouterr().out, "Llama")
    assert one[3] == many[3] == last[2] == gpu.OUT_OF_MEMORY
    assert one[2].endswith(" s") and all(row[3].endswith("tokens/s") for row in texts)


def test_what_has_no_time_is_said(tmp_path):
    assert gpu.main([*CPU, "--budget", "0", "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.iterdir()
    assert [row[1:3] for row in rows(page.read_text(), "Gemma")] == [["all", gpu.OUT_OF_TIME]]
    assert rows(page.read_text(), "llama")[0][1:] == [gpu.OUT_OF_TIME] * 2


def test_without_an_accelerator(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("There is no accelerator on this machine.")


@pytest.mark.parametrize("shape, billions", list(zip(gpu.PAPER.shapes, (2.614, 8.030), strict=True)))
def test_shapes_are_the_models(shape, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config), dtype=torch.bfloat16)
    assert sum(weights.numel() for weights in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert shape.layer < model.config.num_hidden_layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("family", gpu.PAPER.families)
def test_an_accelerator_is_right(family):
    for precision in ("fp32", "bf16"):
        assert gpu.check(family, precision, torch.accelerator.current_accelerator())[0] == []
