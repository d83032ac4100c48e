"""One sentence a line in the markdown of notebooks, so that a diff shows the sentence that changed: `python tools/prose.py [FILES]`."""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
# Inline code, mathematics, links and images are never cut; neither is a sentence after an abbreviation.
WHOLE = re.compile(r"``.+?``|`[^`]+`|\$\$.+?\$\$|\$[^$]+\$|!?\[[^\]]*\]\([^)]*\)")
ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "vs.", "al.", "etc.", "Fig.", "fig.", "Sec.", "Eq.", "No.", "approx.", "resp.", "Dr.", "Mr.", "St.")
END = re.compile(r"(?<=[.!?])([\"'”’)\]*_]*)\s+(?=[\"'“‘(\[*_`$]*[A-Z0-9\x00])")
# Lines that begin a block of their own; everything else continues the paragraph or list item above it.
BLOCK = re.compile(r"^(\s*)([-*+]|\d+[.)])\s+(?=\S)")
VERBATIM = re.compile(r"^\s*(#|>|\||<|!\[|---|:::|\$\$)")


def sentences(paragraph):
    "The sentences of a paragraph that is one line."
    kept = []

    def keep(match):
        kept.append(match[0])
        return f"\x00{len(kept) - 1}\x01"

    text = WHOLE.sub(keep, paragraph)
    parts, start = [], 0
    for match in END.finditer(text):
        before = text[start : match.end(1)]
        last_word = before.split()[-1] if before.split() else ""
        if last_word.lstrip("([*_\"'").endswith(ABBREVIATIONS) or re.fullmatch(r"\W*(\d+|[A-Z])\.", last_word):
            continue
        parts.append(before)
        start = match.end()
    parts.append(text[start:])
    return [re.sub("\x00(\\d+)\x01", lambda m: kept[int(m[1])], part).strip() for part in parts if part.strip()]


def one_sentence_a_line(source):
    "Markdown with every sentence of a paragraph or list item on a line of its own; tables, headings, quotes and code stay as they are."
    done, block, indent, fenced = [], [], ["", ""], False

    def flush():
        if block:
            for i, sentence in enumerate(sentences(" ".join(block))):
                done.append(indent[min(i, 1)] + sentence)
            block.clear()

    for line in source.splitlines():
        if line.lstrip().startswith(("```", "~~~")) or (line.strip() == "$$"):
            flush()
            fenced = not fenced
            done.append(line)
        elif fenced or VERBATIM.match(line) or not line.strip() or (line.startswith("    ") and not block):
            flush()
            done.append(line)
        elif item := BLOCK.match(line):
            flush()
            indent[:] = [item[0], " " * len(item[0])]
            block.append(line[item.end() :].strip())
        else:
            if not block:
                indent[:] = [re.match(r"\s*", line)[0]] * 2
            block.append(line.strip())
            if line.endswith("  "):
                flush()
    flush()
    return "\n".join(done)


def files():
    "Every notebook, and the texts beside them."
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)]
    return sorted(notebooks) + [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def rewrite(path, write=True):
    "Whether a file was not yet as it should be."
    if path.suffix == ".ipynb":
        nb = nbformat.read(path, as_version=4)
        changed = False
        for cell in nb.cells:
            if cell.cell_type == "markdown" and (new := one_sentence_a_line(cell.source)) != cell.source:
                cell.source, changed = new, True
        if changed and write:
            nbformat.write(nb, path)
    else:
        text = path.read_text(encoding="utf-8")
        new = one_sentence_a_line(text) + "\n"
        changed = new != text
        if changed and write:
            path.write_text(new, encoding="utf-8")
    return changed


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or files():
        if rewrite(path):
            print(path.relative_to(ROOT))
