"""The sliders in a real browser: in JupyterLab, in the dashboard and in the site. Chromium is driven by Playwright; where there is none,
and no way to install it, these tests are skipped. Each leaves a screenshot in tests/artifacts: look at them."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from oneshot_steering.figure import steering_figure
from oneshot_steering.models import tiny_lm
from oneshot_steering.steering import Steering

ARTIFACTS = Path(__file__).parent / "artifacts"
TUTORIALS = Path(__file__).parent.parent / "nbs" / "tutorials"
FLAGS = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-background-networking")]
LAB = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.port_retries=0",
       "--LabApp.expose_app_in_browser=True"]  # fmt: skip
WAIT = 60_000  # milliseconds; a busy machine is slow
expect.set_options(timeout=WAIT)

SLIDER = """
import torch
from oneshot_steering.all import *

lm = tiny_lm()
torch.manual_seed(0)
hot, cold = (Steering(3 * torch.randn(lm.d_model), 2) for _ in range(2))
app = steering_slider(lm, dict(hot=hot, cold=cold), ["The quick brown", "Once upon a time"], calibrated=dict(hot=0.5), max_new_tokens=300)
app
"""
PANEL = """
panel = optimizer_panel(lm, prompt="The quick brown", promote=" fox", suppress=" dog", layer=1, steps=2000, path="found.safetensors")
panel
"""
SMALL = """
# Put in by the tests: the whole quickstart on few scenarios and two norms.
import oneshot_steering.organisms.alignment_faker as faker

few = lambda split, n, *args, **kwargs: some(split, min(n, 5), *args, **kwargs)
some, faker.make_scenarios, make_scenarios = make_scenarios, few, few
norms, settings = (norms[0], best), settings | dict(steps=12)
"""


def chromium():
    "A Chromium on this machine; Debian's is installed if this is Debian and the user may."
    names = ["chromium", "chromium-browser", "google-chrome"]
    if not any(map(shutil.which, names)) and shutil.which("apt-get") and os.geteuid() == 0:
        for command in ["apt-get update", "apt-get install --yes --no-install-recommends chromium"]:
            subprocess.run(command.split(), env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True)
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")  # Playwright's event loop must not outlive these tests
def browser():
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium here, and it can be installed only as root where apt-get is")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def watched(browser, **options):
    "A page that notes the addresses of other hosts that it asks for."
    page = browser.new_context(viewport=dict(width=1200, height=1000), **options).new_page()
    page.set_default_timeout(WAIT)
    page.elsewhere, here = [], ("http://127.0.0.1:", "file:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(here) else page.elsewhere.append(request.url))
    return page


@pytest.fixture(autouse=True)
def screenshot(request):
    "A picture of the page at the end of a test, passed or failed."
    yield
    for page in [value for name, value in request.node.funcargs.items() if name in {"lab", "dashboard", "still"}]:
        picture(page, request.node.name)


def picture(page, name):
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{re.sub(r'[^a-z0-9]+', '_', name.lower().removeprefix('test_')).strip('_')}.png")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def served(command, address, folder, seconds=90):
    "Run a server until the caller is done with it."
    log = (folder / "server.log").open("w")
    environment = os.environ | {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        for _ in range(seconds * 5):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


# --- what every slider must do, wherever it is


def run_of(page):
    return int(page.locator(".oneshot-slider .oneshot-status [data-run]").first.get_attribute("data-run"))


def steered(page):
    return page.locator(".oneshot-slider .oneshot-steered .oneshot-text").first


def settled(page):
    "The steered text, once it is written to its end."
    expect(page.locator(".oneshot-slider .oneshot-status [data-state]").first).to_have_attribute("data-state", re.compile("done|error"))
    return steered(page).inner_text()


def changed(page, text):
    "The steered text, written to its end, once it is another than `text`: strengths on the way may have the same text as the first."
    page.wait_for_function("""text => document.querySelector('.oneshot-slider .oneshot-status [data-state]').dataset.state === 'done'
        && document.querySelector('.oneshot-slider .oneshot-steered .oneshot-text').innerText !== text""", arg=text)
    return steered(page).inner_text()


def handle(page, number=0):
    return page.locator(".oneshot-slider .oneshot-strength .noUi-handle").nth(number)


def drag(page, by=60, number=0):
    "Take the handle with the mouse and move it sideways."
    box = handle(page, number).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(1, 7):
        page.mouse.move(x + by * step / 6, y)
    page.mouse.up()


def strength(page, number=0):
    return float(handle(page, number).get_attribute("aria-valuetext") or handle(page, number).get_attribute("aria-valuenow"))


def check_mouse(page):
    before, text = strength(page), settled(page)
    drag(page, by=-60)
    assert changed(page, text) != text and strength(page) < before


def check_keyboard(page):
    before, text, run = strength(page), settled(page), run_of(page)
    handle(page).focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("run => +document.querySelector('.oneshot-slider .oneshot-status [data-run]').dataset.run > run", arg=run)
    assert changed(page, text) != text and strength(page) > before


def check_zero(page):
    "At strength zero the steered text is the unsteered one."
    handle(page).focus()
    while (now := strength(page)) != 0:
        page.keyboard.press("ArrowLeft" if now > 0 else "ArrowRight")
    page.wait_for_function("""() => {
        const text = kind => document.querySelector(`.oneshot-slider .oneshot-${kind} .oneshot-text`).innerText.replace(kind, "");
        return text("steered") === text("unsteered") }""")


def check_mid_stream(page):
    "A newer value ends the text that is being written: the text goes on under the newer run only."
    handle(page).focus()
    began = """run => +document.querySelector('.oneshot-slider .oneshot-steered .oneshot-text')?.dataset.run > run
        && document.querySelector('.oneshot-slider .oneshot-status [data-state]').dataset.state"""
    for _ in range(5):  # a text may be there at once, when the page was busy while it was written
        settled(page)
        first = run_of(page)
        page.keyboard.press("ArrowLeft")
        running = page.wait_for_function(began, arg=first).json_value()  # the state at that very moment
        if running == "running":
            break
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert running == "running", "the text was written to its end before it could be changed"
    settled(page)
    assert int(steered(page).get_attribute("data-run")) == run_of(page) > first + 1


def set_length(page, tokens):
    page.locator(".oneshot-length input").fill(str(tokens))
    page.keyboard.press("Enter")


def check_prompt(page):
    text = settled(page)
    page.locator(".oneshot-prompt textarea").first.fill("Dogs and cats")
    expect(steered(page)).not_to_have_text(text)
    text = settled(page)
    page.locator(".oneshot-picker select").first.select_option(index=1)
    expect(page.locator(".oneshot-prompt textarea").first).to_have_value("Once upon a time")
    expect(steered(page)).not_to_have_text(text)


def check_error(page):
    page.locator(".oneshot-prompt textarea").first.fill("")
    error = page.locator(".oneshot-slider .oneshot-error [role=alert]")
    expect(error).to_contain_text(re.compile("prompt", re.IGNORECASE))
    page.locator(".oneshot-prompt textarea").first.fill("The quick brown")
    expect(error).to_have_count(0)
    assert settled(page)


def serious(page, within=None):
    "What axe-core finds seriously wrong, in our own elements or in the whole page: (rule, help, elements)."
    found = Axe().run(page, context={"include": [[within]]} if within else None).response["violations"]
    return [(v["id"], v["help"], [n["html"][:150] for n in v["nodes"]][:5]) for v in found if v["impact"] in {"serious", "critical"}]


# --- JupyterLab


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jupyter")
    cell = lambda source: nbformat.v4.new_code_cell(source.strip())
    slider = nbformat.v4.new_notebook(cells=[cell(SLIDER), cell(PANEL)])
    slider.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(slider, folder / "slider.ipynb")
    shutil.copy(TUTORIALS / "slider.ipynb", folder / "tutorial.ipynb")
    quickstart = nbformat.read(TUTORIALS / "quickstart.ipynb", as_version=4)
    checked = next(i for i, one in enumerate(quickstart.cells) if "FLIP_DEMO" in one.source)  # that the settings are the demonstration's
    quickstart.cells.insert(checked + 1, cell(SMALL))
    nbformat.write(quickstart, folder / "quickstart.ipynb")
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    port = free_port()
    command = [sys.executable, "-m", "jupyter", "lab", *LAB, f"--ServerApp.port={port}"]
    yield from served(command, f"http://127.0.0.1:{port}/api/status", folder)


def opened(browser, jupyter, notebook):
    page = watched(browser)
    page.goto(jupyter.replace("/api/status", f"/doc/tree/{notebook}.ipynb?reset"))
    page.get_by_text(re.compile("Python 3.*Idle")).first.wait_for()  # before that, a command to run is lost
    return page


def run_all(page):
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true }) }")


@pytest.fixture(scope="module")
def lab(browser, jupyter):
    page = opened(browser, jupyter, "slider")
    run_all(page)
    page.wait_for_selector(".oneshot-slider .oneshot-steered .oneshot-text", timeout=3 * WAIT)  # the kernel imports torch first
    page.wait_for_selector(".oneshot-panel .oneshot-optimise")
    return page


def test_lab_shows_both_texts(lab):
    assert settled(lab) and lab.locator(".oneshot-unsteered .oneshot-text").first.inner_text() != steered(lab).inner_text()
    assert lab.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    assert lab.locator(".oneshot-steered .oneshot-text span[title]").count() > 0
    assert strength(lab) == 0.5


def test_lab_drag_with_the_mouse(lab):
    check_mouse(lab)


def test_lab_drag_with_the_keyboard(lab):
    check_keyboard(lab)


def test_lab_second_vector_composes(lab):
    text = settled(lab)
    drag(lab, by=40, number=1)
    expect(steered(lab)).not_to_have_text(text)
    settled(lab)


def test_lab_marks_lie_under_the_handle(lab):
    def middle(place):
        box = place.bounding_box()
        return box["x"] + box["width"] / 2

    marks = lab.locator(".oneshot-marks").first.locator("i:not(.mark)")
    low, high = (float(mark.inner_text()) for mark in (marks.first, marks.last))
    share = (strength(lab) - low) / (high - low)
    expected = middle(marks.first) + share * (middle(marks.last) - middle(marks.first))
    assert middle(handle(lab)) == pytest.approx(expected, abs=4), "the marks do not lie under the values that they name"


def test_lab_change_in_mid_stream(lab):
    check_mid_stream(lab)


def test_lab_type_a_prompt_and_pick_one(lab):
    check_prompt(lab)


def test_lab_error_and_recovery(lab):
    check_error(lab)
    assert lab.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0


def test_lab_optimise_stop_and_save(lab):
    state = lab.locator(".oneshot-fit-status [data-state]").first
    lab.locator(".oneshot-promote textarea").first.fill("")
    lab.locator(".oneshot-suppress textarea").first.fill("")
    lab.locator(".oneshot-optimise").click()
    expect(lab.locator(".oneshot-fit-error [role=alert]")).to_have_count(1)
    lab.locator(".oneshot-promote textarea").first.fill(" fox")
    lab.locator(".oneshot-optimise").click()
    expect(state).to_have_attribute("data-state", "running")
    expect(lab.locator(".oneshot-fit-error [role=alert]")).to_have_count(0)
    lab.wait_for_selector(".oneshot-fit-plot img")
    lab.locator(".oneshot-stop").click()
    expect(state).to_have_attribute("data-state", "stopped")
    lab.wait_for_selector(".oneshot-result .oneshot-steered .oneshot-text")
    lab.locator(".oneshot-save").click()
    expect(state).to_have_attribute("data-state", "saved")


def test_lab_is_accessible(lab):
    assert serious(lab, ".oneshot-slider") == []
    assert serious(lab, ".oneshot-panel") == []


def test_lab_reload(lab):
    "The kernel goes on; after a reload the saved notebook shows the same sliders, and they work."
    lab.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab.wait_for_timeout(1500)
    lab.reload()
    lab.wait_for_selector(".oneshot-slider .oneshot-strength .noUi-handle")
    check_keyboard(lab)
    assert lab.elsewhere == []


def ran(browser, jupyter, notebook, minutes):
    "A notebook as a person meets it: opened, everything run, nothing on stderr."
    page = opened(browser, jupyter, notebook)
    run_all(page)
    page.wait_for_function("window.ran", timeout=minutes * WAIT)
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    return page


def test_lab_tutorial(browser, jupyter, record_property):
    "The tutorial of the sliders: take the handle; how long is it from a key to the first token of the new text?"
    page = ran(browser, jupyter, "tutorial", minutes=5)
    check_keyboard(page)
    picture(page, "tutorial")
    watch = """run => { window.answered = new Promise((done, failed) => {
        const began = performance.now(), look = () => {
            const pane = document.querySelector('.oneshot-steered .oneshot-text');
            if (+pane?.dataset.run > run && +pane.dataset.tokens > 0) done(performance.now() - began);
            else if (performance.now() - began > 60000) failed('no token in a minute');
            else requestAnimationFrame(look) };
        look() }) }"""
    times = []
    for _ in range(3):
        page.evaluate(watch, run_of(page))
        page.keyboard.press("ArrowLeft")
        times.append(page.evaluate("window.answered") / 1000)
        settled(page)
    (ARTIFACTS / "latency.txt").write_text("".join(f"{seconds:.2f} s from key to first token\n" for seconds in times))
    record_property("seconds to the first token", times)
    page.context.close()


def test_lab_quickstart(browser, jupyter):
    "The quickstart, with fewer scenarios: its tables and pictures come out."
    page = ran(browser, jupyter, "quickstart", minutes=10)
    cells = nbformat.read(TUTORIALS / "quickstart.ipynb", as_version=4).cells
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    expect(page.locator(".jp-OutputArea-output img")).to_have_count(pictures)
    picture(page, "quickstart")
    page.context.close()


# --- the dashboard


def forget(page):
    "Requests that the page's own policy stops never leave the browser."
    page.on("requestfailed", lambda request: page.elsewhere.remove(request.url) if request.failure == "csp" else None)


STATES = """
window.states = new Set();
new MutationObserver(() => {
    for (const status of document.querySelectorAll('.oneshot-slider .oneshot-status [data-state]')) window.states.add(status.dataset.state);
}).observe(document, {childList: true, subtree: true, attributes: true});
"""


def logged(log, text, seconds=90):
    "Wait until a server has said something."
    for _ in range(seconds * 5):
        if text in log.read_text():
            return
        time.sleep(0.2)
    raise AssertionError(f"no {text!r} in {seconds} s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def dashboard(browser, tmp_path_factory):
    folder, lm = tmp_path_factory.mktemp("dashboard"), tiny_lm(max_position_embeddings=2048)
    for part in (lm.model, lm.tok):
        part.save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    Steering(3 * torch.randn(lm.d_model), 2).save(folder / "hot.safetensors")
    port = free_port()
    command = [Path(sys.executable).with_name("oneshot-steering"), "app", "--model", "tiny", "--vector", "hot.safetensors"]
    command += ["--prompt", "The quick brown", "--prompt", "Once upon a time"]
    for address in served([*command, "--port", str(port), "--no-browser"], f"http://127.0.0.1:{port}/voila/static/voila.js", folder):
        page = watched(browser)
        forget(page)
        page.add_init_script(STATES)
        page.log = folder / "server.log"
        logged(page.log, "shows the page")
        page.goto(address.partition("/voila")[0])
        page.wait_for_selector(".oneshot-steered .oneshot-text")
        yield page


def test_dashboard_opens_on_steered_text(dashboard):
    "Nobody clicks: the first tab has the vector at strength 1, and its text was written before the page was opened."
    expect(dashboard.locator(".oneshot-page .lm-TabBar-tab")).to_have_text(["Try a vector", "Make your own"])
    expect(dashboard.locator(".oneshot-page .lm-mod-current")).to_have_text("Try a vector")
    text, plain = settled(dashboard), dashboard.locator(".oneshot-unsteered .oneshot-text").first
    assert dashboard.evaluate("[...window.states]") == ["done"]
    assert dashboard.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    assert strength(dashboard) == 1 and int(steered(dashboard).get_attribute("data-tokens")) > 0
    assert text.removeprefix("steered") != plain.inner_text().removeprefix("unsteered")


def test_dashboard(dashboard):
    assert dashboard.locator("h1").inner_text().startswith("Drag a strength")
    check_mouse(dashboard)
    check_keyboard(dashboard)
    check_zero(dashboard)
    assert dashboard.elsewhere == []


def test_dashboard_change_in_mid_stream(dashboard):
    set_length(dashboard, 1000)  # long enough to be changed on the way
    check_mid_stream(dashboard)
    set_length(dashboard, 40)


def test_dashboard_type_a_prompt_and_pick_one(dashboard):
    check_prompt(dashboard)


def test_dashboard_error_and_recovery(dashboard):
    check_error(dashboard)


def test_dashboard_is_accessible(dashboard):
    assert serious(dashboard, ".oneshot-slider") == []


def test_dashboard_reload(dashboard):
    "A second page has a kernel of its own, which is not heated: only the first one is."
    dashboard.reload()
    dashboard.wait_for_selector(".oneshot-steered .oneshot-text")
    check_mouse(dashboard)
    assert dashboard.log.read_text().count("Using pre-heated kernel") == 1


def test_dashboard_opens_on_an_error_too(browser, tmp_path, monkeypatch):
    "Where the page cannot be made, it is opened all the same, and says why."
    monkeypatch.setenv("BROWSER", f"touch {tmp_path}/opened %s")
    (tmp_path / "empty").mkdir()
    port = free_port()
    command = [Path(sys.executable).with_name("oneshot-steering"), "app", "--model", "empty", "--port", str(port)]
    for address in served(command, f"http://127.0.0.1:{port}/voila/static/voila.js", tmp_path):
        logged(tmp_path / "server.log", "shows the page", seconds=60)  # well before the two minutes
        page = watched(browser)
        page.goto(address.partition("/voila")[0])
        expect(page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')).to_contain_text("There is no config.json")
        assert (tmp_path / "opened").exists()
        page.context.close()


# --- the site


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module", params=["light", "dark"])
def still(request, browser):
    return watched(browser, color_scheme=request.param)


SAMPLE = ["index.html", "02_objective.html", "names.html", "studies/selection.html"]


@pytest.mark.parametrize("name", SAMPLE)
def test_site_page(still, address, name):
    "Readable in light and dark, nothing asked of another host, no error in the console."
    problems = []
    still.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    still.goto(f"{address}/{name}")
    still.wait_for_load_state("networkidle")
    assert serious(still) == []
    assert problems == [] and still.elsewhere == []


@pytest.mark.parametrize("where", ["from a server", "as files"])
def test_site_search(still, address, site, where):
    still.goto(f"{address if where == 'from a server' else site.as_uri()}/studies/selection.html")
    still.locator("input[name=query]").press_sequentially("coldness")
    found = still.locator(".md-search-result__link").first
    expect(found).to_be_visible()
    found.click()
    still.wait_for_url(re.compile(r"\.html\?h=coldness"))
    assert still.elsewhere == []


def check_figure(page):
    "A slider without a kernel: another strength and another prompt show another text, and nothing is asked of another host."
    figure, shown = page.locator(".oneshot-figure").first, page.locator(".oneshot-figure").first.locator(".oneshot-at:visible")
    expect(shown).to_have_count(1)
    figure.locator("input[type=range]").first.focus()
    page.keyboard.press("Home")
    text = shown.inner_text()
    page.keyboard.press("End")
    expect(shown).to_have_count(1)
    assert shown.inner_text() != text
    assert serious(page, ".oneshot-figure") == []
    assert page.elsewhere == []


def test_site_slider(still, address, site):
    pages = [path for path in site.rglob("*.html") if '<div class="oneshot-figure' in path.read_text(encoding="utf-8")]
    assert pages, "no notebook shows a steering_figure"
    for path in pages:
        still.goto(f"{address}/{path.relative_to(site).as_posix()}")
        check_figure(still)


def test_file_with_a_slider(still, tmp_path):
    "The page that steering_figure writes, opened as a file, as somebody would who got it by mail."
    lm = tiny_lm()
    torch.manual_seed(0)
    hot = Steering(3 * torch.randn(lm.d_model), 2)
    steering_figure(lm, {"hot": hot}, ["The quick brown", "Once"], path=tmp_path / "figure.html", max_new_tokens=12)
    still.goto(f"file://{tmp_path}/figure.html")
    check_figure(still)
    picker, shown = still.locator(".oneshot-figure select"), still.locator(".oneshot-figure .oneshot-at:visible")
    text = shown.inner_text()
    picker.select_option("1")
    assert shown.inner_text() != text
    assert serious(still) == []
