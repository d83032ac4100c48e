"""Checks of the cases in test_cases.py: blocks, positions, rows and lengths, against forwards written by hand."""

import math

import pytest
import torch

from oneshot_steering.baselines import caa
from oneshot_steering.lm import LM, UnsupportedModel, block_input
from oneshot_steering.models import tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.objective import Example, Objective, Terms
from oneshot_steering.optimize import optimize
from oneshot_steering.steering import Steering
from oneshot_steering.surprisal import surprisal

TEXTS = ["the quick brown fox", "a dog", "the other dogs are sleeping in the warm sun"]
RULES = {
    "all": lambda at, end: at >= 0,
    "prompt": lambda at, end: at < end,
    "completion": lambda at, end: at >= end,
    "last_2": lambda at, end: (at < end) & (at >= end - 2),
    "2:6": lambda at, end: (at >= 2) & (at < 6),
}


def made(family, **config):
    "A tiny model of a family that wants more than the sizes of `tiny_model`."
    lm = LM(tiny_model(family, **config), tiny_tokenizer(), name=f"tiny-{family}")
    lm.model.generation_config.eos_token_id = None  # random models end at once now and then
    return lm


def gemma4():
    "Gemma 4 whose upper two blocks use the keys and values of lower ones."
    layers = ["sliding_attention", "full_attention"] * 2
    return made("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=320, num_kv_shared_layers=2, sliding_window=8,
                layer_types=layers, global_head_dim=8)


def vector(lm, seed=0, scale=4.0):
    return scale * torch.randn(lm.d_model, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def own_pass(lm, ids, layer, change=None):
    "The model's own forward on one row, with a hook of our own at a block: its logits and the stream that entered the block."
    streams = []

    def hook(module, args, kwargs):
        h = block_input(args, kwargs)
        streams.append(h)
        h = h if change is None else h + change.to(h)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    handle = lm.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), streams[0][0]
    finally:
        handle.remove()


def own_greedy(lm, ids, most, layer, v, rule):
    "Greedy decoding without a cache, v added where a rule says so."
    ids, start = list(ids), len(ids)
    for _ in range(most):
        chosen = rule(torch.arange(len(ids)), start)[:, None] * v
        ids.append(int(own_pass(lm, ids, layer, chosen)[0][-1].argmax()))
    return ids[start:]


def the_head_gets_few_columns_in_one_piece(architecture, dtype):
    lm = gemma4() if architecture == "gemma4_text" else tiny_lm(architecture)
    lm.model.to(dtype)
    ids, mask = lm.pad([lm.encode(t) for t in TEXTS], side="left")
    everywhere, inputs = lm.run(ids, mask, mask.sum(-1)).logits, []
    handle = lm.model.get_output_embeddings().register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    last = [lm.run(ids, mask, mask.sum(-1), keep=n).logits for n in (1, 3)]
    lm.run(ids[:1], mask[:1], mask[:1].sum(-1), keep=1)
    handle.remove()
    assert [i.shape[1] for i in inputs] == [1, 3, 1]
    assert all(i.stride() == torch.empty(i.shape).stride() for i in inputs)  # `is_contiguous` overlooks those of a single row
    assert all(lm.agree(few, everywhere[:, -few.shape[1] :]) for few in last)


def states_of_few_columns():
    lm = gemma4()
    for layer in range(4):
        wanted = [own_pass(lm, lm.encode(t), layer)[1] for t in TEXTS]
        assert all(torch.allclose(s, w, atol=1e-4) for s, w in zip(lm.hidden_states(TEXTS, layer), wanted, strict=True))
        norms = torch.cat([w[1:] for w in wanted]).norm(dim=-1)
        assert lm.stream_norm(layer, TEXTS) == pytest.approx(norms.sort().values[(len(norms) - 1) // 2].item(), rel=0.2)
        mean = wanted[0][-1] - wanted[1][-1]
        assert torch.allclose(caa(lm, TEXTS[:1], TEXTS[1:2], layer).vector, mean, atol=1e-4)


def rules_in_few_columns(layer):
    lm = gemma4()
    v, prompts = vector(lm, 3, 6), [lm.encode(t) for t in TEXTS]
    for rule, chosen in RULES.items():
        with lm.steer(Steering(v, layer, positions=rule)):
            steps = list(lm.decode_steps(prompts, 5))
        for row, ids in enumerate(prompts):
            assert [step[row] for step in steps] == own_greedy(lm, ids, 5, layer, v, chosen)


def optimised_in_few_columns(layer):
    "The first losses by hand, with the default step size."
    lm, pair = gemma4(), tiny_lm().encode_pair("the quick", " brown fox")
    losses = optimize(lm, Example("the quick", promote=" brown fox"), layer, steps=2, progress=False).losses
    log_p = (Objective().coldness * own_pass(lm, list(pair.ids), layer)[0]).log_softmax(-1)
    mine = -sum(log_p[c, pair.ids[c + 1]] for c in pair.columns)
    assert losses[0].sum().item() == pytest.approx(mine.item(), rel=1e-4) and losses[1].sum() < losses[0].sum()


# --- blocks and heads --------------------------------------------------------------------------------------------------------


class Passing(torch.nn.Module):
    "Runs a block some number of times."

    def __init__(self, block, times):
        super().__init__()
        self.block, self.times = block, times

    def forward(self, hidden_states, *args, **kwargs):
        for _ in range(self.times):
            hidden_states = self.block(hidden_states, *args, **kwargs)
        return hidden_states


def probe(lm):
    ids, mask = lm.pad([lm.encode("the quick brown fox")])
    return ids, mask, mask.sum(-1)


def uses_of(lm, text="the fox"):
    return [lambda: lm.generate(text, 2), lambda: lm.log_probs(text, " dog"), lambda: lm.hidden_states(text, 1)]


def an_encoder(family):
    return uses_of(made(family))


def no_head():
    return uses_of(LM(tiny_model("llama").model, tiny_tokenizer()))


def with_head(inputs, outputs):
    lm = tiny_lm()
    lm.model.lm_head = torch.nn.Linear(inputs, outputs)
    return uses_of(lm)


class Mixing(torch.nn.Linear):
    "A head in which what it gives a token depends on other tokens that it is given: on all of them, or on the earlier ones."

    def __init__(self, earlier):
        super().__init__(32, 320, bias=False)
        self.earlier = earlier

    def forward(self, h):
        each = h.mean(2, keepdim=True)
        mixed = each.cumsum(1) if self.earlier else each.mean(1, keepdim=True)
        return super().forward(h) + mixed * torch.arange(self.out_features)


def with_mixing_head(earlier):
    lm = tiny_lm()
    torch.manual_seed(0)
    lm.model.lm_head = Mixing(earlier).requires_grad_(False)
    return LM(lm.model, tiny_tokenizer(), name="a tiny Llama whose head mixes tokens")


def a_head_that_mixes_in_later_tokens():
    return uses_of(with_mixing_head(earlier=False))


def a_head_that_mixes_in_earlier_tokens():
    lm, completion = with_mixing_head(earlier=True), " jumps"
    start = len(lm.encode(TEXTS[0]))
    ids = lm.encode(TEXTS[0]) + lm.tok.encode(completion, add_special_tokens=False)
    own = own_pass(lm, ids, 0)[0].log_softmax(-1)
    expected = sum(own[i - 1, ids[i]] for i in range(start, len(ids))).item()
    assert sum(lm.log_probs(TEXTS[0], completion)) == pytest.approx(expected, rel=1e-3)
    assert not lm.few_logits and not lm.can_pack


def weights_that_are_no_numbers():
    lm = tiny_lm()
    with torch.no_grad():
        lm.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    return uses_of(lm)


def in_training_mode():
    lm = LM(tiny_model("gpt2"), tiny_tokenizer(), name="a tiny GPT-2")
    lm.log_probs("the fox", " is")
    lm.model.train()
    return uses_of(lm)


def in_training_mode_without_dropout():
    lm = tiny_lm()
    before = lm.log_probs("the fox", " is")
    lm.model.train()
    torch.testing.assert_close(lm.log_probs("the fox", " is"), before)


def products_of_less_precision(precision, bound):
    lm, before = tiny_lm(), torch.get_float32_matmul_precision()
    lm.ready()
    mark = lm.checked_as
    try:
        torch.set_float32_matmul_precision(precision)
        lm.ready()
        assert lm.tolerance == bound and lm.checked_as != mark
    finally:
        torch.set_float32_matmul_precision(before)
    lm.ready()
    assert lm.tolerance == 1e-3 and lm.checked_as == mark


def a_comparison_that_runs_out_of_memory():
    lm = tiny_lm()

    def compare():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        lm.verified("a shortcut", compare)
    assert "a shortcut" not in lm.shortcuts


def positions_that_do_not_begin_at_zero(dtype):
    lm = made("roberta", is_decoder=True, pad_token_id=2, max_position_embeddings=64)
    lm.model.to(dtype)
    own = [own_pass(lm, lm.encode(t), 1) for t in TEXTS]
    assert all(lm.agree(s, state) for s, (_, state) in zip(lm.hidden_states(TEXTS, 1), own, strict=True))
    assert lm.first_position == 3
    if dtype == torch.float32:
        assert lm.generate(TEXTS, 5) == [lm.text_of(own_greedy(lm, lm.encode(t), 5, 1, vector(lm, scale=0), RULES["all"])) for t in TEXTS]


def beyond_the_context():
    return uses_of(tiny_lm("gpt2", max_position_embeddings=16), "the other dogs are sleeping in the warm morning sun")


def beyond_the_vocabulary():
    lm = tiny_lm()
    lm.tok.add_tokens(["zzz"])
    return uses_of(lm, "a zzz")


GEMMA3N = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=320, num_kv_shared_layers=2, laurel_rank=8, sliding_window=8,
               layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=[64] * 4,
               activation_sparsity_pattern=[0.0] * 4)  # fmt: skip


def several_streams(family, **config):
    lm = made(family, **config)
    example = Example("the quick", promote=" brown fox")
    return [lambda: lm.hidden_states(TEXTS, 2), lambda: lm.stream_norm(2), lambda: optimize(lm, example, 2, steps=1, progress=False),
            lambda: caa(lm, TEXTS[:1], TEXTS[1:2], 2), lambda: lm.steer(Steering(vector(lm), 2)).__enter__()]  # fmt: skip


def what_needs_no_stream(family, **config):
    lm = made(family, **config)
    ids = lm.encode(TEXTS[0])
    assert torch.allclose(lm.run(*probe(lm)).logits[0], lm.model(torch.tensor([ids]), use_cache=False).logits[0], atol=1e-4)


def what_needs_padding(family):
    lm = made(family)
    with pytest.raises(UnsupportedModel, match="one text at a time"):
        lm.pad([lm.encode(t) for t in TEXTS], side="left")


def a_block_that_is_run(times):
    lm = tiny_lm()
    lm.model.model.layers[2] = Passing(lm.layers[2], times)
    lm.layers = torch.nn.ModuleList([*lm.layers[:2], getattr(lm.layers[2], "block", lm.layers[2]), lm.layers[3]])
    lm.hidden_states("a dog", 1)
    return [lambda: lm.hidden_states("a dog", 2), lambda: lm.steer(Steering(vector(lm), 2)).__enter__()]


def rwkv():
    return made("rwkv", attention_hidden_size=32, context_length=64)


def rows_where_padding_changes_them():
    lm, texts = rwkv(), [*TEXTS, "a fox"]
    assert lm.generate(texts, 4) == [lm.generate(t, 4) for t in texts]
    own = [own_pass(lm, lm.encode(t), 2)[1] for t in texts]
    assert all(torch.allclose(s, o, atol=1e-4) for s, o in zip(lm.hidden_states(texts, 2), own, strict=True))


def padded_where_padding_changes_a_row():
    lm = rwkv()
    return [lambda: lm.pad([[5, 6], [5]], side="left")]


# --- positions that change with the length of a text -----------------------------------------------------------------------


def dynamic():
    return made("llama", max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10_000.0))


def long_rope():
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0, 5.0, 6.0, 7.0])
    rope = dict(rope_type="longrope", rope_theta=10_000.0, original_max_position_embeddings=16, **factors)
    return made("phi3", rope_parameters=rope, original_max_position_embeddings=16, max_position_embeddings=64, pad_token_id=2)


FIXED = dict(
    linear=dict(factor=4.0),
    yarn=dict(factor=4.0, original_max_position_embeddings=16),
    llama3=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
)


def scaled(kind):
    "Angles that are the same in texts of every length, also beyond the original context."
    return made("llama", max_position_embeddings=64, rope_parameters=dict(rope_type=kind, rope_theta=10_000.0, **FIXED[kind]))


@torch.no_grad()
def alone(make, ids):
    "Logits of a text in a model that has seen no other."
    return make().model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def a_row_does_not_depend_on_the_length_of_its_neighbours(make):
    lm, rows = make(), [list(range(5, 5 + n)) for n in (12, 24, 3, 30, 12)]
    ids, mask = lm.pad(rows)
    for _ in range(2):  # what was seen before does not count either
        logits = lm.run(ids, mask, mask.sum(-1)).logits
        with lm.plain():
            assert torch.allclose(logits[mask], lm.run(ids, mask, mask.sum(-1)).logits[mask], atol=1e-4)
        for row, own in zip(logits, rows, strict=True):
            assert torch.allclose(row[: len(own)], alone(make, own), atol=1e-4)
    assert not any("forward" in vars(m) for m in lm.model.modules())


def cached_generation_is_generation_without_a_cache(make):
    lm, prompts = make(), [list(range(5, 5 + n)) for n in (11, 6, 20)]
    steps = list(lm.decode_steps(prompts, 12))
    for i, ids in enumerate(prompts):
        said = list(ids)
        for _ in range(12):
            said.append(int(alone(make, said)[-1].argmax()))
        assert [step[i] for step in steps] == said[len(ids) :]


def losses_on_both_sides_of_the_switch():
    lm = long_rope()
    prompt, completions = "the other dogs are", [" a", " sleeping in the warm morning sun while the"]
    losses = Terms(lm, [Example(prompt, promote=completions)], Objective(coldness=1.0))(None)
    for loss, completion in zip(losses.tolist(), completions, strict=True):
        assert loss == pytest.approx(-sum(own_log_probs(long_rope, lm.encode_pair(prompt, completion))), abs=1e-3)


def own_log_probs(make, pair):
    "Of a completion, in the model's own forward over the pair."
    logits = alone(make, list(pair.ids[:-1]))[pair.boundary - 1 :]
    return logits.log_softmax(-1).gather(-1, torch.tensor(pair.completion)[:, None])[:, 0].tolist()


def surprisal_across_the_switch():
    lm, prompt, ends = long_rope(), "the other dogs are", [" a", " sleeping in the warm morning sun while the"]
    for bits, end in zip(surprisal(lm, ends, prompt).bits, ends, strict=True):
        nats = own_log_probs(long_rope, lm.encode_pair(prompt, end))
        assert (torch.as_tensor(bits) * math.log(2)).tolist() == pytest.approx([-n for n in nats], abs=1e-3)
