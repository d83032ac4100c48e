"""Checks of the cases in test_cases.py: transformers' own `generate`, streams read elsewhere, and several threads on one model."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, TextIteratorStreamer, pipeline

from oneshot_steering.figure import steered_pieces
from oneshot_steering.lm import LM
from oneshot_steering.models import tiny_lm
from oneshot_steering.steering import SteeredThroughAnother, Steering

TEXT, SHORT = "the quick brown fox jumps over", "a dog"
RULES = {
    "all": lambda at, end: at >= 0,
    "prompt": lambda at, end: at < end,
    "completion": lambda at, end: at >= end,
    "last_1": lambda at, end: at == end - 1,
    "1:3": lambda at, end: (at >= 1) & (at < 3),
}

def vector(lm, seed=1):
    return 8 * torch.randn(lm.d_model, generator=torch.Generator().manual_seed(seed))


def by_hand(lm, ids, most, rule, prompt=None):
    "Greedy tokens of plain forwards over the whole sequence, with a hook of our own."
    ids, start, new, v = list(ids), prompt or len(ids), [], vector(lm)

    def hook(module, args, kwargs):
        h = args[0] if args else kwargs["hidden_states"]
        h = h + RULES[rule](torch.arange(h.shape[1]), start)[:, None] * v
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    handle = lm.layers[2].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        while len(new) < most:
            new.append(lm.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
    handle.remove()
    return new


def theirs(lm, ids, most=6, **options):
    options = dict(max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=2, eos_token_id=None) | options
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return lm.model.generate(ids, attention_mask=mask, **options)[:, -most:].tolist()


@cache
def wanted(rule):
    "Tokens after TEXT in the tiny Llama, by hand."
    return by_hand(tiny_lm(), tiny_lm().encode(TEXT), 6, rule)


def rules_mean_the_same_tokens(**options):
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])
    for rule in RULES:
        with lm.steer(Steering(vector(lm), 2, positions=rule)):
            assert theirs(lm, ids, **options)[0] == wanted(rule), rule
        assert "generate" not in vars(lm.model) and not lm.attached


def padding_beams_and_rows_keep_their_positions(architecture, way):
    lm = tiny_lm(architecture)
    encoded = [lm.encode(TEXT), lm.encode(SHORT)]
    ids, mask = lm.pad(encoded, side="left")
    options = dict(attention_mask=mask.long()) | (dict(cache_implementation="static", disable_compile=True) if way == "static" else {})
    for rule in ("completion", "last_1"):
        one, pair = Steering(vector(lm), 2, positions=rule), dict(num_beams=2, num_return_sequences=2)
        with lm.steer(rows=[one, None]):
            assert theirs(lm, ids, **options)[0] == by_hand(tiny_lm(architecture), encoded[0], 6, rule)
            beams = theirs(lm, ids, **pair, **options)
        with lm.steer(one):
            assert beams[:2] == theirs(lm, torch.tensor([encoded[0]]), **pair)
        assert beams[2:] == theirs(lm, torch.tensor([encoded[1]]), **pair)


def padding_is_inferred_as_transformers_does():
    lm = tiny_lm()
    encoded = [lm.encode(TEXT), lm.encode(SHORT)]
    ids, _ = lm.pad(encoded, side="left")
    with lm.steer(Steering(vector(lm), 2, positions="last_1")):
        new = theirs(lm, ids, attention_mask=None, eos_token_id=1)
    expected = [by_hand(tiny_lm(), e, 6, "last_1") for e in encoded]
    assert [n[:1] for n in new] == [e[:1] for e in expected]


def embeddings_as_input():
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])
    for rule in RULES:
        with lm.steer(Steering(vector(lm), 2, positions=rule)):
            given = dict(inputs_embeds=lm.model.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids))
            new = lm.model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=None)
        assert new[0].tolist()[-6:] == wanted(rule)


def rules_with_and_without_a_cache(architecture, **config):
    lm = tiny_lm(architecture, **config)
    ids = lm.encode(TEXT)
    for rule in ("prompt", "completion", "last_1"):
        with lm.steer(Steering(vector(lm), 2, positions=rule)):
            expected = by_hand(tiny_lm(architecture, **config), ids, 6, rule)
            assert theirs(lm, torch.tensor([ids]))[0] == theirs(lm, torch.tensor([ids]), use_cache=False)[0] == expected


def a_second_turn_has_a_prompt_of_its_own():
    lm = tiny_lm()
    first, follow = lm.encode(TEXT), lm.tok(" and the other dogs are", add_special_tokens=False).input_ids
    for rule in RULES:
        turns = []
        for blocks in (1, 2):
            cache, steering = DynamicCache(config=lm.model.config), Steering(vector(lm), 2, positions=rule)
            with lm.steer(steering) if blocks == 1 else nullcontext():
                with lm.steer(steering) if blocks == 2 else nullcontext():
                    one = first + theirs(lm, torch.tensor([first]), past_key_values=cache)[0] + follow
                with lm.steer(steering) if blocks == 2 else nullcontext():
                    turns.append(theirs(lm, torch.tensor([one]), past_key_values=cache)[0])
        assert turns[0] == turns[1]


def a_decoding_loop_of_ones_own():
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])
    for rule in RULES:
        new, step, past = [], ids, None
        with lm.steer(Steering(vector(lm), 2, positions=rule)), torch.no_grad():
            while len(new) < 6:
                out = lm.model(step, past_key_values=past, use_cache=True)
                past, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
                new.append(step.item())
        assert new == wanted(rule)


def several_on_a_cache(lm, ids):
    past = lm.model(ids, use_cache=True).past_key_values
    return lm.model(torch.tensor([[5, 6]]), past_key_values=past, use_cache=True)


def a_loop_without_a_cache(lm, ids):
    lm.model(ids)
    return lm.model(torch.cat([ids, ids[:, :1]], 1))


def packed_texts(lm, ids):
    return lm.model(ids, position_ids=torch.arange(ids.shape[1])[None] % 5)


def guided(lm, ids):
    return theirs(lm, ids, guidance_scale=2.0)


def continuous_batching(lm, ids):
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    return lm.model.generate_batch([ids[0].tolist()], continuous_batching_config=small, max_new_tokens=5, eos_token_id=-1)


def a_cache_cut_into_its_prompt(lm, ids):
    past = DynamicCache(config=lm.model.config)
    lm.model(ids, past_key_values=past)
    past.crop(-3)
    return lm.model(ids[:, :1], past_key_values=past)


def a_cache_with_rows_in_another_order(lm, ids):
    ids, mask = lm.pad([ids[0].tolist(), ids[0, 4:].tolist()], side="left")
    past, positions = DynamicCache(config=lm.model.config), (mask.long().cumsum(-1) - 1).clamp(min=0)
    lm.model(ids, attention_mask=mask.long(), position_ids=positions, past_key_values=past)
    past.reorder_cache(torch.tensor([1, 0]))
    longer = torch.cat([mask.flip(0), mask[:, -1:]], 1)
    return lm.model(ids[:, -1:], attention_mask=longer.long(), position_ids=positions.flip(0)[:, -1:] + 1, past_key_values=past)


UNTOLD = {
    "a cache cut into its prompt": a_cache_cut_into_its_prompt,
    "rows of a cache in another order": a_cache_with_rows_in_another_order,
    "several tokens on a cache": several_on_a_cache,
    "a loop without a cache": a_loop_without_a_cache,
    "packed texts": packed_texts,
    "two texts that guide each other": guided,
    "continuous batching": continuous_batching,
}


def under_rules(call):
    "What a call does under every rule that needs to know where it is."
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])

    def use(rule):
        try:
            with lm.steer(Steering(vector(lm), 2, positions=rule)), torch.no_grad():
                call(lm, ids)
        finally:
            assert not lm.attached and lm.turn.acquire(blocking=False)
            lm.turn.release()

    return [partial(use, rule) for rule in ("prompt", "completion", "last_1", "-2:")]


def all_positions(call):
    "What was refused under other rules is steered everywhere under this one."
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])
    with lm.steer(Steering(vector(lm), 2)), torch.no_grad():
        out = call(lm, ids)
    if call is continuous_batching:
        assert [one.generated_tokens for one in out.values()] == [by_hand(tiny_lm(), ids[0].tolist(), 5, "all")]
    else:
        assert hooked(call, ids) == out if call is guided else torch.equal(hooked(call, ids).logits, out.logits)


def hooked(call, ids):
    "A call under a hook of our own that acts everywhere."
    lm = tiny_lm()
    handle = lm.layers[2].register_forward_pre_hook(lambda module, args: (args[0] + vector(lm), *args[1:]))
    with torch.no_grad():
        out = call(lm, ids)
    handle.remove()
    return out


# Streams


def a_stream_keeps_the_steering_under_which_it_was_made():
    lm = tiny_lm()
    one, two = Steering(vector(lm), 2), Steering(vector(lm, 2), 1)
    with lm.steer(one):
        steered, late, steps = lm.generate(TEXT, 8), lm.generate(TEXT, 8, stream=True), lm.decode_steps([lm.encode(TEXT)], 8)
        listed = lm.text_of([s[0] for s in lm.decode_steps([lm.encode(TEXT)], 8)])
    plain, early = lm.generate(TEXT, 8), lm.generate(TEXT, 8, stream=True)
    begun = next(early)
    with lm.steer(two):
        assert "".join(late) == steered != plain
        assert lm.text_of([s[0] for s in steps]) == listed
        assert begun + "".join(early) == plain
        assert lm.generate(TEXT, 8) not in (plain, steered)
    with lm.steer(one), lm.steer(two):
        both = lm.generate(TEXT, 8)
        late = lm.generate(TEXT, 8, stream=True)
    with ThreadPoolExecutor(1) as pool:  # as a server hands the pieces out
        assert pool.submit("".join, late).result() == both
    assert not lm.attached and not lm.open_steerings and lm.steerings is None


def pieces_do_not_steer_what_runs_between_them():
    lm = tiny_lm()
    plain = lm.generate(TEXT, 8)
    pieces = steered_pieces(lm, [TEXT, TEXT], [None, Steering(vector(lm), 2)], max_new_tokens=4)
    next(pieces)
    assert lm.generate(TEXT, 8) == plain
    pieces.close()
    assert not lm.attached


# Threads


def threads_are_steered_each_by_its_own():
    lm = tiny_lm()
    steerings = [Steering(vector(lm, seed), 2, positions=rule) for seed, rule in ((1, "all"), (2, "completion"), (3, "last_1"))] + [None]

    def answer(steering, barrier=None):
        if barrier:
            barrier.wait()
        with lm.steer(steering) if steering else lm.unsteered():
            texts = lm.generate([TEXT] * 2, 12)
            states = lm.hidden_states(TEXT, 3).sum().item()
            ids = torch.tensor([lm.encode(SHORT)])
            return texts, states, theirs(lm, ids), lm.log_probs(TEXT, SHORT).tolist(), "".join(lm.generate(SHORT, 6, stream=True))

    alone = [answer(s) for s in steerings]
    assert len({str(a) for a in alone}) == 4
    for _ in range(4):
        barrier = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(answer, steerings, [barrier] * 4)) == alone
    assert not lm.attached and not [m for m in lm.model.modules() if m._forward_pre_hooks or "forward" in vars(m)]


def direct_calls_in_one_thread_are_not_touched_by_passes_of_another():
    lm, stop = tiny_lm(), threading.Event()
    ids = torch.tensor([lm.encode(TEXT)])
    expected, wrong = lm.model(ids).logits, []

    def direct():
        while not stop.is_set():
            wrong.append(not torch.allclose(lm.model(ids).logits, expected, atol=1e-4))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(direct)
        try:
            for _ in range(10):
                lm.log_probs([TEXT, SHORT], [SHORT, TEXT])
                states = lm.hidden_states(TEXT, 2)[None]
                with lm.resume(2, states):
                    lm.run(ids, torch.ones_like(ids).bool(), torch.tensor([ids.shape[1]]))
        finally:
            stop.set()
    assert wrong and not any(wrong)


def direct_calls_keep_their_own_angles():
    "In a model whose positions depend on the length of a text, next to passes of another thread with as many rows."

    def make():
        return tiny_lm(max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10_000.0))

    lm, stop, ids, wrong = make(), threading.Event(), torch.arange(5, 65).reshape(2, 30), []
    expected = make().model(ids).logits

    def direct():
        while not stop.is_set():
            wrong.append(not torch.allclose(lm.model(ids).logits, expected, atol=1e-4))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(direct)
        try:
            for _ in range(10):
                lm.log_probs([TEXT, SHORT], [SHORT, " the other dogs are sleeping in the warm morning sun"])
        finally:
            stop.set()
        running.result()
    assert wrong and not any(wrong)


def a_pipeline():
    lm = tiny_lm()
    write = pipeline("text-generation", model=lm.model, tokenizer=lm.tok)
    with lm.steer(Steering(vector(lm), 2, positions="last_1")):
        (new,) = write(TEXT, max_new_tokens=6, do_sample=False, return_full_text=False)
        assert new["generated_text"] == lm.generate(TEXT, 6)


def several_sequences_of_each_prompt():
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])
    with lm.steer(rows=[Steering(vector(lm), 2), None]):
        new = theirs(lm, ids.repeat(2, 1), do_sample=True, temperature=0.01, num_return_sequences=2)
    assert new == [wanted("all")] * 2 + theirs(lm, ids) * 2


def the_steered_model_drafts_for_another():
    lm, other = tiny_lm(), tiny_lm(seed=5)
    ids = torch.tensor([lm.encode(TEXT)])
    with lm.steer(Steering(vector(lm), 2, positions="completion")):
        assert theirs(other, ids, assistant_model=lm.model) == theirs(tiny_lm(seed=5), ids)


def a_generate_that_was_taken_before(**options):
    "A bound `generate` that `steer` cannot wrap: a use for every rule that needs the prompt."
    lm = tiny_lm()
    generate, ids = lm.model.generate, torch.tensor([lm.encode(TEXT)])

    def use(rule):
        with lm.steer(Steering(vector(lm), 2, positions=rule)):
            new = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=2,
                           eos_token_id=None, **options)  # fmt: skip
            assert new[0, ids.shape[1] :].tolist() == wanted(rule)

    return [partial(use, rule) for rule in ("completion", "last_1")]


def a_generate_that_was_taken_before_with_a_cache():
    for use in a_generate_that_was_taken_before():
        use()


def two_of_one_model():
    "A second LM around the model that the first one steers, new or in use."
    one = tiny_lm()
    new, used = LM(one.model, one.tok), LM(one.model, one.tok)
    used.generate([TEXT] * 2, 4)

    def use(other, **steered):
        with one.steer(**steered):
            other.generate([TEXT] * 2, 4)

    return [partial(use, other, rows=[Steering(vector(one), 2, positions=rule), None]) for other in (new, used) for rule in RULES]


def two_of_one_model_afterwards():
    for use in two_of_one_model():
        with pytest.raises(SteeredThroughAnother):
            use()
        other = use.args[0]
        assert other.generate(TEXT, 4) == tiny_lm().generate(TEXT, 4) and not other.contract.broken


def in_a_thread_that_says_nothing():
    lm = tiny_lm()
    ids = torch.tensor([lm.encode(TEXT)])

    def use(run):
        with lm.steer(Steering(vector(lm), 2)), ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()

    runs = (lambda: lm.generate(TEXT, 4), lambda: lm.hidden_states(TEXT, 2), lambda: theirs(lm, ids), lambda: lm.model(ids))
    return [partial(use, run) for run in runs]


def after_steering_another_thread_is_free():
    lm = tiny_lm()
    with lm.steer(Steering(vector(lm), 2)):
        lm.generate(TEXT, 4)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lm.generate, TEXT, 4).result() == tiny_lm().generate(TEXT, 4)


def a_streamer_of_transformers():
    lm = tiny_lm()
    streamer = TextIteratorStreamer(lm.tok, timeout=20)

    def use():
        with lm.steer(Steering(vector(lm), 2)), ThreadPoolExecutor(1) as pool:
            pool.submit(lm.model.generate, torch.tensor([lm.encode(TEXT)]), streamer=streamer, max_new_tokens=4).result()

    return [use]


def asynchronous_tasks_are_steered_each_by_its_own():
    lm = tiny_lm()
    steerings = [Steering(vector(lm, 1), 2), Steering(vector(lm, 2), 2)]

    def alone(steering):
        with lm.steer(steering):
            return lm.generate(TEXT, 8)

    async def task(steering):
        with lm.steer(steering):
            await asyncio.sleep(0.01)
            here = lm.generate(TEXT, 8)
            await asyncio.sleep(0.01)
            return here, await asyncio.to_thread(lm.generate, TEXT, 8)

    async def both():
        return await asyncio.gather(*map(task, steerings))

    assert asyncio.run(both()) == [(text, text) for text in map(alone, steerings)]


def a_pass_that_fails_lets_the_next_thread_in(error):
    lm = tiny_lm()
    expected = lm.generate(TEXT, 4)

    def fail(*_):
        raise error

    for run in (lambda: lm.generate(TEXT, 4), lambda: lm.model(torch.tensor([[3, 4]]))):
        with lm.steer(Steering(vector(lm), 2)):
            handle = lm.layers[3].register_forward_pre_hook(fail)
            with pytest.raises(error):
                run()
            handle.remove()
            steered = lm.generate(TEXT, 4)
        assert steered != expected
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lm.generate, TEXT, 4).result(timeout=20) == expected
    assert lm.where is None and not lm.attached
