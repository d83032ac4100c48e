"""How the contract is checked: once, again when the model changes, without steering, and at the length of a job's rows."""

import peft
import pytest
import torch
from cases_contract import TEXTS, gemma4, made, probe, vector

from oneshot_steering.models import TINY_ARCHITECTURES, tiny_lm
from oneshot_steering.objective import Example
from oneshot_steering.optimize import Stop, optimize
from oneshot_steering.steering import Steering


def test_models_that_keep_the_contract():
    for lm in (*map(tiny_lm, TINY_ARCHITECTURES), gemma4(), made("mamba", intermediate_size=64), made("bert", is_decoder=True)):
        for dtype in (torch.float32, torch.bfloat16):
            lm.model.to(dtype)
            assert not lm.contract.broken, lm.contract


def test_it_is_checked_once_and_again_when_the_model_has_changed():
    lm, blocks = tiny_lm(), []
    for layer in lm.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: blocks.append(1))
    passes = lambda: len(blocks) / lm.n_layers  # what is skipped is not counted
    assert not passes() and lm.checks is None
    lm.log_probs("the fox", " is")
    assert len(lm.checks) == 5 and passes() == 3  # two of the check, one of its own
    lm.log_probs("the fox", " is")
    assert passes() == 4
    adapted = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    lm.shortcuts["of the model before"] = True
    lm.log_probs("the fox", " is")
    assert passes() == 7 and "of the model before" not in lm.shortcuts
    adapted.disable_adapter_layers()
    lm.log_probs("the fox", " is")
    assert passes() == 10
    with lm.resume(2, lm.states_at(2, *probe(lm))):
        lm.run(*probe(lm))
    assert passes() == 11


def test_a_change_within_a_step_is_seen_at_the_next_one():
    lm, example = tiny_lm(), Example("the quick", promote=" brown fox")
    adapted = []

    def adapt(step, losses, steering):
        if step == 1:
            config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
            lm.shortcuts["of the model before"] = True
            adapted.append(peft.get_peft_model(lm.model, config))

    optimize(lm, example, 2, steps=4, stop=Stop(callback=adapt), progress=False)
    assert adapted and "of the model before" not in lm.shortcuts


@pytest.mark.parametrize("steered", [False, True])
def test_a_check_within_steering_is_not_steered(steered):
    lm, reference = tiny_lm(), tiny_lm()
    reference.ready()
    vectors = Steering(vector(lm), 1, positions="last_2")
    if steered:
        with lm.steer(vectors), reference.steer(vectors):
            assert lm.generate(TEXTS, 4) == reference.generate(TEXTS, 4)
    else:
        assert all(torch.equal(a, b) for a, b in zip(lm.hidden_states(TEXTS, 2), reference.hidden_states(TEXTS, 2), strict=True))


@pytest.mark.parametrize("family, limits", [("llama", {}), ("qwen3", {}), ("gemma3_text", {"sliding_window": 8})])
def test_rows_are_compared_at_their_own_length_beyond_a_window(family, limits):
    lm = tiny_lm(family)
    assert lm.length_limits == limits
    assert [lm.size_class(n) for n in (5, 8, 9, 27)] == ([0, 0, 16, 32] if limits else [0, 0, 0, 0])


def test_a_shortcut_that_is_right_on_short_rows_is_not_trusted_on_long_ones():
    windows = dict(attention_types=[[["global", "local"], 2]], window_size=16)
    lm = made("gpt_neo", num_layers=4, num_heads=4, **windows)
    assert lm.length_limits == {"window_size": 16}
    assert lm.trusted("tree attention", 12) and not lm.trusted("tree attention", 27, 40)  # its mask replaces the window's
    assert lm.trusted("resume", 27, 2)  # this one keeps the model's own masks


def test_every_shortcut_is_right_on_a_plain_model():
    lm = tiny_lm()
    optimize(lm, Example("the quick", promote=[" brown fox", " brown dog"]), 2, steps=1, progress=False)
    assert lm.shortcuts and all(lm.shortcuts.values())
