"""The sweep over every family of language models that transformers knows: `python tools/families.py [FAMILIES]` checks a tiny random
model of each (family_checks.py) and writes the site's page from what was found. A family that was checked with this code is not
checked again; one that crashes or hangs ends its worker and is a row like the others."""

import datetime
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "supported_models.md"
RESULTS = ROOT / ".cache" / "families.jsonl"
LIMIT = 300  # seconds for one family
WORKERS = int(os.environ.get("FAMILY_WORKERS") or 2)
BF16 = ("llama", "gemma3_text", "gpt2", "gpt_oss", "mamba", "qwen3_5_text", "phi3", "bloom")  # checked in bf16 too
VERDICTS = {
    "verified": "every check holds",
    "warned": "every check holds, and the library warns",
    "in part": "right for single texts, at other layers, or for all but optimisation; the rest is refused with the error that is named",
    "refused": "the library raises the error that is named",
    "not made": "no tiny model of it could be made or run on text alone, so nothing is known",
    "WRONG": "something differs",
}
COMPARED = (
    "logits, log-probabilities and streams, of single texts and of batches, also of texts longer than the attention windows;",
    "greedy generation with a cache, of a batch of prompts of unequal length, without vectors and with them;",
    "three modes and five rules for token positions; one vector for all rows, and one for each row;",
    "the losses of an optimisation with every shortcut, without any, and the first ones by hand;",
    "that the model is left as it was.",
)


def code():
    "A hash of what decides the results."
    files = [*sorted((ROOT / "oneshot_steering").rglob("*.py")), *sorted(Path(__file__).parent.glob("*famil*.py")),
             *sorted(Path(__file__).parent.glob("tiny_models.*"))]  # fmt: skip
    parts = [path.read_bytes() for path in files] + [version(name).encode() for name in ("torch", "transformers")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def wanted(names=()):
    "Every (family, class, dtype), or those of the families named."
    from tiny_models import families, variants

    every = [(*one, "float32") for one in (*families(), *variants())]
    every += [(family, cls, "bfloat16") for family, cls, _ in every if family in BF16]
    return [job for job in every if not names or job[0] in names]


def worker():
    "Reads jobs as lines of JSON, writes what it is doing and what it found."
    import warnings

    import torch
    import transformers
    from family_checks import verdict

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what a model prints is not an answer
    say = lambda answer: print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        family, cls, dtype = json.loads(line)
        say(verdict(family, cls, getattr(torch, dtype), stage=lambda name: say({"stage": name})))


class Worker:
    "A process that checks families one after another; it is started again after a crash or a hang."

    def __init__(self):
        self.process, self.lines = None, None

    def start(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], env=environment, cwd=ROOT, **pipes)
        self.lines = Queue()
        threading.Thread(target=self.read, args=(self.process.stdout, self.lines), daemon=True).start()

    @staticmethod
    def read(output, lines):
        for line in output:
            lines.put(json.loads(line))
        lines.put(None)  # it has ended

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def check(self, job):
        if self.process is None or self.process.poll() is not None:
            self.start()
        self.process.stdin.write(json.dumps(job) + "\n")
        began, stage = time.monotonic(), "starting"
        try:
            while answer := self.lines.get(timeout=max(0, began + LIMIT - time.monotonic())):
                if "stage" not in answer:
                    return answer | dict(seconds=round(time.monotonic() - began, 1))
                stage = answer["stage"]
            ended = "the process crashed"
        except Empty:
            ended = f"it ran longer than {LIMIT} s"
        self.stop()
        outcome = "not made" if stage in ("starting", "making") else "WRONG"
        seconds = round(time.monotonic() - began, 1)
        return dict(family=job[0], cls=job[1], dtype=job[2], verdict=outcome, why=f"{stage}: {ended}", checks={}, seconds=seconds)


def known(current):
    "What was found with this code before: {job: row}."
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []
    return {(row["family"], row["cls"], row["dtype"]): row for row in rows if row["code"] == current}


def sweep(jobs):
    "Check what is not known yet, and say what was found as it comes."
    current, queue, lock = code(), Queue(), threading.Lock()
    before = known(current)
    for job in jobs:
        if job not in before:
            queue.put(job)
    print(f"{len(jobs)} models, {len(jobs) - queue.qsize()} of them checked before")
    RESULTS.parent.mkdir(exist_ok=True)

    def work():
        one = Worker()
        try:
            while True:
                row = one.check(queue.get_nowait()) | dict(code=current)
                with lock, RESULTS.open("a", encoding="utf-8") as file:
                    print(json.dumps(row), file=file)
                    print(f"{row['family']:26} {row['dtype']:9} {row['seconds']:5.1f} s  {row['verdict']}  {row['why'][:200]}", flush=True)
        except Empty:
            one.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return known(current)


def page(rows):
    "The page as Markdown."
    from tiny_models import variants

    rows = sorted(rows, key=lambda row: (row["family"].lower(), row["cls"]))
    half = [row for row in rows if row["dtype"] == "bfloat16"]
    further = [row for row in rows if (row["family"], row["cls"]) in variants()]
    plain = [row for row in rows if row not in half and row not in further]
    counts = Counter(row["verdict"] for row in plain)
    told = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "oneshot-steering"))
    return "\n".join([
        "# Supported models", "", "> Every family of language models that transformers knows, and whether steering it is right.", "",
        f"Of the {len(plain)} language models that transformers can load by name, with text alone or text and images: {told}.",
        f"Made on {datetime.date.today()} by `make families` with {versions}.", "",
        "A tiny random model of each family is compared with its own forward pass, written by hand with a hook, a text at a time:", "",
        *(f"- {what}" for what in COMPARED), "",
        "A tiny model has every mechanism of its family, but not its weights: what depends on those (a tokenizer, a chat template, "
        "how much a vector achieves) is not known from here.", "", "What is said of a family:", "",
        *(f"- **{name}**: {meaning}." for name, meaning in VERDICTS.items() if counts[name]), "",
        "## Families", "", *table(plain), "",
        "## Other settings", "", "Settings of a family that change how it computes.", "", *table(further), "",
        "## In bf16", "", "Some families once more in bf16, with a tolerance for its eight bits of precision.", "", *table(half), "",
    ])  # fmt: skip


def table(rows):
    "A row per model."
    yield from ("| family | class | outcome | why |", "|---|---|---|---|")
    for row in rows:
        why = row["why"].replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
        yield f"| {row['family']} | {row['cls']} | {row['verdict']} | {why} |"


def main(names):
    jobs = wanted(names)
    found = sweep(jobs)
    if not names:
        PAGE.write_text(page([found[job] for job in jobs]), encoding="utf-8")
    counts = Counter(found[job]["verdict"] for job in jobs)
    print(", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]))
    sys.exit(bool(counts["WRONG"]))


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main(sys.argv[1:])
