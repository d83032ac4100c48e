"""Other programs: Inspect and lm-evaluation-harness run for real on steered models, control vectors and baked checkpoints act like ours."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import anyio
import gguf
import numpy as np
import pytest
import torch
from datasets import Dataset
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.tasks import TaskManager

from oneshot_steering import inspect_provider
from oneshot_steering.export import bake, hookpoints, to_llama_cpp, to_lm_eval
from oneshot_steering.inspect_provider import Answer, SharedModel, shared_model
from oneshot_steering.models import TINY_ARCHITECTURES, embedded_path, load_lm, tiny_lm
from oneshot_steering.steering import Steering

QUESTIONS = {"What is the capital of France?": "Paris", "Which animal barks?": "dog", "What colour is the sky?": "blue",
             "What is 2 + 2?": "4"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def notes(tmp_path_factory):
    "A folder for the notes that Inspect keeps of its own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("notes")))
        yield


@pytest.fixture(scope="module")
def lm():
    return load_lm(dtype="float32")


def direction(size, scale=1.0, seed=0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def strong(lm):
    "A vector that changes answers."
    return Steering(direction(576), 10, about=lm.about()) * (0.4 * lm.stream_norm(10) / 24)


@pytest.fixture
def tiny(tmp_path):
    "A tiny model in a folder, as the name of a model, and itself."
    lm, folder = tiny_lm("qwen3"), tmp_path / "tiny"
    lm.model.save_pretrained(folder)
    lm.tok.save_pretrained(folder)
    return str(folder), lm


def run_inspect(task, models, folder, **model_args):
    logs = inspect_eval(task, models, model_args=model_args, display="none", log_dir=str(folder / "logs"), fail_on_error=True)
    assert [log.status for log in logs] == ["success"] * len(logs), [log.error for log in logs]
    return logs


# Inspect


def test_the_library_needs_neither_inspect_nor_the_harness():
    code = "import sys, oneshot_steering.all; print({'inspect_ai', 'lm_eval', 'openai'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_entry_point_loads_no_torch():
    code = "import sys, oneshot_steering.inspect_provider; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_an_inspect_task_on_a_vector_and_without(lm, strong, tmp_path, monkeypatch):
    sizes, together = [], inspect_provider.answer_together
    monkeypatch.setattr(inspect_provider, "answer_together", lambda lm, requests: sizes.append(len(requests)) or together(lm, requests))
    monkeypatch.setattr(SharedModel, "moment", 1.0)
    file, config = strong.save(tmp_path / "folder" / "strong.safetensors"), GenerateConfig(max_tokens=12)
    task = Task(dataset=[Sample(input=q, target=a) for q, a in QUESTIONS.items()], scorer=includes(), config=config)
    steered, plain = run_inspect(task, [f"oneshot/{file}", "oneshot/none"], tmp_path, dtype="float32")
    prompts = [lm.chat(q) for q in QUESTIONS]
    expected = {"plain": lm.generate(prompts, max_new_tokens=12)}
    with lm.steer(strong):
        expected["steered"] = lm.generate(prompts, max_new_tokens=12)
    for name, log in dict(plain=plain, steered=steered).items():
        assert [s.output.completion for s in log.samples] == expected[name]
        assert [s.output.usage.input_tokens for s in log.samples] == [len(lm.encode(p)) for p in prompts]
        hits = [a.lower() in said.lower() for a, said in zip(QUESTIONS.values(), expected[name], strict=True)]
        assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(sum(hits) / len(hits))
        for sample in log.samples:
            assert 0 <= sample.output.usage.output_tokens <= 12
            assert sample.output.stop_reason == ("max_tokens" if sample.output.usage.output_tokens == 12 else "stop")
    assert all(a != b for a, b in zip(expected["plain"], expected["steered"], strict=True))
    assert sum(sizes) == 8 and max(sizes) > len(QUESTIONS), "both models' requests share batches"
    assert steered.eval.model == f"oneshot/{file}"


def test_inspect_finds_the_provider_from_a_terminal(lm, strong, tmp_path):
    strong.save(tmp_path / "vectors" / "strong.safetensors")
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(dict(input=q, target=a)) for q, a in QUESTIONS.items()))
    (tmp_path / "quiz.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import json_dataset\nfrom inspect_ai.scorer import includes\n"
        "@task\ndef quiz(): return Task(dataset=json_dataset('questions.jsonl'), scorer=includes())\n"
    )
    command = ["eval", "quiz.py", "--model", "oneshot/vectors/strong.safetensors", "-M", "strength=0.5", "-M", "dtype=float32"]
    inspect = [Path(sys.executable).with_name("inspect"), *command, "--max-tokens", "8", "--display", "none", "--log-dir", "logs"]
    done = subprocess.run(inspect, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = [read_eval_log(path) for path in (tmp_path / "logs").glob("*.eval")]
    with lm.steer(0.5 * strong):
        expected = lm.generate([lm.chat(q) for q in QUESTIONS], max_new_tokens=8)
    assert log.status == "success" and [s.output.completion for s in log.samples] == expected


def ask(model, text="the other dogs", **config):
    return anyio.run(lambda: model.generate([ChatMessageUser(content=text)], config=GenerateConfig(**config)))


def test_settings_of_a_request(tiny):
    folder, lm = tiny
    model = get_model("oneshot/none", lm=folder, memoize=False)
    greedy = ask(model, max_tokens=10)
    assert greedy.completion == lm.generate(lm.chat("the other dogs"), max_new_tokens=10)
    assert greedy.stop_reason == "max_tokens" and greedy.usage.output_tokens == 10
    sampled = [ask(model, max_tokens=10, temperature=1.0, top_p=0.9, seed=seed).completion for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    stop = greedy.completion[4:6]
    stopped = ask(model, max_tokens=10, stop_seqs=[stop])
    assert stopped.completion == greedy.completion[: greedy.completion.index(stop)] and stopped.stop_reason == "stop"
    context = lm.config.max_position_embeddings
    used = len(lm.encode(lm.chat("a " * 200)))
    assert 0 < context - used < 100
    assert ask(model, "a " * 200, max_tokens=100).stop_reason == "model_length"
    assert ask(model, "a " * context, max_tokens=4).stop_reason == "model_length"


def test_unknown_settings_are_named_once(tiny, caplog):
    model = get_model("oneshot/none", lm=tiny[0], memoize=False)
    with caplog.at_level(logging.WARNING, inspect_provider.__name__):
        for _ in range(2):
            ask(model, max_tokens=2, top_k=5, logprobs=True)
    assert [r.getMessage().split()[6] for r in caplog.records if r.name == inspect_provider.__name__] == ["logprobs;", "top_k;"]


def test_a_task_with_tools_calls_them(tiny, tmp_path, monkeypatch):
    seen = []

    @tool
    def add():
        async def execute(x: int, y: int):
            """Add two numbers.

            Args:
                x: First number.
                y: Second number.
            """
            return x + y

        return execute

    def scripted(lm, requests):
        seen.extend(lm.decode(r.ids) for r in requests)
        call = '<tool_call>{"name": "add", "arguments": {"x": 40, "y": 2}}</tool_call>'
        return [Answer(call if "Result of add" not in lm.decode(r.ids) else "It is 42.", 5, True) for r in requests]

    monkeypatch.setattr(inspect_provider, "answer_together", scripted)
    monkeypatch.setattr(inspect_provider, "open_model", lambda name, **options: tiny_lm("qwen3", max_position_embeddings=8192))
    task = Task(dataset=[Sample(input="Add 40 and 2.", target="42")], solver=[use_tools(add()), generate()], scorer=includes())
    (log,) = run_inspect(task, ["oneshot/none"], tmp_path, lm="scripted")
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
    assert '"name": "add"' in seen[0] and len(seen) == 2 and "Result of add: 42" in seen[1]


def test_vectors_that_cannot_be_used(tiny, tmp_path):
    folder = tiny[0]
    with pytest.raises(FileNotFoundError, match="There is no steering vector"):
        get_model(f"oneshot/{tmp_path}/missing.safetensors", lm=folder, memoize=False)
    nameless = Steering(torch.ones(32), 1).save(tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match="-M lm="):
        get_model(f"oneshot/{nameless}", memoize=False)
    wide = Steering(torch.ones(64), 1).save(tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="width 64"):
        get_model(f"oneshot/{wide}", lm=folder, memoize=False)
    foreign = Steering(torch.ones(32), 1, about=dict(model="another")).save(tmp_path / "foreign.safetensors")
    with pytest.warns(UserWarning, match="made for 'another'"):
        get_model(f"oneshot/{foreign}", lm=folder, memoize=False)


def test_models_are_shared_and_let_go(tiny):
    folder = tiny[0]
    first, second, other = shared_model(folder), shared_model(folder), shared_model(folder, dtype="float64")
    assert first is second is not other and other.lm.dtype == torch.float64
    key = next(k for k, v in inspect_provider._opened.items() if v is first)
    del first, second
    assert key not in inspect_provider._opened


def test_a_failing_request_does_not_stop_the_others(tiny):
    lm = tiny[1]

    class Fails(SharedModel):
        def _run(self, batch):
            if batch[0].ids == [1]:
                raise RuntimeError("no")
            return super()._run([r for r in batch if r.ids != [1]])

    shared, found = Fails(lm), {}

    async def one(name, ids):
        try:
            found[name] = (await shared.answer(inspect_provider.Request(ids, None, 4), 8)).text
        except RuntimeError as error:
            found[name] = str(error)

    async def both():
        async with anyio.create_task_group() as group:
            group.start_soon(one, "bad", [1])
            group.start_soon(one, "good", lm.encode("a fox"))

    anyio.run(both)
    assert found == dict(bad="no", good=lm.generate("a fox", max_new_tokens=4)) and not shared.waiting


# lm-evaluation-harness


def harness_task(records):
    config = dict(task="quiz", custom_dataset=lambda **_: {"test": Dataset.from_list(records)}, test_split="test",
                  output_type="multiple_choice", doc_to_text="{{question}}\nAnswer:", doc_to_choice="choices", doc_to_target="target",
                  metric_list=[dict(metric="acc")])  # fmt: skip
    return ConfigurableTask(config=config)


def test_the_harness_runs_on_an_exported_vector(lm, strong, tmp_path):
    answers = list(QUESTIONS.values())
    records = [dict(question=q, choices=answers, target=i) for i, q in enumerate(QUESTIONS)]
    args = dict(pretrained=str(embedded_path()), dtype="float32", steer_path=str(to_lm_eval(lm, strong, tmp_path / "strong.pt")))
    found = simple_evaluate("steered", args, [harness_task(records)], device="cpu", batch_size=4, bootstrap_iters=0,
                            task_manager=TaskManager(include_defaults=False))  # fmt: skip
    theirs = torch.tensor([[answer[0] for answer in s["filtered_resps"]] for s in found["samples"]["quiz"]])
    prompts = [f"{q}\nAnswer:" for q in QUESTIONS for _ in answers]
    score = lambda: torch.stack([p.sum() for p in lm.log_probs(prompts, [f" {a}" for a in answers] * len(QUESTIONS))]).view(4, 4)
    plain = score()
    with lm.steer(strong):
        ours = score()
    assert torch.allclose(theirs, ours, atol=1e-3) and not torch.allclose(theirs, plain, atol=0.5)
    assert found["results"]["quiz"]["acc,none"] == (ours.argmax(-1) == torch.arange(4)).float().mean().item()


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_harness_steers_like_us(architecture, tmp_path):
    lm = tiny_lm(architecture)
    lm.model.save_pretrained(tmp_path)
    lm.tok.save_pretrained(tmp_path)
    assert None not in hookpoints(lm)
    ids = torch.tensor([(one := lm.encode("the other dogs are sleeping in the warm morning sun")), one[::-1]])
    plain = lm.model(ids).logits
    several = Steering(direction(32, 3, 5), [0, 2], strength=0.7) + Steering(direction(32, 2, 6), 3, mode="clamp", strength=-1)
    single = [Steering(direction(32, 3, i), layer, mode, strength=1.0 if mode == "ablate" else -1.3)
              for i, (layer, mode) in enumerate([(0, "add"), (1, "clamp"), (2, "ablate"), (3, "add"), (0, "clamp")])]  # fmt: skip
    for steering in (several, *single):
        file = to_lm_eval(lm, steering, tmp_path / "vector.pt")
        model = SteeredModel(pretrained=str(tmp_path), steer_path=str(file), device="cpu", dtype="float32")
        with lm.steer(steering), torch.no_grad():
            ours = lm.model(ids).logits
        assert (model._model_call(ids) - ours).abs().max() < 1e-4 and (ours - plain).abs().max() > 1e-2


# llama.cpp


def as_gguf(lm, path):
    "A tiny Qwen3 as llama.cpp reads it."
    c, writer = lm.config, gguf.GGUFWriter(path, "qwen3")
    numbers = dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                   feed_forward_length=c.intermediate_size, head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads,
                   key_length=c.head_dim, value_length=c.head_dim, vocab_size=c.vocab_size)  # fmt: skip
    names = dict(block_count="qwen3.block_count", context_length="qwen3.context_length", embedding_length="qwen3.embedding_length",
                 feed_forward_length="qwen3.feed_forward_length", head_count="qwen3.attention.head_count",
                 head_count_kv="qwen3.attention.head_count_kv", key_length="qwen3.attention.key_length",
                 value_length="qwen3.attention.value_length", vocab_size="qwen3.vocab_size")  # fmt: skip
    for name, value in numbers.items():
        writer.add_uint32(names[name], value)
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32("qwen3.rope.freq_base", c.rope_parameters["rope_theta"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    inside = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
              "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}  # fmt: skip
    weights = {"token_embd": lm.model.model.embed_tokens, "output_norm": lm.model.model.norm, "output": lm.model.lm_head}
    weights |= {f"blk.{i}.{theirs}": block.get_submodule(ours) for i, block in enumerate(lm.layers) for ours, theirs in inside.items()}
    for name, module in weights.items():
        writer.add_tensor(f"{name}.weight", module.weight.detach().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def llama_cpp_logits(model_file, ids, vector_file=None):
    "llama.cpp's logits of the last token, and its own way from a control vector's file to its memory."
    bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings", reason="install llama-cpp-py-sync to compare with llama.cpp itself")
    try:
        lib, ffi = bindings.get_lib(), bindings.get_ffi()
    except RuntimeError as error:
        pytest.skip(f"llama.cpp's library does not load here: {error}")
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(model_file).encode(), lib.llama_model_default_params())
    assert model != ffi.NULL
    context = lib.llama_init_from_model(model, lib.llama_context_default_params())
    width, layers = lib.llama_model_n_embd(model), lib.llama_model_n_layer(model)
    if vector_file:
        data = np.zeros(0, np.float32)
        for tensor in gguf.GGUFReader(vector_file).tensors:  # as common_control_vector_load_one does
            layer = int(tensor.name.removeprefix("direction."))
            assert layer > 0 and tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data.shape == (width,)
            data = np.pad(data, (0, max(0, width * layer - len(data))))
            data[width * (layer - 1) : width * layer] += tensor.data
        assert lib.llama_set_adapter_cvec(context, ffi.from_buffer("float[]", data), len(data), width, 1, layers) == 0
    tokens = ffi.new("llama_token[]", ids)
    assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))) == 0
    found = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * 320), np.float32).copy()
    lib.llama_free(context)
    lib.llama_model_free(model)
    return torch.tensor(found)


def test_a_control_vector_does_in_llama_cpp_what_it_does_here(tmp_path):
    lm = tiny_lm("qwen3", hidden_size=32, tie_word_embeddings=False)
    file, ids = as_gguf(lm, tmp_path / "model.gguf"), lm.encode("the other dogs are sleeping")
    last = lambda: lm.model(torch.tensor([ids])).logits[0, -1].detach()
    assert torch.allclose(llama_cpp_logits(file, ids), last(), atol=2e-2)
    for steering in (Steering(direction(32, 3), 2), Steering(direction(32, 3), 3, strength=-0.5), Steering(direction(32), [2, 3])):
        vector = to_llama_cpp(lm, steering, tmp_path / "vector.gguf")
        with lm.steer(steering):
            ours = last()
        assert torch.allclose(llama_cpp_logits(file, ids, vector), ours, atol=2e-2) and (ours - last()).abs().max() > 0.3


def test_the_file_of_a_control_vector(tmp_path):
    lm, v, w = tiny_lm("mistral"), direction(32), direction(32, seed=1)
    reader = gguf.GGUFReader(to_llama_cpp(lm, Steering(v, [2, -1], strength=2) + Steering(w, 3), tmp_path / "new" / "vector.gguf"))
    keys = ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")
    assert [reader.fields[key].contents() for key in keys] == ["controlvector", "llama", 2]
    found = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert found.keys() == {"direction.1", "direction.2"}
    assert torch.allclose(found["direction.1"], 2 * v) and torch.allclose(found["direction.2"], 2 * v + w)
    with pytest.raises(ValueError, match="does not end so"):
        to_llama_cpp(lm, Steering(v, 2), tmp_path / "vector.bin")


# a checkpoint


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi"])
def test_a_baked_model_is_the_steered_one(architecture, tmp_path):
    lm = tiny_lm(architecture)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    steering = Steering(direction(32, 3), [1, 3]) + Steering(direction(32, 3, 1), 3, strength=-0.5)
    baked = bake(lm, steering)
    baked.model.save_pretrained(tmp_path)
    baked.tok.save_pretrained(tmp_path)
    loaded = load_lm(tmp_path, dtype="float32")
    say = lambda model: model.generate(["the other dogs", "a fox"], max_new_tokens=8)
    with lm.steer(steering):
        expected = say(lm)
    assert say(loaded) == expected != say(lm)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items()) and before.keys() == lm.model.state_dict().keys()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "qwen2", "qwen3", "mistral"])
def test_no_place_to_bake(architecture):
    with pytest.raises(ValueError, match="has no place for the vector"):
        bake(tiny_lm(architecture), Steering(direction(32), 2))


def test_what_cannot_be_baked():
    lm, v = tiny_lm(), direction(32)
    for bad, why in [(Steering(v, 0), "Layer 0"), (Steering(v, 1, "clamp"), "mode='clamp'"), (Steering(v, 1, "add", "2:"), "every token")]:
        with pytest.raises(ValueError, match=why):
            bake(lm, bad)
    scaled = tiny_lm("granite", residual_multiplier=0.5)
    with pytest.raises(ValueError, match="off by"):
        bake(scaled, Steering(v, 2))
