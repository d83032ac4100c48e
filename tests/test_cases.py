"""Every case in which a measurement could be silently wrong, and what happens instead: it is right, or it is refused, or there is a
warning, with these words. The checks are in the files cases_*.py; families are checked as `make families` checks all of them."""

import inspect
import re
from collections import Counter
from functools import partial

import cases_chat as chat
import cases_contract as contract
import cases_engines as engines
import cases_generate as generate
import pytest
import torch
from families import BF16, PAGE, VERDICTS
from family_checks import verdict
from tiny_models import families, variants

from oneshot_steering.models import TINY_ARCHITECTURES, tiny_model
from oneshot_steering.steering import SteeredThroughAnother

LONGEST = 450  # characters of a message: a sentence or two
CLASS = dict([*variants(), *reversed(families())])  # of a family that has several, the text model


def is_right(check):
    "A check that compares with the right values raises nothing."
    check()


def is_refused(words, check):
    "Each of the uses that a check gives raises an error with these words, in one line."
    uses = check()
    assert uses
    for use in uses:
        with pytest.raises((ValueError, RuntimeError, TypeError, SteeredThroughAnother), match=words) as error:
            use()
        message = str(error.value)
        assert len(message) < LONGEST and "\n" not in message, message


def is_warned(words, check):
    "The values are right, and a warning has these words."
    with pytest.warns(UserWarning, match=words):
        check()


def is_family(family, outcome, words):
    row = verdict(family, CLASS[family])
    assert row["verdict"] == outcome and (words in row["why"] if words else row["why"] == ""), row["why"]


def right(case, check, *args, **options):
    return f"{case}: right", is_right, (), partial(check, *args, **options)


def refused(case, words, check, *args, **options):
    return f"{case}: refused", is_refused, (words,), partial(check, *args, **options)


def warned(case, words, check, *args, **options):
    return f"{case}: warned", is_warned, (words,), partial(check, *args, **options)


WHERE = "needs to know which tokens of which text a pass holds"  # what a rule for positions says that cannot be followed
SILENT = "has not said what it wants"
NO_STREAM = r"layer \d .* not one residual stream"
FLOATS = dict(fp32=torch.float32, bf16=torch.bfloat16)
STATIC = dict(cache_implementation="static", disable_compile=True)

CASES = {
    "1. The last columns only": [
        right("Gemma 4 with shared keys: states, norms, contrastive vectors at every layer", contract.states_of_few_columns),
        *(right(f"Gemma 4 with shared keys: every rule for positions, layer {i}", contract.rules_in_few_columns, i) for i in (2, 3)),
        right("Gemma 4 with shared keys: the first losses of an optimisation", contract.optimised_in_few_columns, 3),
        *(right(f"the vocabulary's matrix is not copied for each row: {family} in {name}", contract.the_head_gets_few_columns_in_one_piece,
                family, dtype) for family in (*TINY_ARCHITECTURES, "gemma4_text") for name, dtype in FLOATS.items()),
    ],
    "2. torch.compile": [
        *(right(f"compiled and run before it is steered, in bf16: {way}", engines.a_compiled_model_is_steered_and_stays_compiled, way)
          for way in engines.WAYS),
        right("compiled and run before it is steered, in fp32", engines.a_compiled_model_is_steered_and_stays_compiled,
              "torch.compile(model)", torch.float32),
        right("compiled afterwards", engines.a_model_steered_before_it_is_compiled),
    ],
    "3. Positions that mean something else in a long text": [
        *(right(f"{name}: {what}", check, make) for name, make in (("dynamic NTK", contract.dynamic), ("long rope", contract.long_rope))
          for what, check in (("a row next to longer ones", contract.a_row_does_not_depend_on_the_length_of_its_neighbours),
                              ("generation with a cache", contract.cached_generation_is_generation_without_a_cache))),
        *(right(f"{kind} scaling: a row next to longer ones, beyond the original context",
                contract.a_row_does_not_depend_on_the_length_of_its_neighbours, partial(contract.scaled, kind)) for kind in contract.FIXED),
        right("long rope: losses on both sides of the switch", contract.losses_on_both_sides_of_the_switch),
        right("long rope: surprisal across the switch", contract.surprisal_across_the_switch),
    ],
    "4. Chat templates": [
        *(right(f"content for a template of {name}", chat.every_form_of_content_arrives, template) for name, template in dict(
            texts=chat.STRINGS, parts=chat.PARTS, parts_with_pictures=chat.FIRST_PART, either=chat.EITHER, thinking=chat.THINKS,
            tools=chat.JSON_TOOL).items()),
        *(right(f"the system message goes before the first question where the template {name}",
                chat.the_system_message_is_put_before_the_first_question, template) for name, template in dict(
            drops_it=chat.NO_SYSTEM, raises=chat.REFUSES_SYSTEM, raises_and_wants_parts=chat.REFUSES_SYSTEM_PARTS,
            wants_turns=chat.ALTERNATES).items()),
        right("tool calls and results", chat.tools_are_written),
        refused("a tool call without a template", "not a message of assistant", chat.written, None, chat.TOOL_CALL),
        right("an argument of the template", chat.arguments_reach_the_template),
        refused("a misspelt argument", "does not read enable_thinkng", chat.written, chat.THINKS, chat.USER, enable_thinkng=False),
        refused("an argument without a template", "no chat template that could read enable_thinking", chat.written, None, chat.USER,
                enable_thinking=False),
        refused("a system message alone, which the template refuses", r"\(system\).*no system", chat.written, chat.REFUSES_SYSTEM,
                chat.said("system")),
        refused("a system message alone, which the template drops", "leaves out what is said by: system", chat.written, chat.NO_SYSTEM,
                chat.said("system")),
        refused("a system message in between, which the template drops", "leaves out what is said by: system", chat.written,
                chat.NO_SYSTEM, chat.said("user", "system")),
        refused("a template that writes the last message only", "leaves out what is said by: user", chat.written,
                "<user>{{ messages[-1].content }}<assistant>", chat.said("user", "user")),
        *(refused(f"a template that {name}", "leaves out what is said by: user", chat.written,
                  chat.STRINGS.replace("m.content | trim", cut), [dict(role="user", content="What is it then, and why?")])
          for name, cut in {"cuts a text after 16 characters": "m.content[:16]", "writes the first word": "m.content.split()[0]",
            "writes strings only, here the beginning of one": "m.content[:3]"}.items()),
        refused("a tool call that the template drops", "leaves out what is said by: assistant", chat.written,
                chat.STRINGS.replace("m.content | trim", "m.content"), chat.TOOL_CALL),
        refused("tools that the template does not read", "does not read tools", chat.written, chat.STRINGS, chat.USER, tools=[{}]),
        refused("a template that writes no message", "leaves out what is said by: user", chat.written, "<user><assistant>",
                chat.said("user")),
        refused("a tool's message first", "roles must alternate", chat.written, chat.ALTERNATES, chat.said("tool")),
        refused("the assistant first", "roles must alternate", chat.written, chat.ALTERNATES, chat.said("assistant", "user")),
        refused("a template that fails", "refuses it", chat.written, "{{ messages[0].content.nothing.here }}", chat.said("user")),
        refused("the assistant alone", "an assistant's message alone", chat.written, chat.STRINGS, chat.said("assistant")),
        refused("the assistant alone, without a template", "an assistant's message alone", chat.written, None, chat.said("assistant")),
        refused("an unknown role without a template", "not a message of developer", chat.written, None, chat.said("developer", "user")),
        refused("a tool's message without a template", "not a message of tool", chat.written, None, chat.said("tool")),
        *(refused(f"a message without content ({name})", "content of a user message is None", chat.written, template, [message])
          for name, template, message in (("no template", None, dict(role="user", content=None)),
                                          ("None", chat.STRINGS, dict(role="user", content=None)),
                                          ("absent", chat.STRINGS, dict(role="user")))),
        refused("a message without a role", "needs a role and a content", chat.written, chat.STRINGS, [dict(content="x")]),
        refused("a picture", "has a part that is no text", chat.written, chat.STRINGS, [dict(role="user", content=[dict(type="image")])]),
        refused("an empty conversation", "empty conversation", chat.written, chat.STRINGS, []),
    ],
    "5. transformers' own generate, every rule for positions": [
        right("use_cache=False", generate.rules_mean_the_same_tokens, use_cache=False),
        right("prefill chunks", generate.rules_mean_the_same_tokens, prefill_chunk_size=3),
        right("an assistant model", generate.rules_mean_the_same_tokens, assistant_model=tiny_model()),
        right("drafts from the prompt", generate.rules_mean_the_same_tokens, prompt_lookup_num_tokens=3),
        right("drafts from the lower blocks", generate.rules_mean_the_same_tokens, assistant_early_exit=2),
        right("a static cache", generate.rules_mean_the_same_tokens, **STATIC),
        *(right(f"padding, beams and a vector for each row: {family}, a {way} cache",
                generate.padding_beams_and_rows_keep_their_positions, family, way)
          for family in ("llama", "gemma3_text", "gpt2") for way in ("dynamic", "static")),
        right("padding that transformers infers", generate.padding_is_inferred_as_transformers_does),
        right("several sequences of each prompt, each prompt with its vector", generate.several_sequences_of_each_prompt),
        right("a pipeline", generate.a_pipeline),
        right("the steered model drafts for another one", generate.the_steered_model_drafts_for_another),
        right("a `generate` taken before it is steered, with a cache", generate.a_generate_that_was_taken_before_with_a_cache),
        refused("a `generate` taken before it is steered, use_cache=False", WHERE, generate.a_generate_that_was_taken_before,
                use_cache=False),
        right("embeddings instead of tokens", generate.embeddings_as_input),
        right("a model without a KV cache: Mamba", generate.rules_with_and_without_a_cache, "mamba"),
        right("a model without a KV cache: RWKV", generate.rules_with_and_without_a_cache, "rwkv", attention_hidden_size=32),
        right("a model without positions: BLOOM", generate.rules_with_and_without_a_cache, "bloom"),
        right("a second turn on the same cache", generate.a_second_turn_has_a_prompt_of_its_own),
        right("a loop of one's own with a cache", generate.a_decoding_loop_of_ones_own),
        *(refused(f"{name}, other rules than \"all\"", WHERE, generate.under_rules, call) for name, call in generate.UNTOLD.items()),
        *(right(f"{name}, \"all\"", generate.all_positions, call) for name, call in generate.UNTOLD.items()),
    ],
    "6. Adapters": [
        *(refused(f"{kind}", rf"\({kind}\) puts 4 virtual tokens in front of every text", engines.adapters_that_act_by_place, kind)
          for kind in ("prompt tuning", "p tuning", "prefix tuning")),
        refused("activated LoRA, at once or added later", "is an activated LoRA", engines.adapters_that_act_by_place, "activated LoRA"),
        *(right(kind, engines.adapters_that_change_weights_are_part_of_the_model, kind) for kind in engines.WEIGHTS),
        right("a LoRA that is merged and taken apart inside `steer`", engines.an_adapter_that_is_merged_inside_steer),
        right("an adapter for each row", engines.an_adapter_for_each_row),
        right("a LoRA added later", engines.an_adapter_that_comes_later_is_looked_at_again),
        right("a folder with an adapter", engines.an_adapter_folder_is_loaded_with_its_model),
    ],
    "7. Encoders, encoder-decoders, classifiers, folders": [
        *(right(f"positions that begin at 3 (RoBERTa) in {name}", contract.positions_that_do_not_begin_at_zero, dtype)
          for name, dtype in FLOATS.items()),
        *(right(f"{architecture} that was made a decoder", engines.encoders_that_were_made_decoders, architecture)
          for architecture in ("BertLMHeadModel", "RobertaForCausalLM")),
        *(refused(f"{architecture} that was not", "is not causal", engines.encoders, architecture)
          for architecture in ("BertLMHeadModel", "RobertaForCausalLM")),
        refused("RoCBERT", "is not causal", contract.an_encoder, "roc_bert"),
        *(refused(f"{architecture}, as a model and as a folder", words, engines.model_and_folder, architecture)
          for architecture, words in dict(
              T5ForConditionalGeneration="is an encoder-decoder", BartForConditionalGeneration="is an encoder-decoder",
              LlamaForSequenceClassification="classifies texts", BertForSequenceClassification="classifies texts",
              BertForTokenClassification="classifies texts", RobertaForMaskedLM="reads in both directions",
              BertForMaskedLM="reads in both directions").items()),
        refused("blocks without a head", "LlamaModel over a short text fails with AttributeError", contract.no_head),
        refused("a head of two classes", "is no causal language model", contract.with_head, 32, 2),
        refused("a head that does not fit", "A pass of LlamaForCausalLM over a short text fails", contract.with_head, 31, 320),
        refused("a folder of blocks without a head", "lm_head.weight would be random", engines.folder, engines.no_head),
        refused("a folder without a tokenizer", "no tokenizer", engines.folder, engines.no_tokenizer),
        refused("an empty folder", "no config.json", engines.folder, lambda path: None),
        *(refused(f"a folder with {config}", words, engines.folder, config) for config, words in {
            "{}": "model_type", '{"model_type": "zzz"}': "`zzz`", '{"model_type": "distilbert"}': "'distilbert'",
            '{"model_type": "llava"}': "load it yourself"}.items()),
        refused("a head that mixes in later tokens", "is not causal", contract.a_head_that_mixes_in_later_tokens),
        right("a head that mixes in earlier tokens", contract.a_head_that_mixes_in_earlier_tokens),
        refused("a text longer than a table of positions", "longer than the 16|no room in the context of 16", contract.beyond_the_context),
        refused("a tokenizer of another model", "do not belong together", contract.beyond_the_vocabulary),
        refused("XMOD before a language is chosen", "Input language unknown", engines.an_unknown_language),
        refused("a name instead of a model", "load_lm", engines.a_name),
    ],
    "8. Where texts stop": [
        *(right(f"the end of a turn, {i + 1} of {len(chat.TURNS)} templates", chat.the_end_of_a_turn_ends_a_generation, template)
          for i, template in enumerate(chat.TURNS)),
        right("a special token that the template does not write", chat.tokens_that_no_template_writes_do_not_end_a_generation),
        *(right(f"stop texts: {kind}", chat.a_stop_text_ends_each_row_where_it_comes, kind)
          for kind in ("inside a token", "over tokens", "two", "never")),
        right("stop tokens", chat.a_stop_token_ends_a_row_and_what_has_ended_is_not_computed),
        right("token 0 and numbers of NumPy", chat.token_zero_and_the_numbers_of_numpy_may_be_stops),
        right("a special token as a stop text", chat.a_special_token_may_be_a_stop_text),
        refused("what cannot stop a text", "stop takes texts that are not empty and token ids", chat.what_cannot_stop_a_text),
    ],
    "9. Streams and threads": [
        right("a stream made inside `steer` and read later, elsewhere, in another thread",
              generate.a_stream_keeps_the_steering_under_which_it_was_made),
        right("what runs between the pieces of a stream", generate.pieces_do_not_steer_what_runs_between_them),
        right("four threads, each with its own vector or none", generate.threads_are_steered_each_by_its_own),
        right("direct calls next to passes of another thread", generate.direct_calls_in_one_thread_are_not_touched_by_passes_of_another),
        right("direct calls next to passes of another thread, dynamic NTK", generate.direct_calls_keep_their_own_angles),
        refused("another LM of the model that is steered", "is being steered through another LM", generate.two_of_one_model),
        right("another LM of the model that was steered", generate.two_of_one_model_afterwards),
        right("asynchronous tasks", generate.asynchronous_tasks_are_steered_each_by_its_own),
        refused("a thread that says nothing while another one steers", SILENT, generate.in_a_thread_that_says_nothing),
        refused("a streamer of transformers in a thread of its own", SILENT, generate.a_streamer_of_transformers),
        right("a thread that says nothing afterwards", generate.after_steering_another_thread_is_free),
        *(right(f"after a {error.__name__} in another thread", generate.a_pass_that_fails_lets_the_next_thread_in, error)
          for error in (ZeroDivisionError, KeyboardInterrupt)),
    ],
    "10. Blocks that carry something else than one stream": [
        refused("Gemma 3n: states, norms, optimisation, contrastive vectors, steering", NO_STREAM, contract.several_streams,
                "gemma3n_text", **contract.GEMMA3N),
        right("Gemma 3n: logits", contract.what_needs_no_stream, "gemma3n_text", **contract.GEMMA3N),
        refused("DeepSeek V4: states, norms, optimisation, contrastive vectors, steering", NO_STREAM, contract.several_streams,
                "deepseek_v4"),
        right("DeepSeek V4: logits", contract.what_needs_no_stream, "deepseek_v4"),
        warned("DeepSeek V4: a padded batch", "Padding on the left changes", contract.what_needs_padding, "deepseek_v4"),
        refused("a block that is not run", "layer 2 .* not run", contract.a_block_that_is_run, 0),
        refused("a block that is run twice", "layer 2 .* run 2 times", contract.a_block_that_is_run, 2),
        warned("RWKV: rows of unequal length are run one by one", "Padding on the left changes the logits",
               contract.rows_where_padding_changes_them),
        refused("RWKV: a padded batch", "one text at a time", contract.padded_where_padding_changes_a_row),
    ],
    "11. Other engines and weights": [
        *(right(f"flex_attention: runs, texts, losses: {family}", engines.flex_attention_on_a_processor, family)
          for family in ("llama", "gemma2")),
        refused("flex_attention: gradients", r"set_attn_implementation\('eager'\)", engines.optimised_under_flex_attention),
        right("weights that torchao quantises", engines.weights_that_torchao_quantises),
        refused("quantised layers that pass no gradient on", r"No gradient goes through model\.layers\.3\.mlp\.gate_proj",
                engines.quantised_layers_that_pass_no_gradient_on),
        *(right(f"weights and embeddings elsewhere: {way}", engines.weights_that_accelerate_keeps_elsewhere, way)
          for way in ("cpu_offload", "disk_offload")),
        right("grad mode off: an organism is trained", engines.an_organism_is_trained_where_gradients_are_switched_off),
        right("grad mode off: a vector is optimised", engines.a_vector_is_optimised_where_gradients_are_switched_off),
        refused("weights made in inference mode: gradients", "load the model outside", engines.weights_made_in_inference_mode),
        *(refused(f"bake on {family}", f"has no place for the vector.*{last}", engines.baked, family, **sizes)
          for family, last, sizes in (("mixtral", "MixtralExperts", {}), ("olmoe", "OlmoeExperts", {}), ("gpt_oss", "GptOssExperts", {}),
                                      ("mamba", "MambaMixer", {}), ("mamba2", "Mamba2Mixer", dict(num_heads=8, head_dim=8, n_groups=1)))),
        refused("bake on RWKV", "has no place for the vector.*Rwkv", engines.baked, "rwkv"),
        refused("bake on weights elsewhere", "reload it first", engines.baked_from_elsewhere),
        *(right(f"{str(dtype).removeprefix('torch.')} weights", engines.in_half_precision, dtype)
          for dtype in (torch.float16, torch.float64)),
        refused("numbers that overflow in float16", r"not numbers \(NaN\)", engines.overflowing),
        refused("a weight that is no number", "are NaN on a short text", contract.weights_that_are_no_numbers),
        refused("training mode with dropout", r"call lm\.model\.eval\(\) first", contract.in_training_mode),
        right("training mode without dropout", contract.in_training_mode_without_dropout),
        *(right(f"products in {precision!r} precision", contract.products_of_less_precision, precision, bound)
          for precision, bound in dict(high=1e-2, medium=4e-2).items()),
        right("a comparison that runs out of memory is no verdict", contract.a_comparison_that_runs_out_of_memory),
        refused("weights that are nowhere (meta)", "over a short text fails", engines.without_weights),
        right("copies and pickles of a model", engines.copies_say_the_same),
        right("save_pretrained inside `steer`", engines.saved_while_steered),
        refused("copies and pickles inside `steer`", "is being steered, and what is copied or pickled", engines.copied_while_steered),
        right('dtype="auto"', engines.a_model_in_the_precision_it_was_saved_in),
        refused("a dtype for a model that is loaded", "dtype would do nothing", engines.a_setting_for_a_loaded_model),
        refused("a dtype that does not exist", "expected a torch dtype", engines.an_unknown_dtype),
    ],
}

# 12. A sample of the families, and what each stands for; with its verdict and words of the message where it is not right in all.
FAMILIES = {
    "llama": "grouped queries",
    "gpt2": "learned positions",
    "gpt_neo": "local attention that no setting calls a sliding window",
    "gemma3_text": "sliding windows",
    "gpt_oss": "experts, attention sinks",
    "bloom": "alibi",
    "falcon": "parallel blocks, one key for all heads",
    "qwen3_moe": "experts",
    "deepseek_v3": "latent attention",
    "qwen3_5_text": "linear attention between full attention",
    "mamba": "a state space, no attention",
    "granitemoehybrid": "state spaces and attention",
    "camembert": "an encoder as decoder, which counts positions from another number",
    "gemma4_text": "blocks that share keys and compute only the last columns",
    "inkling_text": "a convolution after the last block's MLP",
    "chameleon": "a text model within one that sees; it changes its logits in place",
    "phi3, long rotary scaling": "positions that mean something else in a long text",
    "moshi": ("warned", "from its KV cache"),
    "reformer": ("in part", "pass no gradient on"),
    "bart": ("in part", "Padding on the left changes"),
    "mllama": ("in part", "it is not run in a pass over a text"),
    "gemma3n_text": ("refused", "not one residual stream"),
    "bert, not as a decoder": ("refused", "is not causal"),
}


def cases():
    for kind, rows in CASES.items():
        assert len({name for name, *_ in rows}) == len(rows), f"two cases of one name: {kind}"
        yield from (pytest.param(test, words, check, id=f"{kind}: {name}") for name, test, words, check in rows)
    for family, what in FAMILIES.items():
        outcome, words = ("verified", "") if isinstance(what, str) else what
        yield pytest.param(is_family, (family, outcome, words), None, id=f"12. Families: {family}: {outcome}")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("test, words, check", cases())
def test_case(test, words, check, tmp_path):
    if check is not None and "tmp_path" in inspect.signature(check).parameters:
        check = partial(check, tmp_path=tmp_path)
    test(*words, *([] if check is None else [check]))


def table(heading):
    "The rows of a table of the page: [(family, class, outcome, why)]."
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


def test_the_page_has_a_row_for_every_family_and_none_is_wrong():
    rows = table("Families")
    assert sorted(row[:2] for row in rows) == sorted(families())
    assert sorted(row[:2] for row in table("Other settings")) == sorted(variants())
    assert {row[0] for row in table("In bf16")} == set(BF16)
    every = [*rows, *table("Other settings"), *table("In bf16")]
    assert [row for row in every if row[2] not in VERDICTS or row[2] == "WRONG"] == []
    assert [row for row in every if row[2] != "verified" and not row[3]] == []
    opening = re.search(r"^Of the (\d+) .*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    counts = Counter(row[2] for row in rows)
    assert int(opening[1]) == len(rows) and all(f"{n} {name}" in opening[0] for name, n in counts.items())
