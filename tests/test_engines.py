"""Compiled models, adapters, folders, other engines, gradients switched off: right, or refused in one sentence."""

import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig

from oneshot_steering.export import bake
from oneshot_steering.lm import LM, UnsupportedModel
from oneshot_steering.models import load_lm, tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.objective import Example, Terms, record
from oneshot_steering.optimize import Retain, optimize
from oneshot_steering.steering import Steering

IDS = torch.tensor([tiny_lm().encode("the quick brown fox")])
EXAMPLE = Example("the quick", promote=[" brown fox", " brown dog"])
VECTOR = Steering(4 * torch.randn(32, generator=torch.Generator().manual_seed(0)), 2)


def by_hand(model, vector=None):
    "Logits with a hook of our own, on a model that nothing else has touched."

    def push(module, args):
        return (args[0] + VECTOR.vector.to(args[0]), *args[1:])

    handle = model.model.layers[2].register_forward_pre_hook(push) if vector else None
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits.float()
    if handle:
        handle.remove()
    return logits


def our_logits(lm):
    with torch.no_grad():
        return lm.run(IDS, torch.ones_like(IDS).bool(), torch.tensor([IDS.shape[1]])).logits.float()


def close(one, other, dtype=torch.float32):
    return (one - other).abs().max() <= (1e-4 if dtype == torch.float32 else 3e-2) * other.abs().max()


def compile_blocks(model):
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def wrap_blocks(model):
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WAYS = {"torch.compile(model)": lambda m: torch.compile(m, backend="eager"), "model.compile()": compile_in_place,
        "blocks": compile_blocks, "wrapped blocks": wrap_blocks, "model.forward": compile_forward}  # fmt: skip


@pytest.mark.parametrize("way, dtype", [(way, torch.bfloat16) for way in WAYS] + [("torch.compile(model)", torch.float32)])
def test_a_compiled_model_is_steered_and_stays_compiled(way, dtype):
    torch._dynamo.reset()
    plain, steered = by_hand(tiny_model().to(dtype)), by_hand(tiny_model().to(dtype), VECTOR)
    used = WAYS[way](tiny_model().to(dtype))
    with torch.no_grad():
        assert close(used(input_ids=IDS, use_cache=False).logits.float(), plain, dtype)  # compiled, before anything is steered
    lm = LM(used, tiny_tokenizer())
    assert close(our_logits(lm), plain, dtype)
    with lm.steer(VECTOR):
        assert close(our_logits(lm), steered, dtype)
        with torch.no_grad():
            assert close(used(input_ids=IDS, use_cache=False).logits.float(), steered, dtype)  # the caller's own call
    with torch.no_grad():
        assert close(used(input_ids=IDS, use_cache=False).logits.float(), plain, dtype)
    assert torch._dynamo.eval_frame._stance.stance == "default"
    losses = [optimize(m, EXAMPLE, 2, steps=3, lr=0.3, progress=False).losses for m in (lm, LM(tiny_model().to(dtype), tiny_tokenizer()))]
    assert torch.allclose(*losses, rtol=1e-3 if dtype == torch.float32 else 5e-2)


def test_a_model_steered_before_it_is_compiled():
    torch._dynamo.reset()
    lm = tiny_lm()
    compiled = torch.compile(lm.model, backend="eager")
    with lm.steer(VECTOR), torch.no_grad():
        assert close(compiled(input_ids=IDS, use_cache=False).logits, by_hand(tiny_model(), VECTOR))
    with torch.no_grad():
        assert close(compiled(input_ids=IDS, use_cache=False).logits, by_hand(tiny_model()))


PROMPTS = dict(num_virtual_tokens=4, task_type="CAUSAL_LM")
REFUSED = {"prompt tuning": peft.PromptTuningConfig(**PROMPTS), "prefix tuning": peft.PrefixTuningConfig(**PROMPTS),
           "p tuning": peft.PromptEncoderConfig(**PROMPTS, encoder_hidden_size=16),
           "activated LoRA": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8], r=2)}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_act_by_place_are_refused(kind):
    with pytest.raises(ValueError, match=kind) as error:
        LM(peft.get_peft_model(tiny_model(), REFUSED[kind]), tiny_tokenizer())
    assert len(str(error.value)) < 300


WEIGHTS = {"LoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
           "DoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, use_dora=True),
           "IA3": peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False, target_modules=["k_proj", "v_proj", "down_proj"],
                                 feedforward_modules=["down_proj"])}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_adapters_that_change_weights_are_part_of_the_model(kind):
    torch.manual_seed(0)
    lm = LM(peft.get_peft_model(tiny_model(), WEIGHTS[kind]), tiny_tokenizer())
    torch.manual_seed(0)
    merged = LM(peft.get_peft_model(tiny_model(), WEIGHTS[kind]).merge_and_unload(), tiny_tokenizer())
    assert not close(our_logits(lm), by_hand(tiny_model()))
    assert close(our_logits(lm), by_hand(merged.model))
    with lm.steer(VECTOR):
        assert close(our_logits(lm), by_hand(merged.model, VECTOR))
    losses = [optimize(m, EXAMPLE, 2, steps=3, lr=0.3, progress=False).losses for m in (lm, merged)]
    assert torch.allclose(*losses, rtol=1e-3)


def test_an_adapter_that_comes_later_is_looked_at_again():
    adapted = peft.get_peft_model(tiny_model(), WEIGHTS["LoRA"])
    lm = LM(adapted, tiny_tokenizer())
    before = our_logits(lm)
    adapted.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.set_adapter("second")
    assert not close(our_logits(lm), before) and close(our_logits(lm), by_hand(adapted.get_base_model()))
    adapted.add_adapter("third", REFUSED["activated LoRA"])
    with pytest.raises(UnsupportedModel, match="'third' is an activated LoRA"):
        our_logits(lm)


@pytest.mark.parametrize("architecture", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_encoders_are_refused_unless_they_were_made_decoders(architecture):
    def made(is_decoder):
        model_type = architecture.lower().split("lm")[0].split("for")[0]
        config = AutoConfig.for_model(model_type, **SIZES, is_decoder=is_decoder)
        return LM(getattr(transformers, architecture)(config), tiny_tokenizer())

    lm = made(True)
    with lm.steer(VECTOR.replace(layers=1)), torch.no_grad():
        assert close(our_logits(lm), lm.model(input_ids=IDS).logits)
        assert lm.generate(["the quick", "a"], 5) == lm.generate(["the quick", "a"], 5, batch_size=1, use_cache=False)
    with pytest.raises(UnsupportedModel, match="not causal"):
        our_logits(made(False))


SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
T5 = dict(vocab_size=320, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8)
BART = dict(vocab_size=320, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64)  # fmt: skip
OTHERS = {
    "T5ForConditionalGeneration": ("t5", T5, "encoder-decoder"),
    "BartForConditionalGeneration": ("bart", BART, "encoder-decoder"),
    "LlamaForSequenceClassification": ("llama", SIZES, "classifies texts"),
    "BertForSequenceClassification": ("bert", SIZES, "classifies texts"),
    "BertForTokenClassification": ("bert", SIZES, "classifies texts"),
    "RobertaForMaskedLM": ("roberta", SIZES, "both directions"),
    "BertForMaskedLM": ("bert", SIZES, "both directions"),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_what_is_no_causal_language_model_is_refused_in_one_sentence(architecture, tmp_path):
    model_type, sizes, why = OTHERS[architecture]
    model = getattr(transformers, architecture)(AutoConfig.for_model(model_type, **sizes))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for attempt in (lambda: load_lm(tmp_path), lambda: LM(model, tiny_tokenizer())):
        with pytest.raises(ValueError, match=why) as error:
            attempt()
        assert len(str(error.value)) < 350 and "\n" not in str(error.value)


def test_folders_that_cannot_be_loaded_say_why(tmp_path):
    def reason(write):
        folder = tempfile.mkdtemp(dir=tmp_path)
        write(folder)
        with pytest.raises(ValueError) as error:
            load_lm(folder, dtype="float32")
        assert len(str(error.value)) < 350 + len(folder)
        return str(error.value)

    def config(text):
        return lambda folder: Path(folder, "config.json").write_text(text)

    bare = transformers.LlamaModel(AutoConfig.for_model("llama", **SIZES))
    assert "no config.json" in reason(lambda folder: None)
    assert "lm_head.weight would be random" in reason(bare.save_pretrained)
    assert "no tokenizer" in reason(tiny_model().save_pretrained)
    assert "model_type" in reason(config("{}"))
    assert "`zzz`" in reason(config('{"model_type": "zzz"}'))
    assert "'distilbert'" in reason(config('{"model_type": "distilbert"}'))
    assert "load it yourself" in reason(config('{"model_type": "llava"}'))
    with pytest.raises(TypeError, match="load_lm"):
        LM("gpt2", tiny_tokenizer())


def test_a_model_in_the_precision_it_was_saved_in(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_lm(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load_lm(tmp_path, dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="expected a torch dtype"):
        load_lm(tmp_path, dtype="bf17")


def test_an_adapter_folder_is_loaded_with_its_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), WEIGHTS["LoRA"])
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    lm = load_lm(tmp_path / "adapter", dtype="float32")
    assert close(our_logits(lm), our_logits(LM(adapted, tiny_tokenizer())))


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_weights_that_accelerate_keeps_elsewhere(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    where = dict(offload_dir=str(tmp_path)) if offload == "disk_offload" else {}
    model = getattr(accelerate, offload)(tiny_model(), execution_device=torch.device("cpu"), **where)
    lm = LM(model, tiny_tokenizer())
    assert lm.device.type == "cpu" and lm.dtype == torch.float32
    assert close(our_logits(lm), by_hand(tiny_model()))
    with lm.steer(VECTOR):
        assert close(our_logits(lm), by_hand(tiny_model(), VECTOR))
    prompts = ["the quick", "the quick", "a"]
    assert lm.generate(prompts, 5) == tiny_lm().generate(prompts, 5)
    losses = [optimize(m, EXAMPLE, 2, steps=3, lr=0.3, progress=False).losses for m in (lm, tiny_lm())]
    assert torch.allclose(*losses, rtol=1e-3)
    assert torch.allclose(lm.hidden_states("the quick", 2), tiny_lm().hidden_states("the quick", 2), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_flex_attention_on_a_processor(architecture):
    lm, plain = tiny_lm(architecture), tiny_lm(architecture)
    lm.model.set_attn_implementation("flex_attention")
    prompts = ["the quick", "the quick", "a"]
    with lm.steer(VECTOR), plain.steer(VECTOR):
        assert close(our_logits(lm), our_logits(plain))
        assert lm.generate(prompts, 5) == plain.generate(prompts, 5)
    with torch.no_grad():
        assert lm.can_pack and torch.allclose(Terms(lm, EXAMPLE)(VECTOR), Terms(plain, EXAMPLE)(VECTOR), rtol=1e-4)
    with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"):
        optimize(lm, EXAMPLE, 2, steps=1, progress=False)
    lm.model.set_attn_implementation("eager")
    losses = [optimize(m, EXAMPLE, 2, steps=3, lr=0.3, progress=False).losses for m in (lm, plain)]
    assert torch.allclose(*losses, rtol=1e-3)


def test_a_vector_is_optimised_where_gradients_are_switched_off():
    def losses(lm):
        start = optimize(lm, EXAMPLE, 2, steps=2, lr=0.3, progress=False).steering
        neutral = Example("a dog", match=record(lm, "a dog", " sleeps"))
        return optimize(lm, [EXAMPLE, neutral], 2, steps=2, lr=0.3, progress=False, start=start, retain=Retain(("the sun",))).losses

    expected = losses(tiny_lm())
    for off in (torch.no_grad, torch.inference_mode):
        lm = tiny_lm()
        with off():
            assert torch.equal(losses(lm), expected)
            assert not torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        assert torch.equal(losses(tiny_lm()), expected)
    finally:
        torch.set_grad_enabled(True)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        lm = tiny_lm()
    with pytest.raises(ValueError, match="load the model outside"):
        optimize(lm, EXAMPLE, 2, steps=1, progress=False)


LAST = dict(mixtral="MixtralExperts", olmoe="OlmoeExperts", gpt_oss="GptOssExperts", mamba="MambaMixer", mamba2="Mamba2Mixer", rwkv="Rwkv")


@pytest.mark.parametrize("architecture", LAST)
def test_what_has_no_bias_for_a_vector_is_named(architecture):
    sizes = dict(num_heads=8, head_dim=8, n_groups=1) if architecture == "mamba2" else {}
    with pytest.raises(ValueError, match=f"has no place for the vector.*{LAST[architecture]}"):
        bake(tiny_lm(architecture, **sizes), VECTOR)


def test_weights_that_torchao_quantises():
    torchao = pytest.importorskip("torchao.quantization")
    models = [tiny_model(), tiny_model()]
    for model in models:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    lm = LM(models[0], tiny_tokenizer())
    with lm.steer(VECTOR):
        assert close(our_logits(lm), by_hand(models[1], VECTOR))
    fit = optimize(lm, EXAMPLE, 2, steps=3, lr=0.3, progress=False)
    assert fit.losses.sum(-1)[-1] < fit.losses.sum(-1)[0]


def test_quantised_layers_that_pass_no_gradient_on_are_named():
    lm, quantise = tiny_lm(), torch.ao.quantization.quantize_dynamic
    last = lm.model.model.layers[3]
    last.mlp = quantise(last.mlp, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"No gradient goes through model\.layers\.3\.mlp\.gate_proj"):
        optimize(lm, EXAMPLE, 2, steps=1, lr=0.3, progress=False)
    plain = tiny_lm()
    optimize(plain, EXAMPLE, 2, steps=1, progress=False)
    assert all(plain.shortcuts.values())  # which were tried within
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_what_cannot_be_copied_is_not_baked():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="reload it first"):
        bake(LM(accelerate.cpu_offload(tiny_model(), torch.device("cpu")), tiny_tokenizer()), VECTOR)
