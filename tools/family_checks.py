"""Whether the library gives what a model's own forward gives, on a tiny random model of a family.
Everything is computed twice: by the library, and by hand with `model(input_ids=...)` and a hook of this file, a text at a time."""

import copy
import functools
import itertools
import re
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny_models import DATA, tiny_model

import oneshot_steering
from oneshot_steering.lm import LM
from oneshot_steering.models import tiny_tokenizer
from oneshot_steering.objective import Example, Objective
from oneshot_steering.optimize import Stop, optimize
from oneshot_steering.steering import Steering

PACKAGE = Path(oneshot_steering.__file__).parent
TEXTS = ("the lazy dog", "There is no reason to think", "while the other dogs are sleeping in the warm morning sun over there")
COMPLETIONS = (" is quick", " than a text", " jumps")
NEW = 5  # tokens generated
# What acts on each row of the batches: mode, token positions, block (as a share of the depth).
ACTIONS = (("add", "all", 0.5), ("add", "prompt", 0.0), ("clamp", "completion", 1.0), ("ablate", "last_1", 0.5), ("add", "1:3", 0.0),
           None, ("clamp", "all", 0.0), ("ablate", "prompt", 1.0))  # fmt: skip
SELECTS = {
    "all": lambda at, end: at >= 0,
    "prompt": lambda at, end: at < end,
    "completion": lambda at, end: at >= end,
    "last_1": lambda at, end: at == end - 1,
    "1:3": lambda at, end: (at >= 1) & (at < 3),
}
EXACT, ROUNDED = 1e-3, 6e-2  # largest difference, as a share of the largest logit, in fp32 and in bf16


def difference(one, other):
    "The largest difference as a share of the largest value."
    if one.shape != other.shape:
        return float("inf")
    gap = (one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-9)
    return gap.item() if gap.isfinite() else float("inf")


class ByHand:
    "A model's own forward, one text at a time, with vectors added by a hook of this file."

    def __init__(self, lm):
        self.lm, self.blocks = lm, list(lm.layers)

    def logits(self, ids, steering=None, prompt=None, **options):  # [tokens, vocabulary]
        with self.hooked(steering, len(ids) if prompt is None else prompt), torch.no_grad():
            return self.lm.model(input_ids=torch.tensor([ids]), **options).logits[0]

    def streams(self, ids):
        "What enters every block: [[tokens, d_model] for every time it runs]."
        seen = [[] for _ in self.blocks]
        hooks = [block.register_forward_pre_hook(functools.partial(record, into), with_kwargs=True)
                 for block, into in zip(self.blocks, seen, strict=True)]  # fmt: skip
        try:
            self.logits(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @contextmanager
    def hooked(self, steering, prompt):
        def hook(module, args, kwargs):
            h = stream(args, kwargs)
            chosen = SELECTS[steering.positions](torch.arange(h.shape[1]), prompt)
            changed = torch.where(chosen[None, :, None], steered(h, steering), h)
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        layers = () if steering is None else steering.layers
        hooks = [self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def greedy(self, ids, steps, steering=None):
        "The logits of every step, and the tokens; the whole text is computed again at each step."
        text, logits = list(ids), []
        for _ in range(steps):
            logits.append(self.logits(text, steering, len(ids), use_cache=False)[-1])
            text.append(int(logits[-1].float().argmax()))
            if text[-1] in self.lm.stop_ids():
                break
        return logits, text[len(ids) :]

    def log_probs(self, pair, steering=None, coldness=1.0):  # [completion tokens]
        logits = coldness * self.logits(list(pair.ids), steering, pair.boundary).float()[pair.boundary - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(pair.completion)), torch.tensor(pair.completion)]


def stream(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def record(into, module, args, kwargs):
    into.append(stream(args, kwargs)[0].clone())


def steered(h, steering):
    "The stream with a vector of ours: h + c v, c v and what is across v, or what is across v."
    v = steering.vector.float()
    unit, x = v / v.norm(), h.float()
    along = (x @ unit)[..., None] * unit
    new = {"add": x + steering.strength * v, "clamp": x - along + steering.strength * v, "ablate": x - steering.strength * along}
    return new[steering.mode].to(h.dtype)


class Checks:
    """The checks of one model, by name: each yields (what was compared, the difference).
    `alone` leaves out what a model may be refused for: rows of unequal length in one batch, and layers where nothing can be steered."""

    def __init__(self, lm, own, alone=False):
        self.lm, self.hand, self.own, self.alone = lm, ByHand(lm), own, alone  # own: [logits of every text, before the library came]
        self.ids = [lm.encode(text) for text in TEXTS]
        self.groups = [[0], [1], [2]] if alone else [[0, 1, 2]]  # which texts are in a batch
        self.layers = [layer for layer in range(lm.n_layers) if not alone or is_usable(lm, layer)]
        self.state = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
        self.config = copy.deepcopy(lm.model.config.to_dict())

    @functools.cached_property
    def vectors(self):
        "A vector for every row, as long as the stream is there."
        streams, made = self.hand.streams(self.ids[2]), []
        for seed, action in enumerate(ACTIONS):
            if action is None:
                made.append(None)
                continue
            mode, positions, depth = action
            layer = self.layers[round(depth * (len(self.layers) - 1))]
            size = streams[layer][0].float().norm(dim=-1).median().item() if streams[layer] else 1.0
            v = torch.randn(self.lm.d_model, generator=torch.Generator().manual_seed(seed))
            made.append(Steering(v * size / v.norm(), layer, mode, positions))
        return made

    @property
    def rows(self):
        "A vector and a prompt for every row of a batch; some rows have the same prompt, some of them differ in length."
        return list(zip(self.vectors, itertools.cycle(self.ids)))

    def run(self):
        "`lm.run` on single texts and on a batch padded on the right."
        for ids, own in zip(self.ids, self.own, strict=True):
            one, mask = self.lm.pad([ids])
            yield f"logits of {len(ids)} tokens", difference(self.lm.run(one, mask, mask.sum(-1)).logits[0], own)
        if self.alone:
            return
        batch, mask = self.lm.pad(self.ids)
        logits = self.lm.run(batch, mask, mask.sum(-1)).logits
        for row, own in zip(logits, self.own, strict=True):
            yield f"logits of {len(own)} tokens in a batch", difference(row[: len(own)], own)

    def log_probs(self):
        for group in self.groups:
            texts, completions = [TEXTS[i] for i in group], [COMPLETIONS[i] for i in group]
            for ours, *both in zip(self.lm.log_probs(texts, completions), texts, completions, strict=True):
                pair = self.lm.encode_pair(*both)
                yield f"log-probabilities after {pair.boundary} tokens", difference(ours, self.hand.log_probs(pair))

    def hidden_states(self):
        last, every = len(self.hand.blocks) - 1, [self.hand.streams(ids) for ids in self.ids]
        for layer, group in itertools.product(sorted({0, 1, last // 2, last} & set(self.layers)), self.groups):
            for ours, i in zip(self.lm.hidden_states([TEXTS[i] for i in group], layer), group, strict=True):
                streams = every[i][layer]
                if len(streams) != 1:
                    yield f"block {layer} runs {len(streams)} times in a pass", float("inf")
                else:
                    yield f"states at layer {layer} of {len(ours)} tokens", difference(ours, streams[0])

    def generate(self):
        "Greedy, cached, as one batch padded on the left."
        for group in self.groups:
            yield from self._generated([(None, self.ids[i]) for i in group])
            for text, i in zip(self.lm.generate([TEXTS[i] for i in group], max_new_tokens=NEW), group, strict=True):
                logits, tokens = self.hand.greedy(self.ids[i], NEW)
                margins = [best - second for best, second in (row.float().topk(2).values.tolist() for row in logits)]
                differs = text != self.lm.text_of(tokens) and min(margins) > 1e-2  # else two tokens were as good as each other
                yield f"text after {len(self.ids[i])} tokens", float(differs)

    def steer_run(self):
        for s in filter(None, self.vectors):
            ids, end = self.ids[1], len(self.ids[1]) - 3
            batch, mask = self.lm.pad([ids])
            with self.lm.steer(s):
                ours = self.lm.run(batch, mask, torch.tensor([end])).logits[0]
            by_hand = self.hand.logits(ids, s, end)
            yield f"{s.mode}, {s.positions}, layer {s.layers[0]}", difference(ours, by_hand)
            if s.mode != "ablate" and difference(by_hand, self.own[1]) < 1e-6:
                yield f"a vector at layer {s.layers[0]} changes nothing", float("inf")

    def steer_rows(self):
        for rows in [[row] for row in self.rows] if self.alone else [self.rows]:
            batch, mask = self.lm.pad([ids for _, ids in rows])
            ends = [len(ids) - 3 for _, ids in rows]
            with self.lm.steer(rows=[s for s, _ in rows]):
                logits = self.lm.run(batch, mask, torch.tensor(ends)).logits
            for i, (s, ids) in enumerate(rows):
                yield f"row {i} of a batch, {name_of(s)}", difference(logits[i, : len(ids)], self.hand.logits(ids, s, ends[i]))

    def steer_generate(self):
        for s, group in itertools.product((self.vectors[0], self.vectors[2]), self.groups):
            with self.lm.steer(s):
                yield from self._generated([(s, self.ids[i]) for i in (*group, group[0])])

    def steer_generate_rows(self):
        for rows in [[row] for row in self.rows] if self.alone else [self.rows]:
            with self.lm.steer(rows=[s for s, _ in rows]):
                yield from self._generated(rows)

    def _generated(self, rows):
        steps = []

        def pick(logits):
            steps.append(logits)
            return logits.argmax(-1)

        new = list(self.lm.decode_steps([ids for _, ids in rows], NEW, sampler=pick))
        for i, (s, ids) in enumerate(rows):
            with self.lm.unsteered():
                logits, tokens = self.hand.greedy(ids, NEW, s)
            for t, (mine, token) in enumerate(zip(logits, tokens, strict=True)):
                if t >= len(steps):
                    yield f"token {t} after {len(ids)} tokens, {name_of(s)}: generation ended before", float("inf")
                    break
                yield f"token {t} after {len(ids)} tokens, {name_of(s)}", difference(steps[t][i], mine)
                if new[t][i] != token:  # it has ended, or two tokens were as good as each other
                    break

    def optimize(self):
        "Three steps with every shortcut, without any, and the first loss by hand."
        examples = [Example(TEXTS[2], promote=COMPLETIONS[:2], suppress=COMPLETIONS[2]), Example(TEXTS[0], promote=COMPLETIONS[0])]
        examples = [Example(TEXTS[2], promote=COMPLETIONS[0])] if self.alone else examples
        start = self.vectors[0]
        pairs = [(e.prompt, text, kind) for e in examples for kind in ("promote", "suppress") for text in getattr(e, kind)]
        for positions in ("all", "prompt"):
            settings = dict(start=start.vector / 4, steps=3, positions=positions, stop=Stop(change=None), progress=False)
            fast = optimize(self.lm, examples, start.layers[0], **settings).losses
            with self.lm.plain():
                plain = optimize(self.lm, examples, start.layers[0], **settings).losses
            first = start.replace(vector=start.vector / 4, positions=positions)
            log_p = [self.hand.log_probs(self.lm.encode_pair(p, c), first, Objective().coldness) for p, c, _ in pairs]
            mine = [loss_by_hand(each, kind) for each, (_, _, kind) in zip(log_p, pairs, strict=True)]
            yield f"first losses by hand, {positions}", difference(fast[0], torch.stack(mine))
            yield f"losses with shortcuts, {positions}", difference(fast, plain)

    def untouched(self):
        "No hook, no replaced forward, no changed weight or setting is left."
        model = self.lm.model
        hooks = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
        yield f"hooks left on {hooks[:3]}", float("inf") if hooks else 0.0
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, self.state[name])]
        yield f"weights changed: {changed[:3]}", float("inf") if changed else 0.0
        yield "the configuration changed", float("inf") if model.config.to_dict() != self.config else 0.0
        for ids, own in zip(self.ids, self.own, strict=True):
            yield f"its own logits of {len(ids)} tokens changed", difference(self.hand.logits(ids), own)


def loss_by_hand(log_p, kind):
    return -log_p.sum() if kind == "promote" else -torch.log1p(-log_p.exp()).sum()


def name_of(steering):
    return "unsteered" if steering is None else f"{steering.mode}, {steering.positions}, layer {steering.layers[0]}"


CHECKS = ("run", "log_probs", "hidden_states", "generate", "steer_run", "steer_rows", "steer_generate", "steer_generate_rows", "optimize",
          "untouched")  # fmt: skip
IN_BF16 = ("run", "hidden_states", "generate", "steer_generate", "untouched")


def refusal(error):
    "The first sentence of an error that the library raised itself with a message for the reader; None for any other error."
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = Path(last.filename).is_relative_to(PACKAGE) and "raise " in last.line  # not what torch raises in a line of ours
    return first_sentence(error) if raised or type(error).__module__.startswith(f"{PACKAGE.name}.") else None


def first_sentence(message):
    text = " ".join(str(message).split())
    return text.partition(". ")[0].removesuffix(".") + "." if text else type(message).__name__


def is_usable(lm, layer):
    "Whether the library takes this layer of the model."
    try:
        lm.check_layer(layer)
    except ValueError:
        return False
    return True


@contextmanager
def our_warnings():
    "The messages of the warnings that the library itself gives inside."
    messages = []

    def note(message, *args, **kwargs):
        frame = sys._getframe(1)
        while Path(frame.f_code.co_filename).name == "warnings.py":
            frame = frame.f_back
        of_torch = "Triggered internally" in str(message)
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE) and not of_torch:
            messages.append(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield messages


def check(name, checks, tolerance):
    "The outcome of one check: (verdict, why)."
    with our_warnings() as messages:
        try:
            worst, what = max(((gap, what) for what, gap in getattr(checks, name)()), default=(0.0, ""))
        except Exception as error:
            why = refusal(error)
            return ("refused", why) if why else ("WRONG", f"{type(error).__name__}: {first_sentence(error)[:200]}")
    if not worst <= tolerance:
        return "WRONG", f"{what} ({worst:.1g})"
    return ("warned", first_sentence(messages[0])) if messages else ("verified", f"{worst:.1g}")


def verdict(family, cls, dtype=torch.float32, names=None, stage=lambda _: None):
    "What is to be said of a family: {family, class, verdict, why, checks: {name: [verdict, why]}}."
    row = dict(family=family, cls=cls, dtype=str(dtype).removeprefix("torch."), checks={})
    stage("making")
    try:
        model, tok = tiny_model(family, cls, dtype=dtype), tiny_tokenizer()
        with torch.no_grad():
            own, again = ([model(input_ids=tok(text, return_tensors="pt").input_ids).logits[0] for text in TEXTS] for _ in range(2))
        if max(map(difference, own, again)) > EXACT:
            raise ValueError("its own forward gives other logits each time")
        if not all(logits.isfinite().all() for logits in own):
            raise ValueError("its random weights give logits that are not finite")
    except Exception as error:
        return row | dict(verdict="not made", why=f"{type(error).__name__}: {first_sentence(error)[:200]}")
    try:
        lm = LM(model, tok, name=family, layers=DATA["layers"].get(family))
        checks = Checks(lm, own)
    except Exception as error:
        why = refusal(error)
        return row | dict(verdict="refused" if why else "WRONG", why=why or f"{type(error).__name__}: {first_sentence(error)}")
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    for name in names or (CHECKS if dtype == torch.float32 else IN_BF16):
        stage(name)
        row["checks"][name] = check(name, checks, tolerance)
    refused = [name for name, (outcome, _) in row["checks"].items() if outcome == "refused"]
    rest = Checks(lm, own, alone=True) if refused else None
    row["alone"] = {name: check(name, rest, tolerance) for name in refused if rest.layers}
    return row | summary(row["checks"], row["alone"])


def summary(outcomes, alone=()):
    "The gravest outcome of the checks, and where; what is refused may be right in single texts, at other layers (`alone`)."
    wrong = {name: why for rows in (outcomes, alone) for name, (outcome, why) in dict(rows).items() if outcome == "WRONG"}
    for grave in ("WRONG", "refused", "warned"):
        where = wrong if grave == "WRONG" else {name: why for name, (outcome, why) in outcomes.items() if outcome == grave}
        if where and grave == "WRONG":
            return dict(verdict=grave, why="; ".join(f"{name}: {why}" for name, why in where.items()))
        if where:
            kinds = {re.sub(r"\d+", "#", why): why for why in reversed(where.values())}  # the first of those that differ in a number
            still = {name for name, (outcome, _) in dict(alone).items() if outcome == "refused"}
            in_part = grave == "refused" and alone and still <= {"optimize"}  # what can be steered, but not optimised
            return dict(verdict="in part" if in_part else grave, why=" ".join(reversed(kinds.values())))
    return dict(verdict="verified", why="")
