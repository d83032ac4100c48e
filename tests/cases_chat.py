"""Checks of the cases in test_cases.py: chat templates of many kinds, and where texts stop."""

from functools import partial

import numpy as np

from oneshot_steering.lm import LM, Sampling
from oneshot_steering.models import tiny_lm, tiny_model, tiny_tokenizer

LOOP = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
STRINGS = LOOP.replace("%s", "<{{ m.role }}>{{ m.content | trim }}")
PARTS = LOOP.replace("%s", "<{{ m.role }}>{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}")
FIRST_PART = LOOP.replace(
    "%s", "<{{ m.role }}>{% if m.content[0].type == 'image' %}!{% endif %}{% for p in m.content %}{{ p.text }}{% endfor %}"
)
EITHER = LOOP.replace(
    "%s", "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
NO_SYSTEM = LOOP.replace("%s", "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + STRINGS
REFUSES_SYSTEM_PARTS = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PARTS
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
JSON_TOOL = LOOP.replace("%s", "<{{ m.role }}>{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}")
THINKS = STRINGS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
USER, SYSTEM = "What is it, then?", "Be brief."


def templated(template, **config):
    lm = LM(tiny_model(**config), tiny_tokenizer(), name="tiny")
    lm.tok.chat_template = template
    return lm


def every_form_of_content_arrives(template):
    lm = templated(template)
    assert lm.chat(USER) == f"<user>{USER}<assistant>"
    assert lm.chat(USER, system=SYSTEM, prefill=" It") == f"<system>{SYSTEM}<user>{USER}<assistant> It"
    parts = [dict(type="text", text="What is "), dict(type="text", text="it, then?")]
    assert lm.chat(parts) == lm.chat([dict(role="user", content=parts)]) == lm.chat(USER)
    assert lm.chat("user") == "<user>user<assistant>"  # a text that the template's own words contain


def the_system_message_is_put_before_the_first_question(template):
    lm = templated(template)
    assert lm.chat(USER, system=SYSTEM) == f"<user>{SYSTEM}\n\n{USER}<assistant>"
    turns = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello"), dict(role="user", content=USER)]
    assert lm.chat(turns, system=SYSTEM) == f"<user>{SYSTEM}\n\nHi<assistant>Hello<user>{USER}<assistant>"


TOOL_CALL = [dict(role="user", content="2 + 2?"), dict(role="assistant", content=None, tool_calls=[dict(name="add")]),
             dict(role="tool", content='{"sum": "4"}')]  # fmt: skip


def tools_are_written():
    lm = templated(JSON_TOOL.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].name }}"))
    assert lm.chat(TOOL_CALL) == '<user>2 + 2?<assistant>add<tool>"{\\"sum\\": \\"4\\"}"<assistant>'


def arguments_reach_the_template():
    lm = templated(THINKS)
    assert lm.chat(USER, enable_thinking=False) == lm.chat(USER) + "<think></think>"


def written(template, messages, **options):
    "The use that writes a conversation."
    return [lambda: templated(template).chat(messages, **options)]


def said(*roles):
    "Messages of these roles."
    return [dict(role=role, content=word) for role, word in zip(roles, ("Hello", "there", "again"), strict=False)]


def with_tokens(*tokens):
    tok = tiny_tokenizer()
    tok.add_special_tokens({"additional_special_tokens": list(tokens)})
    return LM(tiny_model(vocab_size=len(tok)), tok)


TURNS = [
    LOOP.replace("%s", "{{ m.role }}: {{ m.content }}<|eot_id|>"),
    LOOP.replace("%s", "{{ m.role }}: {{ m.content }} <|eot_id|>\n"),
    LOOP.replace("%s", "{% if not loop.first %}<|eot_id|>{% endif %}{{ m.role }}: {{ m.content }}"),
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|eot_id|>{% endfor %}assistant:",
]


def the_end_of_a_turn_ends_a_generation(template):
    lm = with_tokens("<|eot_id|>", "<|other|>")
    eot = lm.tok.convert_tokens_to_ids("<|eot_id|>")
    assert lm.stop_ids() == {lm.tok.eos_token_id}
    lm.tok.chat_template = template
    assert lm.stop_ids() == {lm.tok.eos_token_id, eot}
    always = lambda logits: logits.argmax(-1) * 0 + eot
    assert list(lm.decode_steps([lm.encode("a")], 5, sampler=always)) == [[None]]


def tokens_that_no_template_writes_do_not_end_a_generation():
    lm = with_tokens("<|im_end|>", "<end_of_turn>")
    lm.tok.chat_template = LOOP.replace("%s", "{{ m.role }}: {{ m.content }}\n")
    assert lm.stop_ids() == {lm.tok.eos_token_id}
    lm.model.generation_config.eos_token_id = [1, 7]
    assert lm.stop_ids() == {1, 7}


# Where texts stop

TEXTS = ["the quick brown fox", "a dog", "There is no reason"]


def by_hand(text, *stops):
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text


def a_stop_text_ends_each_row_where_it_comes(kind):
    lm = tiny_lm(seed=3)
    whole = lm.generate(TEXTS, 30)
    two = [whole[1][4:6], whole[2][12:14]]
    stops = {"inside a token": [whole[0][9]], "over tokens": [whole[0][5:12]], "two": two, "never": ["qqqq"]}[kind]
    expected = [by_hand(text, *stops) for text in whole]
    assert (expected != whole) == (kind != "never")
    assert lm.generate(TEXTS, 30, stop=stops) == lm.generate(TEXTS, 30, stop=stops, batch_size=1, use_cache=False) == expected
    streamed = [""] * 3
    for row, piece in lm.generate(TEXTS, 30, stop=stops, stream=True):
        streamed[row] += piece
    assert streamed == expected
    assert "".join(lm.generate(TEXTS[0], 30, stop=stops[0], stream=True)) == by_hand(whole[0], stops[0])


def a_stop_token_ends_a_row_and_what_has_ended_is_not_computed():
    lm = tiny_lm(seed=3)
    tokens = [step[0] for step in lm.decode_steps([lm.encode(TEXTS[0])], 12)]
    assert lm.generate(TEXTS[0], 12, stop=tokens[6]) == lm.text_of(tokens[: tokens.index(tokens[6])])
    steps, ended = 0, set()
    for _ in lm.decode_steps([lm.encode(TEXTS[0])] * 2, 12, ended_rows=ended):
        steps += 1
        ended.add(steps - 1)
    assert steps == 2


def token_zero_and_the_numbers_of_numpy_may_be_stops():
    lm, tokens = tiny_lm(), iter([[5], [0], [6], [6]])
    stops = []
    lm.decode_steps = lambda *args: stops.append(args[5]) or tokens
    for stop in (0, [0], np.int64(0), np.array([0, 5])):
        lm.generate("the", 4, stop=stop)
    assert stops == [[0], [0], [0], [0, 5]]


def a_special_token_may_be_a_stop_text():
    lm = with_tokens("<|user|>")
    token, letter = lm.tok.convert_tokens_to_ids("<|user|>"), lm.encode("a")[-1]
    rows = iter([letter, token, letter, letter])
    lm.decode_steps = lambda *_: ([next(rows)] for _ in range(4))
    assert lm.generate("the", 4, stop="<|user|>") == "a"
    rows = iter([letter, token, letter, letter])
    assert lm.generate("the", 4, stop="aa") == "a"
    rows = iter([letter, token, letter, letter])
    assert lm.generate("the", 4) == "aaa"


def what_cannot_stop_a_text():
    return [partial(Sampling, stop=stop) for stop in ("", [""], [3.5], -1, True, None)] + [lambda: tiny_lm().generate("the", 4, stop="")]
