"""The site, as `make docs` builds it: whole, ordered, with every link leading somewhere and nothing from another host."""

import importlib
import inspect
import json
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from notebooks import NBS, ROOT, notebooks

pytest.importorskip("mkdocs", reason="the extra [docs] is not installed: `make docs` installs it")
LOADED = {("img", "src"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("link", "href"), ("image", "href")}


class Page(HTMLParser):
    "What a page refers to, and what can be referred to in it."

    def __init__(self, path):
        super().__init__()
        self.references, self.loads, self.anchors, self.pictures, self.headings, self.language = [], [], set(), [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        for name in ("href", "src"):
            if attrs.get(name) and not attrs[name].startswith(("data:", "mailto:")):
                loaded = (tag, name) in LOADED and attrs.get("rel") != "canonical"
                (self.loads if loaded else self.references).append(attrs[name])
        if tag == "img":
            self.pictures.append(attrs)
        if tag == "html":
            self.language = attrs.get("lang")
        if tag in {"h1", "h2", "h3", "h4"}:
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def is_local(url):
    return not urlsplit(url).netloc and not urlsplit(url).scheme


def test_every_notebook_has_its_page_in_the_order_of_the_book(site, pages):
    expected = [path.relative_to(NBS).with_suffix(".html").as_posix() for path in notebooks()]
    assert set(expected) <= pages.keys()
    tabs = [page for page in pages["index.html"].references if page in expected]
    first = dict.fromkeys(page for page in tabs if page in {"index.html", "00_lm.html", "benchmarks/evaluate.html"})
    assert list(first) == ["index.html", "00_lm.html", "benchmarks/evaluate.html"]


def test_every_link_leads_somewhere(site, pages):
    "To a file, and from where the page lies: the site works in any folder of any host, and without a host."
    broken = []
    for name, page in pages.items():
        for url in filter(is_local, page.references + page.loads):
            target, anchor = urlsplit(url).path, unquote(urlsplit(url).fragment)
            path = ((site / name).parent / unquote(target)).resolve() if target else site / name
            other = pages.get(path.relative_to(site).as_posix()) if path.is_relative_to(site) else None
            if not path.is_file() or (anchor and other and anchor not in other.anchors):
                broken.append((name, url))
    assert broken == []


def test_nothing_is_loaded_from_another_host(pages):
    assert [(name, url) for name, page in pages.items() for url in page.loads if not is_local(url)] == []


def test_pages_can_be_read_without_seeing_them(pages):
    for name, page in pages.items():
        assert page.language == "en", name
        assert page.headings[:1] == [1] and page.headings.count(1) == 1, (name, page.headings)
        assert [picture.get("src", "")[:40] for picture in page.pictures if not picture.get("alt")] == [], name


def test_every_public_name_is_documented(pages):
    anchors = set().union(*(page.anchors for page in pages.values()))
    for name in [path.stem for path in (ROOT / "oneshot_steering").glob("[a-z]*.py") if path.stem != "all"]:
        module = importlib.import_module(f"oneshot_steering.{name}")
        public = [item for item in module.__all__ if getattr(getattr(module, item), "__module__", "") == module.__name__]
        callables = [item for item in public if inspect.isclass(getattr(module, item)) or inspect.isfunction(getattr(module, item))]
        assert [item for item in callables if item not in anchors] == [], name


def test_hidden_cells_are_not_shown(site):
    text = (site / "00_lm.html").read_text(encoding="utf-8")
    assert "default_exp" not in text and "#|" not in text
    assert "from __future__ import annotations" not in text


def test_equations_are_mathml_with_a_font_of_the_site(site):
    text = (site / "02_objective.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20 and "arithmatex" not in text
    assert (site / "assets" / "math.woff").stat().st_size > 10_000


def test_search_knows_names_and_prose(site):
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any("load_lm" in entry["location"] for entry in found)
    assert any("residual stream" in entry["text"] for entry in found)
