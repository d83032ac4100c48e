"""Language models: blocks of every family, exact tokens and generation."""


import peft
import pytest
import tokenizers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oneshot_steering import lm as lm_module
from oneshot_steering import models, products
from oneshot_steering.lm import LM, Sampler, Sampling, block_input, find_blocks
from oneshot_steering.models import TINY_ARCHITECTURES, load_lm, tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.steering import Steering

TEXTS = ["the other dogs are sleeping", "a", "There is no reason to think"]


@pytest.fixture(scope="module")
def smol():
    return load_lm(dtype="float32")


def metaspace_lm():
    "A model whose tokenizer puts a space in front of every text, as SentencePiece ones do."
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(
        [models._TINY_TEXT], tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return LM(tiny_model(), PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


BYTE_LEVEL, METASPACE = tiny_lm(), metaspace_lm()
letters = st.characters(codec="utf-8", exclude_characters="<>▁", exclude_categories=["Cs", "Cc"])
some_text = st.text(alphabet=letters, min_size=1, max_size=24)
pieces = ["the", "ther", "morn", "ing", " ", "  ", "read", "o", "s", "\n", "qu", "ick"]
words = st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join)


@settings(max_examples=200, deadline=None)
@given(prompt=st.one_of(some_text, words), completion=st.one_of(some_text, words))
@pytest.mark.parametrize("lm", [BYTE_LEVEL, METASPACE], ids=["byte-level", "metaspace"])
def test_boundary_is_exact_whatever_merges(lm, prompt, completion):
    pair = lm.encode_pair(prompt, completion)
    assert list(pair.prompt) == lm.encode(prompt)
    assert pair.completion
    assert lm.decode(pair.ids) == lm.decode(lm.encode(prompt)) + completion
    assert pair.ids.count(lm.tok.bos_token_id) == 1


@settings(max_examples=100, deadline=None)
@given(prompt=st.one_of(some_text, words), completion=st.one_of(some_text, words))
def test_boundary_on_the_real_tokenizer(smol, prompt, completion):
    assume(all(smol.decode(smol.encode(text)) == text for text in (prompt, completion)))  # its vocabulary lacks a few rare bytes
    pair = smol.encode_pair(prompt, completion)
    assert list(pair.prompt) == smol.encode(prompt) and smol.decode(pair.ids) == prompt + completion


def test_a_merge_really_crosses_some_boundary():
    joined, pair = BYTE_LEVEL.encode("Good morning"), BYTE_LEVEL.encode_pair("Good morn", "ing")
    assert joined[: pair.boundary] != list(pair.prompt)


def test_bos_is_never_doubled(smol):
    lm = tiny_lm()
    lm.tok.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    pair = lm.encode_pair(lm.chat("hello"), " there")
    assert pair.ids.count(lm.tok.bos_token_id) == 1
    chat = smol.chat("hello")
    assert smol.encode(chat) == smol.tok.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )


def test_chat_continues_an_assistant_message(smol):
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    assert smol.chat(conversation) == smol.chat("hi", prefill="Well")
    with pytest.raises(ValueError, match="empty conversation"):
        smol.chat([])


# Families whose number of blocks is not their configuration's number of layers: they want the override, and are told so.
WANT_OVERRIDE = {"blenderbot", "blt", "hrm_text", "longcat_flash", "xlm"}


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_every_family_are_found():
    found, refused = set(), set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
        except Exception:  # this family's default configuration makes no model, or it needs a package that is not here
            continue
        try:
            blocks = find_blocks(model)
            assert len(blocks) == model.config.get_text_config(decoder=True).num_hidden_layers
            found.add(family)
        except ValueError as error:
            assert "Pass layers=" in str(error)
            refused.add(family)
    assert refused <= WANT_OVERRIDE
    assert len(found) > 100, f"only {len(found)} families could be built"


def test_override_path():
    model = tiny_model("gpt2")
    assert LM(model, tiny_tokenizer(), layers="transformer.h").n_layers == 4
    with pytest.raises(ValueError, match=r"transformer\.h \(4\)"):
        LM(model, tiny_tokenizer(), layers="model.layers")


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_greedy_generation_is_transformers_own(architecture):
    lm = tiny_lm(architecture)
    for text, ours in zip(TEXTS, lm.generate(TEXTS, max_new_tokens=10), strict=True):
        ids = torch.tensor([lm.encode(text)])
        theirs = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=2)
        assert lm.text_of(theirs[0, ids.shape[1] :]) == ours


def test_samples_depend_on_seed_and_row_alone():
    lm = tiny_lm()
    texts = ["the other"] * 3 + TEXTS
    sampled = lm.generate(texts, 8, temperature=1.0, seed=5)
    assert sampled == lm.generate(texts, 8, temperature=1.0, seed=5, batch_size=2)
    assert len(set(sampled[:3])) == 3 and sampled != lm.generate(texts, 8, temperature=1.0, seed=6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_rows_that_have_ended_are_not_computed(architecture, temperature):
    lm, texts, batches = tiny_lm(architecture), [*TEXTS, "a fox"], []
    lm.model.generation_config.eos_token_id = None
    settings = dict(temperature=temperature, seed=2)
    free = [lm.decode_steps([lm.encode(t)], 10, [i], Sampler(Sampling(temperature=temperature, seed=2), [i])) for i, t in enumerate(texts)]
    said = [[step[0] for step in steps] for steps in free]
    lm.model.generation_config.eos_token_id = [said[0][2], said[1][4]]
    alone = lm.generate(texts, max_new_tokens=10, batch_size=1, **settings)
    lm.generate(texts, max_new_tokens=10)  # padding is tried out on rows of this length
    handle = lm.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(block_input(args, kwargs))), with_kwargs=True)
    steering = dict(rows=[None] * 3 + [Steering(torch.ones(32), 1)])
    with lm.steer(**steering):
        together = lm.generate(texts, max_new_tokens=10, **settings)
    handle.remove()
    assert together[:3] == alone[:3] and batches[0] == 4 > min(batches)
    with lm.steer(steering["rows"][3]):
        assert together[3] == lm.generate(["a"] * 3 + [texts[3]], max_new_tokens=10, use_cache=False, **settings)[3]


def test_samples_come_from_the_stream_they_are_told():
    lm, settings = tiny_lm(), dict(max_new_tokens=6, temperature=1.0, seed=4)
    assert lm.generate(TEXTS[::-1], streams=[2, 1, 0], batch_size=2, **settings) == lm.generate(TEXTS, **settings)[::-1]
    with pytest.raises(ValueError, match="1 streams for 3 prompts"):
        lm.generate(TEXTS, streams=[0])


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_fast_products_are_pytorchs(architecture):
    lm, ids = tiny_lm(architecture), torch.arange(5, 25)[None]
    start = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def loss_and_gradient():
        v = start.clone().requires_grad_()
        with lm.steer(Steering(v, 1)):
            loss = lm.run(ids, torch.ones_like(ids).bool(), torch.tensor([20])).logits.log_softmax(-1)[0, -1, 7]
        return loss.item(), torch.autograd.grad(loss, v)[0]

    fast, gradient = loss_and_gradient()
    if not lm.shortcuts["fast products"]:
        pytest.skip("This PyTorch has no oneDNN.")
    assert not any("forward" in vars(m) for m in lm.model.modules())
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        plain, wanted = loss_and_gradient()
    finally:
        torch.backends.mkldnn.enabled = before
    assert fast == pytest.approx(plain, abs=1e-4) and torch.allclose(gradient, wanted, atol=1e-4 * wanted.abs().max())


def test_fast_products_leave_trainable_and_other_layers_alone():
    trained, half = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).to(torch.bfloat16).requires_grad_(False)
    both = torch.nn.ModuleList([trained, half])
    with products.onednn_products(both):
        assert trained(torch.ones(2, 4)).grad_fn.name() == "AddmmBackward0"
        assert half(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
        trained.forward = lambda x: x  # somebody else's, inside
        with products.onednn_products(both):
            assert trained(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_equal_prompts_share_their_first_pass(architecture):
    lm, texts = tiny_lm(architecture), ["the other dogs"] * 3 + ["a fox"] * 3
    assert lm.can_share_prompts
    random = lambda i: Steering(8 * torch.randn(32, generator=torch.Generator().manual_seed(i)), 2)
    rows, sizes = [None, *(random(i) for i in range(4)), random(9) + random(8).replace(layers=3, positions="completion")], {}
    count = lambda layer: lambda module, args, kwargs: sizes.setdefault(layer, []).append(len(block_input(args, kwargs)))
    handles = [lm.layers[i].register_forward_pre_hook(count(i), with_kwargs=True) for i in range(4)]
    with lm.steer(rows=rows):
        lm.generate(texts, max_new_tokens=8)  # the shortcut is tried out on rows of this length
        sizes.clear()
        together = lm.generate(texts, max_new_tokens=8)
    assert (sizes[0][0], sizes[1][0]) == (2, 2) and max(sizes[2]) == max(sizes[3]) == 6
    with lm.steer(random(3)):  # the same for all rows: everything is shared
        sizes.clear()
        same = lm.generate(texts, max_new_tokens=8)
        assert {layer: size[0] for layer, size in sizes.items()} == dict.fromkeys(range(4), 2)
        assert same == [lm.generate(t, max_new_tokens=8) for t in texts]
    for handle in handles:
        handle.remove()
    for text, row, found in zip(texts, rows, together, strict=True):
        with lm.steer(*([] if row is None else [row])):
            assert found == lm.generate(text, max_new_tokens=8) == lm.generate(text, max_new_tokens=8, use_cache=False)


def test_a_model_whose_cache_cannot_be_shared_says_so():
    lm = tiny_lm()
    forward = lm.layers[0].forward

    def forgetful(hidden_states, *args, **kwargs):  # keeps something of its own between the passes of a generation
        past = kwargs.get("past_key_values")
        if past is not None:
            past.seen = getattr(past, "seen", 0) + len(hidden_states)
            hidden_states = hidden_states * (1 + past.seen)
        return forward(hidden_states, *args, **kwargs)

    lm.layers[0].forward = forgetful
    assert not lm.can_share_prompts
    texts = ["a fox"] * 2
    ids, mask = lm.pad([lm.encode(t) for t in texts])
    assert lm.run(ids, mask, mask.sum(-1), keep=1, use_cache=True).logits.shape[0] == 2


def test_shortcuts_are_verified_without_steering_also_inside_it():
    lm, extreme = tiny_lm(), Steering(torch.full((32,), torch.finfo(torch.float32).max / 64), 0)
    with lm.steer(rows=[extreme]):
        assert lm.can_share_prompts and lm.can_resume and lm.can_pack
        assert lm.steered == 1 and lm.rows_differ_from == 0
    assert lm.steered == 0 and lm.rows_differ_from is None


def test_shortcuts_can_be_switched_off():
    lm = tiny_lm()
    with lm.plain():
        assert not lm.can_share_prompts and not lm.can_resume and not lm.can_pack
        plain = lm.generate(TEXTS[:1] * 16, 6), lm.log_probs("a fox", " is").tolist()
    assert lm.shortcuts == {} and lm.use_shortcuts
    assert lm.generate(TEXTS[:1] * 16, 6) == plain[0] and lm.log_probs("a fox", " is").tolist() == pytest.approx(plain[1], abs=1e-4)
    assert lm.shortcuts == {"fast products": True, "resume": True, "shared prompts": True, "last MLP": True}


def test_streaming_several_prompts():
    lm = tiny_lm()
    new = [""] * len(TEXTS)
    for row, piece in lm.generate(TEXTS, 10, stream=True):
        new[row] += piece
    assert new == lm.generate(TEXTS, 10)


def test_context_limits_are_respected():
    lm = tiny_lm("gpt2", max_position_embeddings=16)
    assert len(lm.encode(lm.generate("the other dogs", 50))) <= 20
    with pytest.raises(ValueError, match="no room in the context of 16"):
        lm.generate("the other dogs are sleeping in the warm morning sun " * 3)


def test_log_probs_do_not_depend_on_the_batch():
    lm = tiny_lm("gemma3_text")
    completions = [" in the sun", " dog", " that"]
    together = lm.log_probs(TEXTS, completions)
    for text, completion, batched in zip(TEXTS, completions, together, strict=True):
        assert torch.allclose(lm.log_probs(text, completion), batched, atol=1e-5)


def test_wrapped_models(tmp_path):
    model, tok = tiny_model("qwen2"), tiny_tokenizer()
    plain = load_lm((model, tok)).generate("the other", 8)
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert load_lm(tmp_path, dtype="float32").generate("the other", 8) == plain
    assert load_lm(str(tmp_path), dtype="float32", device_map="cpu").generate("the other", 8) == plain
    adapted = peft.get_peft_model(tiny_model("qwen2"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert load_lm((adapted, tok)).generate("the other", 8) == plain
    with pytest.raises(TypeError, match="together with its tokenizer"):
        load_lm(model)


def test_bfloat16_runs_and_log_probs_are_fp32():
    lm = LM(tiny_model().bfloat16(), tiny_tokenizer())
    assert lm.log_probs("the", " dog").dtype == torch.float32 and len(lm.generate("the", 4))


def test_a_bar_is_red_after_an_error_and_not_after_an_early_stop(monkeypatch):
    from tqdm.notebook import tqdm

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(lm_module, "tqdm", tqdm)

    def style(error):
        try:
            with lm_module.Progress(10, "fit", "step", delay=-1) as progress:
                progress.update(3)
                if error: raise error
        except ValueError: pass
        return progress.bar.container.children[1].bar_style

    assert style(ValueError()) == "danger" != style(None)
