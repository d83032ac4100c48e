"""Surprisal: bits by hand, a shared context that changes nothing, exact tokens, and errors before work."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_steering.lm import LM
from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.steering import Steering
from oneshot_steering.surprisal import complexity, in_context, plain_text, surprisal, turn_end

CONTEXT = "The quick brown fox jumps over the lazy dog while the other dogs are sleeping. "
PROMPTS = ["the other", "There is no", "a fox in the warm morning", "the other"]
TEXTS = [" dogs are sleeping", " reason to think that the thing you are reading is anything", " sun", "s"]
each_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)


@torch.no_grad()
def by_hand(lm, prompt, text):
    "Bits of each token of a text from one unpadded pass over everything."
    pair = lm.encode_pair(prompt, text)
    logits = lm.model(torch.tensor([pair.ids])).logits[0].double()
    chosen = logits.softmax(-1)[range(pair.boundary - 1, len(pair.ids) - 1), list(pair.completion)]
    return -chosen.log2().float()


def passes(lm):
    "Counts the tokens that the first block is given."
    seen = []
    lm.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return seen


@each_architecture
@pytest.mark.parametrize("context", ["", "a fox. ", CONTEXT], ids=["none", "short", "beyond the window"])
def test_bits_by_hand_with_and_without_sharing(architecture, context):
    lm = tiny_lm(architecture)
    for batch_size in (1, 3, 16):
        for share in (True, False):
            found = surprisal(lm, TEXTS, PROMPTS, context, share=share, batch_size=batch_size)
            for prompt, text, bits, pieces in zip(PROMPTS, TEXTS, found.bits, found.pieces, strict=True):
                assert torch.allclose(bits, by_hand(lm, context + prompt, text), atol=1e-3), (share, batch_size, text)
                assert "".join(pieces) == text
    assert all(lm.shortcuts.values())


@each_architecture
def test_the_context_is_run_once(architecture):
    lm = tiny_lm(architecture)
    surprisal(lm, TEXTS, PROMPTS, CONTEXT)  # finds out whether sharing is exact
    counts = passes(lm)
    surprisal(lm, TEXTS, PROMPTS, CONTEXT)
    shared = sum(counts)
    counts.clear()
    surprisal(lm, TEXTS, PROMPTS, CONTEXT, share=False)
    length = len(lm.encode(CONTEXT)) - 1  # the last token may differ: it can merge with the prompt
    assert sum(counts) - shared >= (len(TEXTS) - 1) * (length - 1)


def test_a_cache_that_lies_is_found_out():
    lm = tiny_lm()
    honest = lm.model.forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:  # forgets what it has read
            for layer in past_key_values.layers:
                layer.keys.zero_()
        return honest(*args, past_key_values=past_key_values, **kwargs)

    lm.model.forward = forward
    found = surprisal(lm, TEXTS, PROMPTS, CONTEXT)
    assert lm.shortcuts["shared start"] is False
    lm.model.forward = honest
    for prompt, text, bits in zip(PROMPTS, TEXTS, found.bits, strict=True):
        assert torch.allclose(bits, by_hand(lm, CONTEXT + prompt, text), atol=1e-3)


def test_a_model_without_a_cache_is_judged_the_plain_way():
    lm = tiny_lm()
    expected = surprisal(lm, TEXTS, PROMPTS, CONTEXT, share=False)
    honest = lm.model.forward

    def forward(*args, past_key_values=None, use_cache=None, **kwargs):
        assert past_key_values is None
        return honest(*args, use_cache=False, **kwargs)

    lm.model.forward = forward
    found = surprisal(lm, TEXTS, PROMPTS, CONTEXT)
    assert torch.allclose(torch.cat(found.bits), torch.cat(expected.bits), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_are_steered_each_by_its_own_vector(architecture):
    lm = tiny_lm(architecture)
    source = torch.Generator().manual_seed(0)
    rows = [None, *(Steering(5 * torch.randn(32, generator=source), 2, positions=p) for p in ("all", "last_2", "completion"))]
    with lm.steer(rows=rows):
        together = surprisal(lm, TEXTS, PROMPTS, CONTEXT, batch_size=2)
    for row, prompt, text, bits in zip(rows, PROMPTS, TEXTS, together.bits, strict=True):
        with lm.steer(*([] if row is None else [row])):
            assert torch.allclose(surprisal(lm, text, prompt, CONTEXT).bits[0], bits, atol=1e-3)


def test_half_precision_shares_too():
    lm = LM(tiny_model().bfloat16(), tiny_tokenizer())
    found = surprisal(lm, TEXTS, PROMPTS, CONTEXT)
    assert lm.shortcuts["shared start"] and all(b.dtype == torch.float32 for b in found.bits)
    plain = surprisal(lm, TEXTS, PROMPTS, CONTEXT, share=False)
    assert (torch.cat(found.bits) - torch.cat(plain.bits)).abs().mean() < 0.1


def test_the_cap_cuts_tokens_not_prompts():
    lm = tiny_lm()
    whole, capped = surprisal(lm, TEXTS, PROMPTS, CONTEXT, cap=None), surprisal(lm, TEXTS, PROMPTS, CONTEXT, cap=2)
    assert [len(b) for b in capped.bits] == [min(2, len(b)) for b in whole.bits]
    for short, long in zip(capped.bits, whole.bits, strict=True):
        assert torch.allclose(short, long[:2], atol=1e-3)
    assert max(len(b) for b in surprisal(lm, " the" * 120, "a", cap=100).bits) == 100


def test_table_and_summary():
    lm = tiny_lm()
    found = surprisal(lm, [*TEXTS, ""], [*PROMPTS, "a"])
    table = found.frame()
    for i, bits in enumerate(found.bits[:-1]):
        assert table.bits[i] == pytest.approx(bits.mean().item()) and table.total[i] == pytest.approx(bits.sum().item())
        assert table.tokens[i] == len(bits) and table.text[i] == TEXTS[i]
    assert math.isnan(table.bits[4]) and table.tokens[4] == 0
    assert found.mean == pytest.approx(table.total.sum() / table.tokens.sum(), rel=1e-4)
    summary = found.summary().loc["all"]
    assert summary.texts == 4 and summary.tokens == table.tokens.sum()
    assert summary["median"] == pytest.approx(sum(sorted(table.bits[:4])[1:3]) / 2)
    assert summary.low <= summary["median"] <= summary.high
    groups = found.summary(["x", "y", "x", "y", "y"])
    assert groups.texts.tolist() == [2, 2] and groups["median"].x == pytest.approx((table.bits[0] + table.bits[2]) / 2)


def test_one_beginning_of_sequence_token():
    lm = tiny_lm()
    plain, marked = surprisal(lm, " dogs", "the other"), surprisal(lm, " dogs", "<bos>the other")
    assert torch.equal(plain.bits[0], marked.bits[0])
    with pytest.raises(ValueError, match="Completion 1 has a second '<bos>' inside"):
        surprisal(lm, [" dogs", " dogs"], ["the other", "<bos>the other"], CONTEXT)
    assert surprisal(lm, " dogs", plain_text(lm, "<bos>the other"), CONTEXT).mean > 0


def test_errors_before_work():
    lm = tiny_lm()
    counts = passes(lm)
    for message, call in [
        ("No completions", lambda: surprisal(lm, [])),
        ("3 prompts but 4 completions", lambda: surprisal(lm, TEXTS, PROMPTS[:3])),
        ("cap must be at least 1", lambda: surprisal(lm, TEXTS, cap=0)),
        ("more than the context of 256.*shorten context= or lower cap=", lambda: surprisal(lm, TEXTS, context=CONTEXT * 20)),
        ("at least two tokens", lambda: complexity(lm, "")),
        ("at least one sample", lambda: in_context(lm, [])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not counts
    assert surprisal(lm, [""], ["a"]).bits[0].shape == (0,)


def test_complexity_by_hand():
    lm = tiny_lm("gemma2")
    assert complexity(lm, CONTEXT) == pytest.approx(by_hand(lm, "<bos>", CONTEXT).mean().item(), rel=1e-4)
    bare = tiny_lm()
    bare.tok._tokenizer.post_processor = None  # no beginning-of-sequence token: the first token has nothing before it
    ids = bare.encode("a fox in the sun")
    logits = bare.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    expected = -logits.gather(-1, torch.tensor(ids[1:])[:, None]).mean().item() / math.log(2)
    assert bare.encode("") == [] and complexity(bare, "a fox in the sun") == pytest.approx(expected, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<bos>", "<eos>", "<pad>", "<", "bos", ">", " ", "a fox"]), max_size=8))
def test_plain_text_has_no_special_token(parts):
    lm = tiny_lm()
    plain = plain_text(lm, "".join(parts))
    assert not set(lm.tok(plain, add_special_tokens=False).input_ids) & set(lm.tok.all_special_ids)
    assert plain.replace(" ", "") == "".join(parts).removeprefix("<bos>").replace(" ", "")


def test_samples_in_a_template():
    lm = tiny_lm()
    assert turn_end(lm) == "\n\n"
    turns = "{% for m in messages %}<eos>{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}"
    lm.tok.chat_template = "<bos>" + turns + "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
    assert turn_end(lm) == "<pad>\n"
    samples = [(lm.chat("a fox"), "the other dogs"), (lm.chat("the sun", prefill="There"), " is no reason")]
    context = in_context(lm, samples, turn_end(lm), cap=2)
    first, second = (lm.encode_pair(f"x{p}", t).completion[:2] for p, t in [("\n", "the other dogs"), ("There", " is no reason")])
    assert context == (f"< eos>user\na fox< pad>\n< eos>assistant\n{lm.decode(first)}< pad>\n"
                       f"< eos>user\nthe sun< pad>\n< eos>assistant\nThere{lm.decode(second)}< pad>\n")  # fmt: skip
    assert in_context(lm, [("a", "é")], cap=1) == "a\n\n"  # half a character is left out
