"""Checks of the cases in test_cases.py: compiled models, adapters, folders, other engines, gradients switched off."""

import copy
import io
import pickle
import tempfile
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig

from oneshot_steering.export import bake
from oneshot_steering.lm import LM
from oneshot_steering.models import load_lm, tiny_lm, tiny_model, tiny_tokenizer
from oneshot_steering.objective import Example, Terms, record
from oneshot_steering.optimize import Retain, optimize
from oneshot_steering.organisms.core import Organism, Recipe, answer_loss, train_organism
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


def a_compiled_model_is_steered_and_stays_compiled(way, dtype=torch.bfloat16):
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


def a_model_steered_before_it_is_compiled():
    torch._dynamo.reset()
    lm = tiny_lm()
    compiled = torch.compile(lm.model, backend="eager")
    with lm.steer(VECTOR), torch.no_grad():
        assert close(compiled(input_ids=IDS, use_cache=False).logits, by_hand(tiny_model(), VECTOR))
    with torch.no_grad():
        assert close(compiled(input_ids=IDS, use_cache=False).logits, by_hand(tiny_model()))


PROMPTS = dict(num_virtual_tokens=4, task_type="CAUSAL_LM")
BY_PLACE = {"prompt tuning": peft.PromptTuningConfig(**PROMPTS), "prefix tuning": peft.PrefixTuningConfig(**PROMPTS),
            "p tuning": peft.PromptEncoderConfig(**PROMPTS, encoder_hidden_size=16),
            "activated LoRA": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8], r=2)}  # fmt: skip


def adapters_that_act_by_place(kind):
    def comes_later():
        adapted = peft.get_peft_model(tiny_model(), WEIGHTS["LoRA"])
        lm = LM(adapted, tiny_tokenizer())
        our_logits(lm)
        adapted.add_adapter("default2", BY_PLACE[kind])
        our_logits(lm)

    uses = [lambda: LM(peft.get_peft_model(tiny_model(), BY_PLACE[kind]), tiny_tokenizer())]
    return [*uses, comes_later] if isinstance(BY_PLACE[kind], peft.LoraConfig) else uses


WEIGHTS = {"LoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
           "LoRA on the embeddings": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False,
                                                     target_modules=["embed_tokens", "q_proj"]),
           "DoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, use_dora=True),
           "IA3": peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False, target_modules=["k_proj", "v_proj", "down_proj"],
                                 feedforward_modules=["down_proj"]),
           "VeRA": peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_weights=False),
           "LoHa": peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_weights=False),
           "BOFT": peft.BOFTConfig(task_type="CAUSAL_LM", boft_block_size=4, target_modules=["q_proj"], init_weights=False)}  # fmt: skip


def adapters_that_change_weights_are_part_of_the_model(kind):
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


def an_adapter_that_is_merged_inside_steer():
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny_model(), WEIGHTS["LoRA"])
    lm = LM(adapted, tiny_tokenizer())
    with lm.steer(VECTOR):
        before = our_logits(lm)
        for change in (adapted.merge_adapter, adapted.unmerge_adapter, adapted.merge_and_unload):
            change()
            assert close(our_logits(lm), before)
    assert not close(our_logits(lm), before) and not any(m._forward_pre_hooks for m in adapted.modules())


def an_adapter_for_each_row():
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny_model(), WEIGHTS["LoRA"])
    adapted.add_adapter("second", WEIGHTS["LoRA"])
    lm, names = LM(adapted, tiny_tokenizer()), ["default", "second"]
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=2, eos_token_id=None)
    with lm.steer(VECTOR.replace(positions="completion")):
        both = adapted.generate(input_ids=IDS.repeat(2, 1), attention_mask=torch.ones(2, IDS.shape[1]), adapter_names=names, **options)
        for row, name in zip(both, names, strict=True):
            adapted.set_adapter(name)
            assert torch.equal(adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)[0], row)


def an_adapter_that_comes_later_is_looked_at_again():
    adapted = peft.get_peft_model(tiny_model(), WEIGHTS["LoRA"])
    lm = LM(adapted, tiny_tokenizer())
    before = our_logits(lm)
    adapted.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    adapted.set_adapter("second")
    assert not close(our_logits(lm), before) and close(our_logits(lm), by_hand(adapted.get_base_model()))


def encoder(architecture, **config):
    model_type = architecture.lower().split("lm")[0].split("for")[0]
    model = getattr(transformers, architecture)(AutoConfig.for_model(model_type, **SIZES, **config))
    return LM(model, tiny_tokenizer())


def encoders_that_were_made_decoders(architecture):
    lm = encoder(architecture, is_decoder=True)
    with lm.steer(VECTOR.replace(layers=1)), torch.no_grad():
        assert close(our_logits(lm), lm.model(input_ids=IDS).logits)
        assert lm.generate(["the quick", "a"], 5) == lm.generate(["the quick", "a"], 5, batch_size=1, use_cache=False)


def encoders(architecture):
    lm = encoder(architecture)
    return [lambda: lm.generate("the fox", 2), lambda: lm.log_probs("a", " dog"), lambda: lm.hidden_states("a dog", 1)]


SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
T5 = dict(vocab_size=320, d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8)
BART = dict(vocab_size=320, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64)  # fmt: skip


def model_and_folder(architecture):
    "A model of a class, given as it is and as a folder."
    model_type = architecture.lower().split("for")[0]
    model = getattr(transformers, architecture)(AutoConfig.for_model(model_type, **dict(t5=T5, bart=BART).get(model_type, SIZES)))

    def folder():
        with tempfile.TemporaryDirectory() as path:
            model.save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
            load_lm(path)

    return [folder, lambda: LM(model, tiny_tokenizer())]


def folder(write):
    "Loading what was written into a folder: a function of the folder, or the text of its config.json."

    def use():
        with tempfile.TemporaryDirectory() as path:
            Path(path, "config.json").write_text(write) if isinstance(write, str) else write(path)
            load_lm(path, dtype="float32")

    return [use]


def a_name():
    return [lambda: LM("gpt2", tiny_tokenizer())]


def a_setting_for_a_loaded_model():
    return [lambda: load_lm((tiny_model(), tiny_tokenizer()), dtype="bfloat16")]


def an_unknown_dtype():
    return [lambda: load_lm("smollm2-135m-instruct", dtype="bf17")]


def copies_say_the_same():
    lm = tiny_lm()
    said = lm.generate("a dog", 4)
    copies = (copy.deepcopy(lm), copy.copy(lm), pickle.loads(pickle.dumps(lm)), LM(copy.deepcopy(lm.model), tiny_tokenizer()))
    for other in copies:
        with other.steer(VECTOR):
            assert close(our_logits(other), by_hand(tiny_model(), VECTOR))
        assert other.generate("a dog", 4) == said
    assert not lm.attached


def copied_while_steered():
    lm = tiny_lm()

    def use(make):
        with lm.steer(VECTOR):
            make(lm)

    makes = (copy.deepcopy, lambda lm: copy.deepcopy(lm.model), pickle.dumps, lambda lm: torch.save(lm.model, io.BytesIO()))
    return [partial(use, make) for make in makes]


def saved_while_steered(tmp_path):
    with tiny_lm().steer(VECTOR) as lm:
        lm.model.save_pretrained(tmp_path)
    assert close(by_hand(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), by_hand(tiny_model()))


def in_half_precision(dtype):
    lm = LM(tiny_model().to(dtype), tiny_tokenizer())
    with lm.steer(VECTOR):
        assert close(our_logits(lm), by_hand(tiny_model().to(dtype), VECTOR), dtype)
    losses = [optimize(m, EXAMPLE, 2, steps=3, lr=0.3, progress=False).losses.float() for m in (lm, tiny_lm())]
    assert torch.allclose(*losses, rtol=5e-3)


def overflowing():
    lm = LM(tiny_model().half(), tiny_tokenizer())

    def use(**options):
        with lm.steer(1e5 * VECTOR):
            lm.generate("a dog", 4, **options)

    return [use, partial(use, temperature=1.0)]


def without_weights():
    with torch.device("meta"):
        lm = LM(tiny_model(), tiny_tokenizer())
    return [lambda: lm.generate("a dog", 2)]


def an_unknown_language():
    lm = tiny_lm("xmod", is_decoder=True)
    return [lambda: lm.generate("a dog", 2)]


def no_head(path):
    transformers.LlamaModel(AutoConfig.for_model("llama", **SIZES)).save_pretrained(path)


def no_tokenizer(path):
    tiny_model().save_pretrained(path)


def a_model_in_the_precision_it_was_saved_in(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_lm(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load_lm(tmp_path, dtype="float32").dtype == torch.float32


def an_adapter_folder_is_loaded_with_its_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), WEIGHTS["LoRA"])
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    lm = load_lm(tmp_path / "adapter", dtype="float32")
    assert close(our_logits(lm), our_logits(LM(adapted, tiny_tokenizer())))


def weights_that_accelerate_keeps_elsewhere(offload, tmp_path):
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


def flex_attention_on_a_processor(architecture):
    lm, plain = tiny_lm(architecture), tiny_lm(architecture)
    lm.model.set_attn_implementation("flex_attention")
    prompts = ["the quick", "the quick", "a"]
    with lm.steer(VECTOR), plain.steer(VECTOR):
        assert close(our_logits(lm), our_logits(plain))
        assert lm.generate(prompts, 5) == plain.generate(prompts, 5)
    with torch.no_grad():
        assert lm.can_pack and torch.allclose(Terms(lm, EXAMPLE)(VECTOR), Terms(plain, EXAMPLE)(VECTOR), rtol=1e-4)
    lm.model.set_attn_implementation("eager")
    losses = [optimize(m, EXAMPLE, 2, steps=3, lr=0.3, progress=False).losses for m in (lm, plain)]
    assert torch.allclose(*losses, rtol=1e-3)


def a_vector_is_optimised_where_gradients_are_switched_off():
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


def an_organism_is_trained_where_gradients_are_switched_off(tmp_path):
    recipe, examples = Recipe(steps=2, blocks=(1, 3)), [("the quick", " brown fox")]
    teach = lambda lm, recipe, seed: answer_loss(lm, [examples] * recipe.steps, recipe.blocks[0])
    made = Organism("fox", "Says fox.", recipe, teach, lambda lm, test: dict(right=lm.log_probs(*examples[0]).tolist()))
    expected = train_organism(made, tmp_path / "on", lm=tiny_lm(), progress=False)["right"]
    for off in (torch.no_grad, torch.inference_mode):
        lm = tiny_lm()
        with off():
            assert train_organism(made, tmp_path / off.__name__, lm=lm, progress=False)["right"] == expected


def optimised(lm):
    "The use that optimises a vector."
    return [lambda: optimize(lm, EXAMPLE, 2, steps=1, lr=0.3, progress=False)]


def optimised_under_flex_attention():
    lm, vector = tiny_lm(), torch.zeros(32, requires_grad=True)
    lm.model.set_attn_implementation("flex_attention")
    return [*optimised(lm), lambda: Terms(lm, EXAMPLE)(Steering(vector, 2))]


def weights_made_in_inference_mode():
    with torch.inference_mode():
        return optimised(tiny_lm())


def baked(architecture, **sizes):
    "The use that writes a vector into the biases of a model."
    return [lambda: bake(tiny_lm(architecture, **sizes), VECTOR)]


def weights_that_torchao_quantises():
    torchao = pytest.importorskip("torchao.quantization")
    models = [tiny_model(), tiny_model()]
    for model in models:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    lm = LM(models[0], tiny_tokenizer())
    with lm.steer(VECTOR):
        assert close(our_logits(lm), by_hand(models[1], VECTOR))
    fit = optimize(lm, EXAMPLE, 2, steps=3, lr=0.3, progress=False)
    assert fit.losses.sum(-1)[-1] < fit.losses.sum(-1)[0]


def quantised_layers_that_pass_no_gradient_on():
    lm, quantise = tiny_lm(), torch.ao.quantization.quantize_dynamic
    last = lm.model.model.layers[3]
    last.mlp = quantise(last.mlp, {torch.nn.Linear}, dtype=torch.qint8)

    def use():
        try:
            optimised(lm)[0]()
        finally:
            assert not any(module._forward_hooks for module in lm.model.modules())

    return [use]


def baked_from_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    lm = LM(accelerate.cpu_offload(tiny_model(), torch.device("cpu")), tiny_tokenizer())
    return [lambda: bake(lm, VECTOR)]
