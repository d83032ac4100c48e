"""Sliders without a browser: what is written, shown, given up, shown as an error, and let go."""

import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from html.parser import HTMLParser

import ipywidgets
import pandas as pd
import pytest
import torch

from oneshot_steering.app import demo_vector, page_notebook
from oneshot_steering.calibrate import Calibration
from oneshot_steering.demos import TEXT_DEMO
from oneshot_steering.figure import Piece, _Spelling, dials, steered_pieces, steering_figure, tint, tinted
from oneshot_steering.models import tiny_lm
from oneshot_steering.objective import Example
from oneshot_steering.optimize import optimize
from oneshot_steering.panel import optimizer_panel
from oneshot_steering.slider import steering_slider
from oneshot_steering.steering import Steering, Steerings, load_steering
from oneshot_steering.widget_base import LatestOnlyWorker, twin

WIDGETS = ipywidgets.widgets.widget._instances


def random_vector(layer=2, seed=0, size=5.0):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Steering(size * vector / vector.norm(), layer)


def endless_lm(**config):
    "A tiny model that never ends a text."
    lm = tiny_lm(**config)
    lm.model.generation_config.eos_token_id = lm.tok.eos_token = None
    return lm


def text_of(pieces):
    return "".join(p.text for p in pieces)


def words(widget):
    return re.sub("<.*?>", "", widget.value)


@pytest.fixture(autouse=True)
def nothing_left():
    "No test leaves a thread or a widget behind."
    before = set(WIDGETS)
    yield
    assert not [t for t in threading.enumerate() if t.name == "oneshot-steering"]
    assert not set(WIDGETS) - before


# What is written


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_text_is_what_generate_gives(architecture, temperature):
    lm, one, two = tiny_lm(architecture), random_vector(1), random_vector(2, seed=1)
    steps = list(steered_pieces(lm, ["the fox"] * 3, [None, one, one + two], max_new_tokens=12, temperature=temperature, seed=3))
    for row, acting in enumerate([(), (one,), (one, two)]):
        with lm.steer(*acting):
            said = lm.generate("the fox", max_new_tokens=12, temperature=temperature, seed=3)
        assert text_of(step[row] for step in steps if step[row]) == said
    assert not lm.steered


def test_every_token_has_its_probability_with_and_without_the_vectors():
    lm, acting = endless_lm(), random_vector(1) + random_vector(2, seed=1)
    start = lm.encode("the fox")
    pieces = [p for (p,) in steered_pieces(lm, ["the fox"], [acting], max_new_tokens=10) if p]
    with lm.steer(acting):
        ids = [step[0] for step in lm.decode_steps([start], 10)]
    batch, mask = lm.pad([start + ids])
    of_ids = lambda: lm.run(batch, mask, torch.tensor([len(start)])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    with lm.steer(acting):
        steered = of_ids()
    plain, chosen = of_ids(), torch.tensor(ids)[:, None]
    assert sum(p.tokens for p in pieces) == len(ids)
    assert sum(p.steered for p in pieces) == pytest.approx(steered.gather(-1, chosen).sum().item(), abs=1e-3)
    assert sum(p.plain for p in pieces) == pytest.approx(plain.gather(-1, chosen).sum().item(), abs=1e-3)
    assert sum(p.kl for p in pieces) == pytest.approx((steered.exp() * (steered - plain)).sum().item(), abs=1e-3)


def test_an_abandoned_text_leaves_no_hook():
    lm = tiny_lm()
    steps = steered_pieces(lm, ["the fox"], [random_vector()], max_new_tokens=50)
    next(steps)
    assert lm.attached == 1 and lm.steered == 0  # what runs between two pieces is not steered
    steps.close()
    assert lm.attached == 0 and not any(layer._forward_pre_hooks for layer in lm.layers)


@pytest.mark.parametrize("text", ["€", "naïve 東京", "👩‍👩‍👧 e\u0301", "plain"])
def test_characters_of_several_tokens_are_one_piece(text):
    lm = tiny_lm()
    spelling, ids = _Spelling(lm), lm.encode(text)[1:]
    pieces = [p for p in (spelling.add(i, (-1.0, -2.0, 0.5)) for i in ids) if p]
    assert spelling.rest() is None and text_of(pieces) == text
    assert all("\ufffd" not in p.text and p.steered == -p.tokens for p in pieces)
    assert sum(p.tokens for p in pieces) == len(ids)


def test_half_a_character_at_the_end_is_shown_as_such():
    lm = tiny_lm()
    spelling = _Spelling(lm)
    assert spelling.add(lm.encode("€")[1], (-1.0, -1.0, 0.0)) is None
    assert spelling.rest().text == "\ufffd" and spelling.rest() is None


def test_markup_in_tokens_is_escaped():
    shown = tinted([Piece('<script>"&', -1.0, -4.0, 0.1), Piece("\n", -1.0, -1.0, 0.0), Piece("x", -3.0, -1.0, 0.1)])
    assert "<script" not in shown and "&lt;script&gt;&quot;&amp;" in shown
    assert re.findall(r"class=(\w+)", shown) == ["u4", "d4"] and 'title="+3.00 nats: 0.37 steered, 0.018 unsteered"' in shown
    assert [tint(c) for c in (0.09, 0.1, -0.5, 100, -100)] == ["", "u1", "d2", "u5", "d5"]


def test_what_cannot_be_turned_is_refused():
    lm, vector = tiny_lm(), random_vector()
    with pytest.raises(ValueError, match="no vector"):
        steering_slider(lm, [], "a")
    with pytest.raises(ValueError, match="at least one prompt"):
        steering_slider(lm, vector, [])
    with pytest.raises(ValueError, match="width 4"):
        steering_slider(lm, Steering(torch.ones(4), 0), "a")
    with pytest.raises(TypeError, match="'a' is a str"):
        dials({"a": "vector.safetensors"})
    with pytest.raises(ValueError, match="most=0"):
        steering_slider(lm, vector, "a", most=0)
    with lm.steer(vector), pytest.raises(ValueError, match=r"outside lm\.steer"):
        steering_slider(lm, vector, "a")
    with pytest.raises(ValueError, match="too many for one page"):
        steering_figure(lm, [vector] * 4, "a")


def test_fits_and_calibrations_stand_for_their_vectors():
    lm, vector = tiny_lm(), random_vector()
    fit = optimize(lm, Example("the fox", promote=" dog"), 1, steps=2, progress=False)
    found = Calibration(0.5 * vector, 0.5, 1.0, 0.0, 0.9, pd.DataFrame(), 3)
    a, b, c = dials({"fit": fit, "found": found, "both": Steerings([vector, vector])})
    assert a.steering == (fit.steering,) and a.calibrated is None
    assert b.steering[0].strength == 1 and b.calibrated == 0.5
    assert len(c.steering) == 2 and c.layer is None and c.mode is None
    with pytest.raises(ValueError, match="no strength better than 0"):
        dials(Calibration(0 * vector, 0.0, 1.0, 1.0, 0.9, pd.DataFrame(), 3))


# The thread


def test_a_failure_is_reported_and_the_next_request_done():
    done, failures = [], []

    def work(what, request):
        if what == "bad":
            raise RuntimeError("no")
        done.append(what)

    worker = LatestOnlyWorker(work, lambda error, request: failures.append((str(error), request.number)))
    worker.ask("bad")
    assert worker.wait(5) and failures == [("no", 1)]
    worker.ask("good")
    assert worker.wait(5) and done == ["good"]
    worker.close()
    worker.close()
    with pytest.raises(RuntimeError, match="closed"):
        worker.ask("late")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "phi"])
def test_a_twin_shares_weights_and_no_hooks(architecture):
    lm, vector = tiny_lm(architecture), random_vector(size=50.0)
    other, plain = twin(lm), lm.generate("the fox", max_new_tokens=8)
    assert {p.data_ptr() for p in other.model.parameters()} == {p.data_ptr() for p in lm.model.parameters()}
    with other.steer(vector):
        assert lm.generate("the fox", max_new_tokens=8) == plain != other.generate("the fox", max_new_tokens=8)
    with lm.steer(vector):
        assert other.generate("the fox", max_new_tokens=8) == plain


class Gate:
    "A hook that notes every pass of a model (columns, rows), and can hold or break one."

    def __init__(self, lm):
        self.passes, self.inside, self.open, self.error = [], threading.Event(), threading.Event(), None
        self.open.set()
        assert lm.can_share_prompts and lm.can_cache(200)  # found out before passes are counted
        lm.layers[0].register_forward_pre_hook(self.hook, with_kwargs=True)

    def __deepcopy__(self, memo):
        return self

    def hook(self, module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        self.passes.append(tuple(states.shape[:2]))
        self.inside.set()
        assert self.open.wait(20)
        if self.error:
            raise self.error


def test_a_newer_value_ends_the_text_within_a_token():
    lm, vector = endless_lm(), random_vector(layer=0)  # rows differ from the first block, so one pass reads the prompt
    gate = Gate(lm)
    with steering_slider(lm, vector, "the fox", max_new_tokens=150) as app:
        while len(gate.passes) < 5:
            time.sleep(0.001)
        gate.open.clear()
        gate.inside.clear()
        assert gate.inside.wait(5)  # in the middle of a token
        held, began = len(gate.passes), time.monotonic()
        for strength in (0.2, 0.4, 0.6):
            app.sliders[0].value = strength
        assert time.monotonic() - began < 2  # nothing waits for the model
        gate.open.set()
        assert app.wait(30)
        after = gate.passes[held:]
        assert after[0][1] > 1, "the first pass after the one under way reads the prompt anew"
        assert sum(columns == len(lm.encode("the fox")) for _, columns in after) == 1, "values in between are not written"
        assert 'data-run="4"' in app.status.value and 'data-state="done"' in app.status.value
        with lm.steer(0.6 * vector):
            assert text_of(app.steered) == lm.generate("the fox", max_new_tokens=150)


def test_the_kernel_is_free_and_its_model_unsteered_while_text_is_written():
    lm = endless_lm()
    plain = lm.generate("the fox", max_new_tokens=20)
    with steering_slider(lm, random_vector(size=50.0), "the fox", max_new_tokens=200) as app:
        for _ in range(5):
            assert lm.generate("the fox", max_new_tokens=20) == plain
        assert app.wait(30) and app.error is None


def test_text_appears_token_by_token_and_not_too_often():
    lm, shown = endless_lm(), []
    with steering_slider(lm, random_vector(), "the fox", max_new_tokens=1) as app:
        app.wait()
        app.panes[1].observe(lambda change: shown.append((time.monotonic(), change["new"])), "value")
        app.length.value = 150
        app.wait()
    seconds = shown[-1][0] - shown[0][0]
    counts = [int(re.search(r'data-tokens="(\d+)"', value)[1]) for _, value in shown]
    assert counts[0] <= 4 and counts == sorted(counts) and counts[-1] == 150  # 1, or the few of a first character
    assert 3 <= len(shown) <= 20 * seconds + 3


# The slider


def test_two_vectors_compose():
    lm, one, two = tiny_lm(), random_vector(1), random_vector(2, seed=1)
    with steering_slider(lm, {"one": one, "two": two}, ["the fox", "a dog"], max_new_tokens=8) as app:
        app.sliders[0].value, app.sliders[1].value = 0.5, -1.5
        app.wait()
        with lm.steer(0.5 * one, -1.5 * two):
            assert text_of(app.steered) == lm.generate("the fox", max_new_tokens=8)
        assert len(app.steering) == 2
        app.sliders[0].value = app.sliders[1].value = 0
        app.wait()
        assert text_of(app.steered) == text_of(app.unsteered) == lm.generate("the fox", max_new_tokens=8)
        assert all(p.change == 0 for p in app.steered)


def test_layer_mode_prompt_and_length_can_be_chosen():
    lm, vector = tiny_lm(), random_vector(1)
    with steering_slider(lm, vector, ["the fox", "a dog"], max_new_tokens=8) as app:
        app.layers[0].value, app.modes[0].value, app.length.value, app.picker.value = 3, "clamp", 5, "a dog"
        app.wait()
        with lm.steer(vector.replace(layers=3, mode="clamp")):
            assert text_of(app.steered) == lm.generate("a dog", max_new_tokens=5)
        assert app.prompt.value == "a dog"
        app.prompt.value = "typed"
        assert app.picker.value is None
    several = vector.replace(layers=[0, 1])
    affine = Steering(torch.zeros(32), 1, mode="affine", left=torch.ones(1, 32), right=torch.ones(1, 32))
    with steering_slider(lm, [several, affine], "the fox", max_new_tokens=2) as app:
        assert app.layers[0] is None and app.modes[0] is not None and app.layers[1] is not None and app.modes[1] is None
        app.wait()
        assert app.error is None


def test_zero_and_the_calibrated_strength_are_marked():
    with steering_slider(tiny_lm(), random_vector(), "a", calibrated=3.0, max_new_tokens=2) as app:
        slider, marks = app.sliders[0], app.box.children[2].children[0].children[1].value
        assert (slider.min, slider.max, slider.value) == (-3.0, 3.0, 3.0)
        assert 'left:50%">0<' in marks and "calibrated 3" in marks
        app.wait()


def test_score_and_kl_are_drawn_for_what_was_visited():
    lm = tiny_lm()
    with steering_slider(lm, random_vector(), "the fox", score=len, max_new_tokens=6) as app:
        app.wait()
        app.sliders[0].value = -0.5
        app.wait()
        assert {w.strengths for w in app.visits} == {(0.0,), (1.0,), (-0.5,)}
        kl, score = next(v for w, v in app.visits.items() if w.strengths == (-0.5,))
        assert kl > 0 and score == len(text_of(app.steered))
        assert re.search(r'alt="KL \S+ nats per token, score \d+ at strength -0.5 of vector; 3 strengths visited"', app.plot.value)


def test_an_error_is_shown_and_the_next_drag_works():
    lm = endless_lm()
    gate = Gate(lm)
    with steering_slider(lm, random_vector(), "the fox", max_new_tokens=5) as app:
        app.wait()
        gate.error = RuntimeError("<b>out of memory</b>")
        app.sliders[0].value = 0.5
        app.wait()
        assert "RuntimeError: &lt;b&gt;out of memory" in app.alert.value and "<b>" not in app.alert.value
        assert 'role="alert"' in app.alert.value and 'data-state="error"' in app.status.value
        assert not app.lm.steered and len(app.lm.layers[2]._forward_pre_hooks) == 0
        gate.error = None
        app.sliders[0].value = 0.7
        app.wait()
        assert app.alert.value == "" and app.error is None and 'data-state="done"' in app.status.value


@pytest.mark.parametrize("prompt", ["", "  \n", "word " * 300])
def test_a_prompt_that_cannot_be_read_is_told(prompt):
    with steering_slider(tiny_lm(), random_vector(), "the fox", max_new_tokens=3) as app:
        app.prompt.value = prompt
        app.wait()
        assert "ValueError: A prompt" in app.alert.value
        app.prompt.value = "<script>alert(1)</script>"
        app.wait()
        assert app.alert.value == "" and "<script" not in app.panes[0].value + app.panes[1].value


def test_an_error_of_the_score_is_shown():
    with steering_slider(tiny_lm(), random_vector(), "the fox", score=lambda text: 1 / 0, max_new_tokens=3) as app:
        app.wait()
        assert "ZeroDivisionError" in app.alert.value and text_of(app.steered)


def test_closing_frees_everything():
    lm = tiny_lm()
    app = steering_slider(lm, random_vector(), "the fox", score=len, max_new_tokens=200)
    thread, made = app.worker.thread, weakref.ref(app.lm.model)
    app.closing.click()  # in the middle of a text
    app.close()
    assert not thread.is_alive() and app.worker is None
    app.update()
    gc.collect()
    assert made() is None, "something still holds the model"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lm.model.modules())


# The panel


def test_a_fit_can_be_dragged_and_saved(tmp_path):
    lm, where = tiny_lm(), tmp_path / "deep" / "v.safetensors"
    with optimizer_panel(lm, prompt="the fox", promote=" dog", suppress=[" sun"], layer=1, norm=4, steps=8, path=where, seed=5) as panel:
        panel.save()
        assert "press Optimise first" in panel.alert.value
        panel.optimise()
        assert panel.wait()
        same = optimize(lm, Example("the fox", promote=" dog", suppress=" sun"), 1, max_norm=4, steps=8, seed=5, progress=False)
        assert torch.equal(panel.fit.losses, same.losses) and "<img alt=" in panel.plot.value
        panel.slider.sliders[0].value = 0.5
        panel.save()
        saved = load_steering(where, lm)
        assert torch.equal(saved.vector, same.steering.vector) and saved.strength == 0.5
        assert 'data-state="saved"' in panel.status.value
        panel.slider.sliders[0].value = 0
        panel.save()
        assert "strength is 0" in panel.alert.value
        panel.path.value, panel.slider.sliders[0].value = str(tmp_path), 1.0
        panel.save()
        assert "Error" in panel.alert.value and panel.error


def test_the_form_offers_half_the_streams_norm_until_one_is_typed():
    lm = tiny_lm()
    half = lambda layer: pytest.approx(lm.stream_norm(layer) / 2, rel=0.01)
    with optimizer_panel(lm, prompt="the fox", promote=" dog", layer=1) as panel:
        assert panel.wait() and panel.norm.value == half(1) and "dose 0.5" in words(panel.dose)
        panel.layer.value = 3
        assert panel.wait() and panel.norm.value == half(3) != half(1)
        panel.norm.value = 2.0
        panel.layer.value = 1
        assert panel.wait() and panel.norm.value == 2.0
        assert words(panel.dose).startswith(f"norm 2: dose {2 / lm.stream_norm(1):.2g}")


def test_stop_keeps_the_best_so_far():
    lm = endless_lm()
    gate = Gate(lm)
    with optimizer_panel(lm, prompt="the fox", promote=" dog", layer=1, steps=10_000) as panel:
        panel.optimise()
        while 'data-state="running"' not in panel.status.value or len(gate.passes) < 30:
            time.sleep(0.005)
        panel.stop()
        assert panel.wait(30)
        fit = panel.fit
        assert fit.stopped == "you" and 0 < fit.steps < 10_000 and 'data-state="stopped"' in panel.status.value
        assert fit.loss == fit.losses.sum(-1).min() and panel.slider.error is None
        assert torch.equal(panel.slider.dials[0].steering[0].vector, fit.steering.vector)


def test_an_error_of_the_panel_is_shown_and_can_be_mended():
    lm = tiny_lm()
    with optimizer_panel(lm, prompt="", promote=" dog", layer=1, steps=3) as panel:
        for prompt, promote, message in [(" ", " dog", "prompt is empty"), ("the fox", "", "at least one completion")]:
            panel.prompt.value, panel.promote.value = prompt, promote
            panel.optimise()
            panel.wait()
            assert message in panel.alert.value and 'data-state="error"' in panel.status.value and panel.fit is None
        panel.promote.value = " dog\n\n cat"
        panel.optimise()
        panel.wait()
        assert panel.alert.value == "" and len(panel.fit.labels) == 2
        first = panel.slider
        panel.optimise()
        panel.wait()
        assert first.worker is None and panel.slider is not first


# The static figure


class Tags(HTMLParser):
    "Checks that tags are balanced, and keeps them."

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_static_figure_is_whole_escaped_and_alone(tmp_path):
    lm, prompts = tiny_lm(), ["</script><script>alert('x')</script>", "the \"fox\" & <b>dog</b>"]
    vectors = {"<i>a</i>": random_vector(1), "b": random_vector(2, seed=1)}
    options = dict(strengths=(1, 0, -0.5), max_new_tokens=6, calibrated={"b": 0.3})
    page = steering_figure(lm, vectors, prompts, path=tmp_path / "a" / "page.html", **options)
    assert not re.search(r"https?:|//\w|url\(|@import|\bsrc\b|\bhref\b|\son\w+=", page)
    assert page.count("<script>") == 1 and "&lt;script&gt;alert" in page and "<i>a" not in page
    for text in (page, (tmp_path / "a" / "page.html").read_text(encoding="utf-8")):
        tags = Tags()
        tags.feed(text)
        assert tags.open == [] and not any("id" in attributes for _, attributes in tags.seen)
    assert text.startswith("<!doctype html>") and page in text and page._repr_html_() == page
    sections = {(a["data-prompt"], a["data-at"]) for _, a in tags.seen if a.get("class") == "oneshot-at"}
    assert sections == {(str(p), f"{a} {b}") for p in (0, 1) for a in ("-0.5", "0", "1") for b in ("-0.5", "0", "1")}
    assert "calibrated 0.3" in page and page.count('type="range"') == 2 and repr(page).startswith("StaticFigure(18 steered texts")


def test_the_static_figure_shows_what_the_model_says():
    lm, vector = tiny_lm(), random_vector()
    page = steering_figure(lm, vector, "the fox", strengths=(-1, 2), max_new_tokens=6, score=len)
    shown = dict(re.findall(r'data-at="(\S+)" data-prompt="0">.*?</b>(.*?)<div><small>(?:.*?)</small>', page))
    for strength in (-1, 2):
        with lm.steer(strength * vector):
            said = lm.generate("the fox", max_new_tokens=6)
        parser = HTMLParser()
        heard = []
        parser.handle_data = heard.append
        parser.feed(shown[f"{strength:g}"])
        parser.close()
        assert "".join(heard) == said
        assert f"score {len(said)}, KL" in page


# The page


def test_the_vector_that_ships_is_the_one_of_the_language_demonstration():
    vector = demo_vector()
    (example,), settings = vector.about["examples"], vector.about["settings"]
    assert (example["prompt"], example["promote"], example["suppress"]) == (TEXT_DEMO.prompt, [*TEXT_DEMO.promote], [*TEXT_DEMO.suppress])
    assert vector.about["model"].lower() == TEXT_DEMO.model and vector.d_model == vector.about["d_model"]
    assert vector.layers == (TEXT_DEMO.layer,) and vector.strength == TEXT_DEMO.strength
    assert (settings["steps"], settings["lr"]) == (TEXT_DEMO.steps, TEXT_DEMO.lr)


def test_the_page_says_what_it_shows():
    introduction = lambda **arguments: page_notebook(**arguments)["cells"][0]["source"]
    assert "Spanish" in introduction() and "Spanish" not in introduction(vectors=["a.safetensors"]) + introduction(model="b")
    assert "//" not in introduction().replace("/*", "").replace("*/", "")


# Without ipywidgets

WITHOUT = """
import sys
sys.modules["ipywidgets"] = None
from oneshot_steering.all import *
import torch
lm, vector = tiny_lm(), Steering(torch.ones(32), 1)
assert "oneshot-at" in steering_figure(lm, vector, "the fox", strengths=[1], max_new_tokens=2)
for make in (lambda: steering_slider(lm, vector, "the fox"), lambda: optimizer_panel(lm)):
    try: make()
    except ImportError as error: assert "pip install 'oneshot-steering[widgets]'" in str(error)
    else: raise SystemExit("no error")
"""


def test_the_module_is_fine_without_ipywidgets():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
