"""On any model right or refused: compared with forwards written by hand, on tiny models made from configurations."""

import pytest
import torch

from oneshot_steering.baselines import caa
from oneshot_steering.lm import LM, block_input
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.steering import Steering

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*TINY_ARCHITECTURES, "gemma4_text"])
def test_the_head_gets_few_columns_in_one_piece(architecture, dtype):
    lm = gemma4() if architecture == "gemma4_text" else tiny_lm(architecture)
    lm.model.to(dtype)
    ids, mask = lm.pad([lm.encode(t) for t in TEXTS], side="left")
    everywhere, inputs = lm.run(ids, mask, mask.sum(-1)).logits, []
    handle = lm.model.get_output_embeddings().register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    last = [lm.run(ids, mask, mask.sum(-1), keep=n).logits for n in (1, 3)]
    handle.remove()
    assert [i.shape[1] for i in inputs] == [1, 3] and all(i.is_contiguous() for i in inputs)
    assert all(lm.agree(few, everywhere[:, -few.shape[1] :]) for few in last)


def test_states_of_a_model_that_would_compute_only_the_last_columns():
    lm = gemma4()
    for layer in range(4):
        wanted = [own_pass(lm, lm.encode(t), layer)[1] for t in TEXTS]
        assert all(torch.allclose(s, w, atol=1e-4) for s, w in zip(lm.hidden_states(TEXTS, layer), wanted, strict=True))
        norms = torch.cat([w[1:] for w in wanted]).norm(dim=-1)
        assert lm.stream_norm(layer, TEXTS) == pytest.approx(norms.sort().values[(len(norms) - 1) // 2].item(), rel=0.2)
        mean = wanted[0][-1] - wanted[1][-1]
        assert torch.allclose(caa(lm, TEXTS[:1], TEXTS[1:2], layer).vector, mean, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [2, 3])
def test_rules_in_a_model_that_would_compute_only_the_last_columns(layer, rule):
    lm = gemma4()
    v, prompts = vector(lm, 3, 6), [lm.encode(t) for t in TEXTS]
    with lm.steer(Steering(v, layer, positions=rule)):
        steps = list(lm.decode_steps(prompts, 5))
    for row, ids in enumerate(prompts):
        assert [step[row] for step in steps] == own_greedy(lm, ids, 5, layer, v, RULES[rule])
