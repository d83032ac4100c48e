"""The library on an accelerator: `python tools/gpu.py` (`make gpu`) checks it there, then measures it on models of the paper's shapes with
random weights, next to the plain way and to the least time the card needs, and keeps one page under the card's name. Each row is printed
and saved as it comes, so a run that is cut keeps what it has done; what does not fit into the time or the memory says so."""

import argparse
import copy
import gc
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from notebooks import ROOT
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from oneshot_steering.files import atomic_write
from oneshot_steering.lm import LM
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_model, tiny_tokenizer
from oneshot_steering.objective import Example, Terms
from oneshot_steering.optimize import Job, Stop, optimize_many
from oneshot_steering.steering import Steering

PAGES = ROOT / "nbs" / "benchmarks"
BUDGET = 460  # seconds, all in all
ENOUGH = 10  # seconds of one work, after which it is not run again
COLDNESS = 0.7
PURPOSE = "> The library on an accelerator: whether it is right there, and how fast; `make gpu` writes this page."
MEANT_FOR = "Run it where PyTorch sees one, or `python tools/gpu.py --tiny --device cpu` to try the script itself."


@dataclass(frozen=True)
class Shape:
    "A model of the paper, and how the paper fits vectors on it."

    name: str
    config: dict  # for `AutoConfig.for_model`
    layer: int
    lr: float
    start_norm: float
    max_norm: float | None = None
    positions: str = "all"  # that are steered while a vector is fitted


@dataclass(frozen=True)
class Scale:
    "How much is measured."

    shapes: tuple[Shape, ...]
    families: tuple[str, ...] = TINY_ARCHITECTURES  # that are checked
    fits: int = 24  # half of them promote, half suppress, on half as many prompts
    steps: int = 30
    batches: tuple[int, ...] = (1, 64, 256)
    prompt: int = 32  # tokens of each prompt that is continued
    new: int = 64  # tokens that are written behind it
    square: int = 8192  # rows of the matrices whose product is timed
    copied: int = 2**30  # bytes
    runs: int = 3  # of which the median counts


PAPER = Scale(
    (
        Shape(
            "Gemma-2-2B",
            dict(
                model_type="gemma2", vocab_size=256_000, hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
                num_key_value_heads=4, head_dim=256, intermediate_size=9216,
            ),
            layer=12, lr=0.5, start_norm=1.0, max_norm=30.0,
        ),
        Shape(
            "Llama-3.1-8B",
            dict(
                model_type="llama", vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, intermediate_size=14_336, max_position_embeddings=131_072, rms_norm_eps=1e-5,
                tie_word_embeddings=False,
                rope_parameters=dict(
                    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192,
                ),
            ),
            layer=10, lr=0.03, start_norm=2.0, positions="last_20",
        ),
    )
)  # fmt: skip
SMALL = dict(
    vocab_size=512, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=64,
)  # fmt: skip
TINY = Scale(
    tuple(Shape(s.name, s.config | SMALL, 2, s.lr, s.start_norm, s.max_norm, s.positions) for s in PAPER.shapes),
    families=("llama", "gemma2"), fits=4, steps=2, batches=(1, 3), prompt=8, new=4, square=64, copied=2**16, runs=1,
)  # fmt: skip


# Models and texts, without a hub


def byte_tokenizer(size):
    "A tokenizer of `size` tokens that writes any text with the 256 bytes and reads every token as a text."
    known = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(known | {f"Ġw{i}": i for i in range(len(known), size)}, []))
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def make(shape, device):
    "A model of a shape with random weights in bf16, made on the device, which nothing ever ends a text."
    config = AutoConfig.for_model(**shape.config, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return LM(model, byte_tokenizer(config.vocab_size), name=f"{shape.name}, random weights")


def letters(count, seed):
    "A text of so many tokens."
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=count))


def jobs_of(shape, scale, count, d_model):
    "Fits on prompts of 30 tokens and more: the first half promotes 16 tokens, the other half suppresses 8 behind the same prompts."
    jobs = []
    for i in range(count):
        which = i % max(1, count // 2)
        ending = dict(promote=letters(16, 100 + i)) if i < max(1, count // 2) else dict(suppress=letters(8, 100 + i))
        start = torch.randn(d_model, generator=torch.Generator().manual_seed(i))
        settings = dict(lr=shape.lr, max_norm=shape.max_norm, steps=scale.steps, positions=shape.positions, stop=Stop(change=None))
        example = Example(letters(30 + 2 * which, which), **ending)
        jobs.append(Job(example, shape.layer, start=start * (shape.start_norm / start.norm()), **settings))
    return jobs


# The plain way


@contextmanager
def hooked(lm, layer, change):
    "Within this context `change` acts on the stream that enters a block."
    handle = lm.layers[layer].register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def plain_fits(lm, jobs):
    "The losses [steps + 1, jobs] of fits in one batch of padded rows: a hook, the whole model, logits for every token."
    pairs = [Terms(lm, job.examples).terms[0].pair for job in jobs]
    ids, mask = lm.pad([pair.ids for pair in pairs])
    at, ends = torch.arange(ids.shape[1], device=ids.device), torch.tensor([pair.boundary for pair in pairs], device=ids.device)[:, None]
    acts = mask if jobs[0].positions == "all" else (at < ends) & (at >= ends - int(jobs[0].positions.removeprefix("last_")))
    predicts = ((at >= ends) & mask)[:, 1:]
    promoted = torch.tensor([bool(job.examples.promote) for job in jobs], device=ids.device)[:, None]
    vectors = torch.stack([job.start for job in jobs]).to(ids.device).requires_grad_()
    adam, history = torch.optim.Adam([vectors], lr=jobs[0].lr), []
    with hooked(lm, jobs[0].layer, lambda h: h + (vectors[:, None] * acts[..., None]).to(h.dtype)):
        for step in range(jobs[0].steps + 1):
            logits = lm.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.float()
            log_p = (COLDNESS * logits).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            losses = -torch.where(promoted, log_p, (-log_p.exp()).log1p()).where(predicts, 0).sum(-1)
            history.append(losses.tolist())
            if step == jobs[0].steps:
                return torch.tensor(history)
            adam.zero_grad()
            losses.sum().backward()
            adam.step()
            if (most := jobs[0].max_norm) is not None:
                with torch.no_grad():
                    vectors *= (most / vectors.norm(dim=-1, keepdim=True)).clamp(max=1)


def plain_texts(lm, vector, layer, prompts, new):
    "What transformers' own `generate` writes, steered by a hook."
    ids, mask = lm.pad([lm.encode(prompt) for prompt in prompts], side="left")
    with hooked(lm, layer, lambda h: h + vector.to(h)):
        out = lm.model.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return lm.tok.batch_decode(out[:, ids.shape[1] :])


# The device


class Device:
    "Where it runs: its name, its clock, its memory, its rates."

    def __init__(self, name, scale):
        self.device, self.scale = torch.device(name), scale
        self.backend = None if self.device.type == "cpu" else getattr(torch, self.device.type)

    def does(self, *names):  # not every backend has every function
        return [getattr(self.backend, name)() for name in names if hasattr(self.backend, name)]

    def wait(self):
        self.does("synchronize")

    def free(self):
        if self.backend:
            gc.collect()
        self.does("empty_cache", "reset_peak_memory_stats")

    @property
    def peak(self):  # bytes since `free`; None where they are not counted
        return next(iter(self.does("max_memory_allocated")), None)

    @property
    def card(self):
        return next(iter(self.does("get_device_name")), f"{self.device.type} ({platform.machine()})")

    def facts(self):
        "What a reader needs to know of the machine: no date, no path."
        versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
        if self.device.type != "cuda":
            return ", ".join([self.card, *versions])
        memory = self.backend.get_device_properties(self.device).total_memory / 2**30
        return ", ".join([self.card, f"{memory:.0f} GiB", f"driver {driver_version()}", *versions])

    def seconds(self, work, runs):
        "How long a piece of work takes, each time; fewer times where it takes long."
        took = []
        while len(took) < runs and sum(took) < ENOUGH:
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            took.append(time.perf_counter() - began)
        return took

    def rates(self):
        "Bytes per second that a copy moves (read and written), and operations per second of a product of bf16 matrices."
        source = torch.zeros(self.scale.copied, dtype=torch.uint8, device=self.device)
        target, n = torch.empty_like(source), self.scale.square
        left, right = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.seconds(lambda: (target.copy_(source), left @ right), 3)  # warm
        copy = 2 * self.scale.copied / min(self.seconds(lambda: target.copy_(source), 10))
        return copy, 2 * n**3 / min(self.seconds(lambda: left @ right, 10))


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, IndexError, subprocess.CalledProcessError):
        return "unknown"


# The least time


@dataclass(frozen=True)
class Least:
    "The least seconds that the card's rates allow: weights are read once per pass, and every product is as fast as a large one."

    lm: LM
    memory: float  # bytes per second
    products: float  # operations per second

    def once(self, tokens, predicted, first=0, last=None):
        "One pass through the blocks from `first` to before `last`, and through the head at the predicted tokens."
        blocks = sum(weights.numel() for block in self.lm.layers[first:last] for weights in block.parameters())
        head = self.lm.model.get_output_embeddings().weight.numel() if predicted else 0
        read = 2 * (blocks + head) / self.memory
        return max(read, 2 * (blocks * tokens + head * predicted) / self.products)

    def fits(self, jobs):
        "The blocks below the vector once; those above and the head once per evaluation, and once more for each gradient."
        pairs = [Terms(self.lm, job.examples).terms[0].pair for job in jobs]
        tokens, predicted = sum(len(pair.ids) for pair in pairs), sum(len(pair.completion) for pair in pairs)
        return self.once(tokens, 0, last=jobs[0].layer) + (2 * jobs[0].steps + 1) * self.once(tokens, predicted, first=jobs[0].layer)

    def texts(self, rows, prompt, new):
        return self.once(rows * prompt, rows) + (new - 1) * self.once(rows, rows)


# Is it right there?


def check(family, precision, device):
    "What of a tiny model is not on the device as it is on the processor in fp32 with the same weights: (faults, largest difference)."
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    limit = {"fp32": 1e-3, "TF32": 1e-2, "bf16": 6e-2}[precision]
    model, tok = tiny_model(family).to(dtype), tiny_tokenizer()
    here, there = LM(copy.deepcopy(model).float(), tok), LM(model.to(device), tok)
    first, second = ({"losses": some_losses(lm), "log-probabilities": some_log_probs(lm)} for lm in (here, there))
    differences = {name: ((second[name] - one).abs().max() / one.abs().max()).item() for name, one in first.items()}
    differences["greedy texts"] = lost_by_choices(here, there)
    faults = [f"{name} differ by {d:.1%}" for name, d in differences.items() if not d <= limit]
    faults += [f"refused: {c.what}" for c in there.contract.broken if c.what not in {c.what for c in here.contract.broken}]
    faults += [f"not used: {name}" for name, used in there.shortcuts.items() if not used and here.shortcuts.get(name, True)]
    return faults, max(differences.values())


PROMPTS = ["The quick brown fox", "There is no reason to think that the", "A dog"]


def some_vector(lm, layer=2):
    vector = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    return Steering(vector / vector.norm(), layer)


def some_losses(lm):
    "Losses of two fits together on the way of three steps."
    examples = [Example(PROMPTS[0], promote=" jumps", suppress=" sleeps"), Example(PROMPTS[1], promote=" thing")]
    fits = optimize_many(lm, [Job(example, 2, lr=0.1, steps=3, seed=i) for i, example in enumerate(examples)], progress=False)
    return torch.cat([fit.losses.flatten() for fit in fits])


def some_log_probs(lm):
    with lm.steer(some_vector(lm)):
        return torch.cat(lm.log_probs(PROMPTS, [" over the lazy dog", " thing", " and a dog are sleeping"])).float().cpu()


def lost_by_choices(here, there, new=12):
    "How far the tokens that the device chooses are below the best ones here, as a share of the largest logit."
    prompts, lost = [here.encode(prompt) for prompt in PROMPTS], 0.0
    vector = some_vector(here)
    with there.steer(vector):
        chosen = list(zip(*there.decode_steps(prompts, new), strict=True))
    for prompt, tokens in zip(prompts, chosen, strict=True):
        tokens = [token for token in tokens if token is not None]  # None: the text has ended
        if not tokens:
            continue
        ids, mask = here.pad([[*prompt, *tokens]])
        with here.steer(vector), torch.no_grad():
            logits = here.run(ids, mask, torch.tensor([len(prompt)])).logits[0, len(prompt) - 1 : -1].float()
        gap = logits.amax(-1) - logits[range(len(tokens)), tokens]
        lost = max(lost, (gap.max() / logits.abs().max()).item())
    return lost


@contextmanager
def tf32(on):
    "Within this context products of fp32 matrices on a GPU may be rounded to TF32."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# The page


@dataclass
class Page:
    "Sections of text and tables, printed and saved as they come."

    path: Path | None
    parts: list[str] = field(default_factory=list)

    def add(self, *lines):
        print(*lines, sep="\n", flush=True)
        self.parts += lines
        if self.path:
            atomic_write(self.path, ("\n".join(self.parts) + "\n").encode())

    def table(self, *columns):
        self.add("", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))

    def row(self, *cells):
        self.add("| " + " | ".join(cells) + " |")


class Clock:
    "The seconds of a run. A row is left out when less is left than the dearest one so far has taken."

    def __init__(self, budget):
        self.budget, self.began, self.dearest = budget, time.perf_counter(), 0.0

    @property
    def left(self):
        return self.budget - (time.perf_counter() - self.began)

    def row(self, work):
        if self.left <= self.dearest:
            return None
        before = self.left
        result = work()
        self.dearest = max(self.dearest, before - self.left)
        return result


OUT_OF_TIME, OUT_OF_MEMORY = "no time left", "out of memory"


def attempt(device, work, warm, runs):
    "Median seconds and peak bytes of a piece of work, after a shorter one that warms up; a word where the memory does not suffice."
    device.free()
    try:
        warm()
        return statistics.median(device.seconds(work, runs)), device.peak
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY, None


def compared(device, ours, plain, least, scale, show):
    "The cells of a row: ours, plain, how many times as long it takes, the least, its share of ours, both peaks."
    (mine, my_peak), (theirs, their_peak) = (attempt(device, *way, scale.runs) for way in (ours, plain))
    times = [m if isinstance(m, str) else show(m) for m in (mine, theirs, least)]
    known = not isinstance(mine, str)
    ratio = f"{theirs / mine:.1f}" if known and not isinstance(theirs, str) else "-"
    peaks = ["-" if peak is None else f"{peak / 2**30:.1f}" for peak in (my_peak, their_peak)]
    return [*times[:2], ratio, times[2], f"{least / mine:.2f}" if known else "-", *peaks]


def works(lm, shape, scale, device, bound):
    "(what, cells of its row) of everything that is measured on a model; nothing is run before it is asked for."
    for count in (1, scale.fits):
        jobs = jobs_of(shape, scale, count, lm.d_model)
        short = [Job(**vars(job) | dict(steps=1)) for job in jobs]
        ours, plain = (lambda j: optimize_many(lm, j, progress=False)), (lambda j: plain_fits(lm, j))
        ways = [(lambda w=w, j=jobs: w(j), lambda w=w, j=short: w(j)) for w in (ours, plain)]
        what = f"{count} fit{'s together' * (count > 1)}, {scale.steps} steps"
        yield what, lambda w=ways, j=jobs: compared(device, *w, bound.fits(j), scale, "{:.3g} s".format)
    vector = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    for rows in scale.batches:
        prompts = [letters(scale.prompt, 1000 + row) for row in range(rows)]

        def ours(new=scale.new, prompts=prompts, rows=rows):
            with lm.steer(Steering(vector, shape.layer)):
                return lm.generate(prompts, max_new_tokens=new, batch_size=rows)

        def plain(new=scale.new, prompts=prompts):
            return plain_texts(lm, vector.to(lm.device), shape.layer, prompts, new)

        ways = [(way, lambda way=way: way(2)) for way in (ours, plain)]
        least, show = bound.texts(rows, scale.prompt, scale.new), lambda s, rows=rows: f"{rows * scale.new / s:,.0f} tokens/s"
        yield f"{scale.new} tokens, batch {rows}", lambda w=ways, b=least, s=show: compared(device, *w, b, scale, s)


def same_losses(lm, shape, scale):
    "The largest relative difference between the first losses of the fits, ours and plain."
    jobs = [Job(**vars(job) | dict(steps=0)) for job in jobs_of(shape, scale, scale.fits, lm.d_model)]
    ours = torch.stack([fit.losses[0].sum() for fit in optimize_many(lm, jobs, progress=False)])
    plain = plain_fits(lm, jobs)[0]
    return ((ours - plain).abs() / plain.abs()).max().item()


def right_or_not(page, device, clock):
    "The table of tiny models; how many rows have a fault."
    page.add("", "## Right on this device?", "", RIGHT.strip())
    precisions = ["fp32", *(["TF32"] if device.device.type == "cuda" else []), "bf16"]
    page.table("family", *precisions)
    wrong = 0
    for family in device.scale.families:
        cells = []
        for precision in precisions:
            with warnings.catch_warnings(), tf32(precision == "TF32"):
                warnings.simplefilter("ignore")
                result = clock.row(lambda f=family, p=precision: check(f, p, device.device))
            faults, difference = result or ([], None)
            wrong += bool(faults)
            cells.append("; ".join(faults) or (f"right ({difference:.0e})" if result else OUT_OF_TIME))
        page.row(family, *cells)
    return wrong


def measure_model(page, shape, scale, device, clock, rates):
    "The rows of one model, and whether the plain way computes the same losses."
    blank = ["-"] * 6
    device.free()
    try:
        lm = clock.row(lambda: make(shape, device.device))
        if lm is None:
            return page.row(shape.name, "all", OUT_OF_TIME, *blank)
        for what, work in works(lm, shape, scale, device, Least(lm, *rates)):
            page.row(shape.name, what, *(clock.row(work) or [OUT_OF_TIME, *blank]))
        differ = clock.row(lambda: same_losses(lm, shape, scale))
        page.row(shape.name, "first losses, ours and plain", OUT_OF_TIME if differ is None else f"differ by {differ:.1%} at most", *blank)
    except torch.OutOfMemoryError:
        page.row(shape.name, "the rest", OUT_OF_MEMORY, *blank)


def measure(page, device, scale, clock):
    "The table of speed and memory."
    memory, products = device.rates()
    page.add("", "## Speed and memory", "", MEASURED.strip().format(scale=scale, half=scale.fits // 2), "")
    page.add(f"The device copies {memory / 1e9:,.0f} GB/s and multiplies {products / 1e12:.3g} TFLOP/s in bf16.")
    page.table("model", "work", "ours", "plain", "plain / ours", "bound", "bound / ours", "peak GiB, ours", "peak GiB, plain")
    for shape in scale.shapes:
        measure_model(page, shape, scale, device, clock, (memory, products))


RIGHT = """
Tiny random models, compared with the processor in fp32 on the same weights: losses of two fits, steered log-probabilities, steered greedy \
texts of a batch with a cache; the contract has to hold and the shortcuts have to be used as there.
In brackets is the largest difference, as a share of the largest number.
"""
MEASURED = """
Models of these shapes with random weights in bf16; their texts are random letters, one token each.
Fits have the paper's layers, learning rates, norms and token positions, and never stop early.
{scale.fits} fits together are {half} prompts (30 tokens and more), each with a completion of 16 tokens to promote and one of 8 to \
suppress; one fit promotes.
Texts go on from different prompts of {scale.prompt} tokens, steered; tokens per second include reading the prompts.
The plain way is a hook on frozen weights: for fits a full pass over padded rows with logits everywhere, for texts transformers' `generate`.
The bound is the least that the card's own rates allow: each pass reads the weights once and multiplies as fast as large matrices do.
Medians of up to {scale.runs} runs, after a warm-up; peak memory includes the weights.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--device", help="the accelerator that PyTorch finds, if left out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, in seconds: to try the script itself")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no further row is begun")
    parser.add_argument("--out", type=Path, help=f"the page's folder; {PAGES.relative_to(ROOT)} on an accelerator, else none")
    options = parser.parse_args(arguments)
    name = options.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None)
    if name is None:
        print(f"There is no accelerator on this machine. {MEANT_FOR}", file=sys.stderr)
        return 2
    clock, scale = Clock(options.budget), TINY if options.tiny else PAPER
    device = Device(name, scale)
    folder = options.out or (PAGES if device.device.type != "cpu" and not options.tiny else None)
    page = Page(folder and folder / f"gpu_{re.sub('[^a-z0-9]+', '_', device.card.lower()).strip('_')}.md")
    page.add(f"# On {device.card}", PURPOSE, "", f"{device.facts()}.")
    transformers.utils.logging.set_verbosity_error()
    wrong = right_or_not(page, device, clock)
    measure(page, device, scale, clock)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
