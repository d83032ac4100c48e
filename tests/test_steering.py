"""Steering: equal to a forward written by hand, the same under cache and padding, restored, and safe on disk."""

import os
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_steering.lm import LM
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.steering import MODES, Steering, SteeringFileError, Steerings, load_steering, save_steering

TEXTS = ["the other dogs are sleeping", "a", "There is no reason to think"]
RULES = ["all", "prompt", "completion", "last_2", slice(1, 4), slice(-2, None), slice(None, -1)]
each_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
each_mode = pytest.mark.parametrize("mode", MODES)


def vector(seed=0, size=32, scale=3.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def steering(mode="add", layers=2, positions="all", strength=1.0, seed=0):
    source = torch.Generator().manual_seed(seed + 100)
    factors = {k: torch.randn(2, 32, generator=source) / 3 for k in ("left", "right")} if mode == "affine" else {}
    return Steering(vector(seed), layers, mode, positions, strength, **factors)


def chosen(rule, prompt, total):
    "Positions that a rule steers, from Python's own slicing."
    if isinstance(rule, slice):
        absolute = slice(*(b if b is None or b >= 0 else max(prompt + b, 0) for b in (rule.start, rule.stop)))
        return list(range(total))[absolute]
    spans = {"all": (0, total), "prompt": (0, prompt), "completion": (prompt, total), "last_2": (max(prompt - 2, 0), prompt)}
    return list(range(*spans[rule]))


def edited(h, s):
    "The four maps, one token at a time, from their formulas."
    v, c = s.vector, s.strength
    along = (v @ h) / (v @ v) * v
    if s.mode == "add":
        return h + c * v
    if s.mode == "clamp":
        return h - along + c * v
    if s.mode == "ablate":
        return h - c * along
    return h + c * (s.left.T @ s.right @ h + v)


def logits_by_hand(lm, ids, prompt, s, rule):
    "A forward written by hand: each block's own forward, fed with edited states."
    before = {}
    for layer in s.layers:
        block = lm.layers[layer]
        before[layer] = block.forward

        def forward(hidden_states, *args, original=block.forward, **kwargs):
            h = hidden_states.clone()
            for position in chosen(rule, prompt, len(ids)):
                h[0, position] = edited(h[0, position], s)
            return original(h, *args, **kwargs)

        block.forward = forward
    try:
        return lm.model(torch.tensor([ids])).logits[0]
    finally:
        for layer, original in before.items():
            lm.layers[layer].forward = original


@torch.no_grad()
@each_architecture
@each_mode
def test_equals_a_forward_written_by_hand(architecture, mode):
    lm = tiny_lm(architecture)
    pairs = [lm.encode_pair(t, " in the sun") for t in TEXTS]
    ids, mask = lm.pad([p.ids for p in pairs], side="left")
    lengths = torch.tensor([p.boundary for p in pairs])
    for rule in RULES:
        s = steering(mode, layers=(1, 3), positions=rule, strength=-0.7)
        with lm.steer(s):
            batched = lm.run(ids, mask, lengths).logits
        for row, pair in enumerate(pairs):
            expected = logits_by_hand(lm, pair.ids, pair.boundary, s, rule)
            assert torch.allclose(batched[row][mask[row]], expected, atol=2e-4), (rule, row)


@each_architecture
@each_mode
def test_same_text_with_and_without_cache_and_padding(architecture, mode):
    lm = tiny_lm(architecture)
    for rule in RULES:
        with lm.steer(steering(mode, positions=rule)):
            alone = [lm.generate(t, 6) for t in TEXTS]
            assert lm.generate(TEXTS, 6) == lm.generate(TEXTS, 6, use_cache=False) == alone, rule


def test_rules_differ_from_one_another():
    lm, texts = tiny_lm(), set()
    for rule in RULES:
        with lm.steer(steering(positions=rule)):
            texts.add(lm.generate(TEXTS[0], 8))
    assert len(texts) >= 4


@torch.no_grad()
def test_several_vectors_compose_in_order():
    lm, first, second = tiny_lm(), steering("add", 2, seed=1), steering("clamp", 2, seed=2)
    plain = lm.hidden_states(TEXTS[0], 2)
    with lm.steer(first + second):
        together = lm.hidden_states(TEXTS[0], 2)
    with lm.steer(first), lm.steer(second):
        nested = lm.hidden_states(TEXTS[0], 2)
    expected = torch.stack([edited(edited(h, first), second) for h in plain])
    assert torch.allclose(together, expected, atol=1e-4) and torch.equal(together, nested)


def leftovers(lm):
    return [m for m in lm.model.modules() if m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_always_restores(error):
    lm = tiny_lm()
    before = lm.model(torch.tensor([[3, 4, 5]])).logits
    with pytest.raises(error), lm.steer(steering()), lm.steer(steering("clamp", (0, 3))):
        stream = lm.generate("the", 5, stream=True)
        next(stream)
        raise error
    assert not leftovers(lm) and lm.where is None
    assert torch.equal(lm.model(torch.tensor([[3, 4, 5]])).logits, before)


def test_inner_context_leaves_the_outer_one():
    lm, outer = tiny_lm(), steering()
    with lm.steer(outer):
        expected = lm.generate("the", 6)
        with lm.steer(-outer):
            pass
        assert lm.generate("the", 6) == expected


def test_an_error_inside_a_block_restores_too():
    lm = tiny_lm()
    handle = lm.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), lm.steer(steering()):
        lm.generate("the", 2)
    handle.remove()
    assert not leftovers(lm) and lm.where is None


def test_rows_follow_their_prompts_through_sorting_and_batches():
    lm = tiny_lm("gemma2")
    rows = [None, steering("clamp"), Steerings([steering("affine", (0, 1)), steering("add", 3, "last_2")]), -steering()]
    texts = [*TEXTS, "x y z"]
    with lm.steer(rows=rows):
        mixed, scores = lm.generate(texts, 6, batch_size=2), lm.log_probs(texts, [" dog"] * 4, batch_size=3)
    for text, row, new, score in zip(texts, rows, mixed, scores, strict=True):
        with lm.steer(*([] if row is None else [row])):
            assert lm.generate(text, 6) == new
            assert torch.allclose(lm.log_probs(text, " dog"), score, atol=1e-4)


def test_bfloat16_streams_keep_their_dtype():
    lm = LM(tiny_model().bfloat16(), tiny_tokenizer())
    with lm.steer(steering("clamp")):
        assert lm.hidden_states("the other", 3).dtype == torch.bfloat16


def test_another_model_warns_unless_forced():
    lm, foreign = tiny_lm(), steering().replace(about={"model": "another"})
    with pytest.warns(UserWarning, match="another"), lm.steer(foreign):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lm.steer(foreign, force=True), lm.steer(steering().replace(about={"model": lm.name})):
            pass


def test_a_block_run_alone_does_not_guess():
    lm = tiny_lm("gpt2")
    with lm.steer(steering("add", 0)), pytest.raises(RuntimeError, match="positions are unknown"):
        lm.layers[0](torch.zeros(1, 3, 32))


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    layers=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    rule=st.sampled_from(["all", "prompt", "completion", "last_7", "2:5", "-3:", ":4"]),
    strength=st.floats(-1e6, 1e6),
)
def test_files_round_trip(tmp_path_factory, mode, layers, rule, strength):
    path = tmp_path_factory.mktemp("files") / "v.safetensors"
    saved = steering(mode, layers, rule, strength).replace(about={"model": "m", "losses": {"promote 'é'": 0.5}})
    again = load_steering(saved.save(path))
    assert all(torch.equal(t, getattr(again, k)) for k, t in saved.named_tensors())
    fields = ("layers", "mode", "positions", "strength", "about")
    assert [getattr(saved, k) for k in fields] == [getattr(again, k) for k in fields]


def test_truncated_anywhere_is_refused(tmp_path):
    whole = steering("affine").save(tmp_path / "v.safetensors").read_bytes()
    for size in [0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(SteeringFileError, match="truncated or not a safetensors file"):
            load_steering(tmp_path / "cut.safetensors")


def test_foreign_and_inconsistent_files_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    for tensors, metadata in [
        ({"a": torch.ones(2)}, None),
        ({"a": torch.ones(2)}, {"format": "oneshot-steering/1", "steerings": "[]"}),
        ({"0.vector": torch.ones(2)}, {"format": "oneshot-steering/1", "steerings": "{"}),
        ({"0.vector": torch.ones(2)}, {"format": "oneshot-steering/1", "steerings": '[{"layers": [0], "mode": "push"}]'}),
        ({"0.vector": torch.tensor([torch.nan])}, {"format": "oneshot-steering/1", "steerings": '[{"layers": [0]}]'}),
    ]:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        with pytest.raises(SteeringFileError):
            load_steering(path)
    with pytest.raises(FileNotFoundError):
        load_steering(tmp_path / "nothing.safetensors")
    saved = Steering(torch.ones(16), 0).save(path)
    with pytest.raises(ValueError, match="width 16"):
        load_steering(saved, tiny_lm())


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = steering(seed=1).save(tmp_path / "v.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_steering(steering(seed=2), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
