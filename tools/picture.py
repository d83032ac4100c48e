"""Remakes nbs/images/app.png, the picture of `oneshot-steering app` in the README: `python tools/picture.py`.
Needs a Chromium, as tests/test_browser.py does, and the model of the page, which is fetched on first use."""

import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parent.parent / "nbs" / "images" / "app.png"
FLAGS = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-background-networking")]
MINUTES = 5 * 60_000  # milliseconds, at most, for each step
WIDTH, DENSITY = 900, 2  # of the page, about that of a README; pixels per unit of it, so that text is crisp


def served(folder):
    "The page's process and address, once it answers."
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("oneshot-steering"), "app", "--port", str(port), "--no-browser"]
    server, address = subprocess.Popen(command, cwd=folder), f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/voila/static/voila.js", timeout=5).close()
            return server, address
        except OSError:
            time.sleep(0.2)
    sys.exit("the page could not be served")


def pictured(address):
    "The page from its title to the legend of the tints, as it opens."
    chromium = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport=dict(width=WIDTH, height=1000), device_scale_factor=DENSITY, color_scheme="light")
        page.set_default_timeout(MINUTES)
        page.goto(address)
        page.wait_for_selector(".oneshot-slider .oneshot-status [data-state=done]")
        page.wait_for_timeout(1000)
        legend = page.locator(".oneshot-slider .oneshot-legend").first.bounding_box()
        png = page.screenshot(clip=dict(x=0, y=0, width=WIDTH, height=legend["y"] + legend["height"] + 12))
        browser.close()
    return png


def main():
    with tempfile.TemporaryDirectory() as folder:
        server, address = served(folder)
        try:
            png = pictured(address)
        finally:
            server.terminate()
            server.wait(30)
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    PICTURE.parent.mkdir(exist_ok=True)
    image.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {image.width} x {image.height} pixels, {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
