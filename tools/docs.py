"""Hooks of mkdocs (named in mkdocs.yml): the notebooks become pages, as nbdev shows them. Hidden cells go; an exported cell is
shown as the documentation of what it defines, its source folded; outputs stay as they were saved; equations become MathML."""

import ast
import html
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import nbformat
import ziamath
from fastcore.docments import sig2str
from fontTools import subset
from math_core import LatexToMathML
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url
from nbconvert.filters import strip_ansi
from notebooks import NBS, ROOT, directives, notebooks

# The book: a notebook belongs to the first section with a pattern that it matches.
SECTIONS = {
    "Start": ["index.ipynb", "tutorials/quickstart.ipynb"],
    "Guide": [
        f"tutorials/{name}.ipynb"
        for name in ("real_model", "language_switch", "choosing_strength", "slider", "your_own_model", "*")
    ],
    "Studies": ["studies/*.ipynb", "studies/real/*.ipynb"],
    "Reference": ["[0-9]*.ipynb", "supported_models.md"],
    "Benchmarks": ["benchmarks/*.ipynb", "benchmarks/gpu_*.md"],
}
DOCUMENTS = ["CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]  # of the project, which notebooks link to
HIDDEN = {"hide", "include: false", "exporti"}
FONT = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
to_mathml = LatexToMathML(annotation=True)
displays, glyphs = [], set()  # the HTML of every output; the characters of every equation


@cache
def read(path):
    return nbformat.read(path, as_version=4)


def home(path):
    return path.relative_to(NBS).with_suffix(".md").as_posix()


def module(path):
    "The module that a notebook exports, or None."
    names = [d.split()[1] for cell in read(path).cells for d in directives(cell) if d.startswith("default_exp")]
    return importlib.import_module(f"oneshot_steering.{names[0]}") if names else None


def defined(cell):
    "Public functions, classes and patched methods that an exported cell defines: `LM`, `LM.generate`."
    if "export" not in directives(cell) or directives(cell) & HIDDEN:
        return
    for node in ast.parse(cell.source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            patched = any(ast.unparse(d).startswith("patch") for d in node.decorator_list)
            owner = ast.unparse(node.args.args[0].annotation) if patched else ""
            if not owner.startswith("_"):
                yield f"{owner}.{node.name}".lstrip(".")


@cache
def index():
    "Which notebook documents a name."
    return {name: path for path in notebooks() for cell in read(path).cells for name in defined(cell)}


def documented(name):
    "The object of that name."
    value = module(index()[name])
    for part in name.split("."):
        value = getattr(value, part)
    value = value.fget if isinstance(value, property) else value
    owner = getattr(value, "__delwrap__", value).__qualname__.removesuffix(".__init__")
    if hasattr(value, "__delwrap__") and owner in value.__globals__:
        value.__delwrap__ = value.__globals__[owner]  # the comments of a dataclass are at its fields, not in its generated __init__
    return value


def show_doc(name):
    "Signature with docments, and docstring: what nbdev's `show_doc` shows."
    value = documented(name)
    signature = str(sig2str(value))
    if isinstance(value, type):
        signature = signature.replace("def ", "class ", 1).replace(")->None:", "):")
    listed = "\n".join(methods(name, value)) if isinstance(value, type) else ""
    return "\n\n".join([f"### `{name}` {{#{name}}}", fenced(signature), inspect.getdoc(value) or "", listed])


def methods(name, cls):
    "What a class's own body defines; patched methods have entries of their own."
    for method, function in vars(cls).items():
        function = getattr(function, "fget", function)
        if method[0] != "_" and f"{name}.{method}" not in index() and inspect.isfunction(function) and function.__doc__:
            yield f"- `.{method}`: {inspect.getdoc(function)}"


def fenced(code):
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{fence}python\n{code.strip()}\n{fence}"


def show_output(output, alt):
    "An output as HTML: the richest form that needs no kernel."
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "application/vnd.jupyter.widget-view+json" in data:
        return "<p><em>A widget: open the notebook in Jupyter to use it.</em></p>"
    if "image/png" in data:
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data["image/png"].strip()}">'
    plain = html.escape(strip_ansi(data.get("text/plain", "")).strip())
    return data.get("text/html", f"<pre><code>{plain}</code></pre>").replace(' border="1"', "")


def linked(text):
    "Markdown whose links to notebooks and documents lead to their pages."
    text = re.sub(r"(\]\([\w./-]+)\.ipynb", r"\1.md", text)
    return re.sub(rf"\]\(\.\./((?:\.\./)*)({'|'.join(Path(name).stem for name in DOCUMENTS)})(?:\.md)?", r"](\1\2.md", text)


def show(cell, heading):
    "A cell as Markdown. Outputs are put in later, so that nothing in them is taken for Markdown."
    if cell.cell_type == "markdown":
        return linked(cell.source)
    flags = directives(cell)
    if flags & HIDDEN or any(flag.startswith("default_exp") for flag in flags):
        return ""
    code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    if "export" in flags:  # what defines no public name is only in the folded source
        folded = f'<details class="source" markdown="1">\n<summary>Source</summary>\n\n{fenced(code)}\n\n</details>'
        return "\n\n".join([*map(show_doc, defined(cell)), folded])
    alt = next((flag.partition(":")[2].strip() for flag in flags if flag.startswith("fig-alt:")), f"Figure of the section {heading}")
    shown = [] if "echo: false" in flags else [fenced(code)]
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}):  # prose that a cell wrote, from figures
            shown.append(linked(output.data["text/markdown"]))
            continue
        displays.append(show_output(output, alt))
        focus = ' tabindex="0"' if "<table" in displays[-1] else ""  # a wide table scrolls, with the keyboard too
        shown.append(f'<div class="output"{focus} id="output-{len(displays) - 1}"></div>')
    return "\n\n".join(shown)


def show_notebook(path):
    parts, heading = [], ""
    for cell in read(path).cells:
        titles = re.findall(r"^#+ (.+)", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
        heading = titles[-1] if titles else heading
        parts.append(show(cell, heading))
    return "\n\n".join(parts)


def show_document(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return text if name.endswith(".md") else f"# {name.capitalize()}\n\n```text\n{text}\n```"


def show_names():
    "The index at the end of the reference: every public name and what it does."
    lines = ["# All names"]
    for path in dict.fromkeys(index().values()):
        lines += [f"\n## [{module(path).__name__}]({home(path)})\n", "| name | |", "|---|---|"]
        for name in (name for name, where in index().items() if where == path):
            summary = (documented(name).__doc__ or "").strip().partition("\n")[0]
            lines.append(f"| [`{name}`]({home(path)}#{name}) | {html.escape(summary, quote=False).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def show_notebooks(placed):
    "The list of all notebooks: title and purpose, as each of them says it."
    opening = "They are the source of everything. Newcomers begin with the quickstart; the reference is in reading order."
    lines = ["# All notebooks", "", opening]
    for section in SECTIONS:
        lines += [f"\n## {section}\n", "| notebook | what it explains |", "|---|---|"]
        for path in [path for path in notebooks() if placed.get(home(path)) == section and path.stem != "index"]:
            opening = read(path).cells[0].source
            title, purpose = re.search(r"^# (.+)", opening, re.MULTILINE), re.search(r"^> (.+)", opening, re.MULTILINE)
            purpose = linked(purpose[1]).replace("|", chr(92) + "|") if purpose else ""
            lines.append(f"| [{path.stem}]({home(path)}): {title[1]} | {purpose} |")
    return "\n".join(lines)


def on_files(files, config):
    "The notebooks' pages in the order of the book, in place of the notebooks."
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
    pages = {home(path): show_notebook(path) for path in notebooks()}
    pages |= {Path(name).with_suffix(".md").name: show_document(name) for name in DOCUMENTS} | {"names.md": show_names()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for name in ("docs.css", "iframe-worker.js"):
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "tools" / name)))
    placed = {}
    for section, patterns in SECTIONS.items():
        for path in [path for pattern in patterns for path in sorted(NBS.glob(pattern))]:
            placed.setdefault(home(path), section)
    placed["notebooks.md"] = "Start"
    pages["notebooks.md"] = show_notebooks(placed)
    files.append(File.generated(config, "notebooks.md", content=pages["notebooks.md"]))
    placed |= {"names.md": "Reference"} | {uri: "Project" for uri in pages if uri not in placed and uri != "names.md"}
    config.nav = [{name: [uri for uri, section in placed.items() if section == name]} for name in [*SECTIONS, "Project"]]
    return files


def on_page_content(content, page, **_):
    "Equations, links from names to their documentation, outputs."
    content = re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', equation, content, flags=re.DOTALL)

    def link(match):
        path = index().get(match["name"])
        url = path and get_relative_url(f"{Path(home(path)).with_suffix('.html')}#{match['name']}", page.url)
        return f'<a href="{url}">{match[0]}</a>' if path else match[0]

    content = re.sub(r"<(a|h\d|pre)\b.*?</\1>|<code>(?P<name>[\w.]+)(\(\))?</code>", link, content, flags=re.DOTALL)
    return re.sub(r'id="output-(\d+)">', lambda match: f">{displays[int(match[1])]}", content)


def on_post_page(output, **_):
    return output.replace('data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"')


def on_post_template(output, template_name, **_):
    "The page for what is not there: its links, from the root of a host, become relative, as the site may lie anywhere."
    return re.sub(r'((?:href|src|"base"|"search")(?:=|: )")/(?!/)', r"\1./", output) if template_name == "404.html" else output


def equation(match):
    text = to_mathml.convert_with_local_state(html.unescape(match[3]), displaystyle=match[2] == "[")
    glyphs.update(html.unescape(re.sub(r"<annotation.*?</annotation>|<[^>]+>", "", text)))
    return text


def on_post_build(config):
    "The font of the equations: the characters that they use, in every size that they need."
    options = subset.Options(flavor="woff", layout_features=["*"])
    font = subset.load_font(FONT, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(glyphs))
    subsetter.subset(font)
    subset.save_font(font, Path(config.site_dir) / "assets" / "math.woff", options)
