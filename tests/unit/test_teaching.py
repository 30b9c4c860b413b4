"""Stage "teach": which text the student is kept on."""

from dataclasses import replace
from types import SimpleNamespace

from qrealign.calibrate.methods import method_settings
from qrealign.data.encode import ChatEncoder
from qrealign.data.prompts import Prompt
from qrealign.pipeline.teaching import _windows
from tests.helpers import tiny_tokenizer

LENGTH = 16


def windows(text, harmless, count):
    encoder = ChatEncoder(tiny_tokenizer(), max_length=96)
    prompts = SimpleNamespace(
        text=[Prompt(text=line) for line in text],
        malicious=[Prompt(text="zzzzzzzzzzzzzzzzzzzzzzzz")],
        harmless=lambda: [Prompt(text=line) for line in harmless],
    )
    context = SimpleNamespace(data=SimpleNamespace(calibration=prompts), calibration_encoder=encoder)
    settings = replace(method_settings("realign", sequence_length=LENGTH), samples=count, text_share=1.0, steps=10_000)
    found = _windows(context, settings)
    assert all(len(window) == LENGTH for window in found)
    return [encoder.tokenizer.decode(window) for window in found]


def test_half_of_the_text_is_harmless_prompts_and_none_of_it_malicious():
    found = windows(["a" * 200], ["b" * 200], 6)
    assert [window[0] for window in found] == ["a", "b"] * 3
    assert not any("z" in window for window in found)


def test_one_kind_fills_up_for_the_other():
    assert {window[0] for window in windows([], ["b" * 200], 6)} == {"b"}
    assert len(windows(["a" * 40], ["b" * 200], 10)) == 10
