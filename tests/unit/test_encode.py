"""Prompts as ids: template, BOS, system text, cutting, and padding on either side."""

from __future__ import annotations

import pytest
import torch

from qrealign.data.encode import PLAIN_FORM, ChatEncoder, last_real_index
from qrealign.errors import DataError, ModelError
from tests.helpers import CHAT_TEMPLATE, tiny_tokenizer

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
DROPS_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% endif %}{% endfor %}"
)
NO_BOS = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def encoder(template: str | None = CHAT_TEMPLATE, **options: object) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(template), **{"max_length": 96, **options})  # type: ignore[arg-type]


def text_of(chat: ChatEncoder, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids))


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE, None], ids=["template", "double", "plain"]
)
def test_there_is_one_bos(template: str | None) -> None:
    chat = encoder(template)
    ids = chat.encode("hello")
    assert ids[0] == chat.tokenizer.bos_token_id and ids.count(chat.tokenizer.bos_token_id) == 1


def test_a_template_without_bos_is_left_as_it_is() -> None:
    chat = encoder(NO_BOS)
    assert text_of(chat, chat.encode("hello")) == "[INST] hello [/INST]"


def test_the_system_text_stands_where_the_template_puts_it() -> None:
    chat = encoder(system="Be kind.")
    assert text_of(chat, chat.encode("hello")) == "<s><<Be kind.>>\n[INST] hello [/INST]"
    assert chat.notes == []


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refused", "dropped"])
def test_a_template_without_system_role_gets_it_in_the_user_turn(template: str) -> None:
    chat = encoder(template, system="Be kind.")
    assert text_of(chat, chat.encode("hello")) == "<s>[INST] Be kind.\n\nhello [/INST]"
    assert "takes no system role" in chat.notes[0]


def test_without_template_the_plain_form_is_used_and_said() -> None:
    chat = encoder(None, system="Be kind.")
    assert text_of(chat, chat.encode("hello")) == "<s>" + PLAIN_FORM.format("Be kind.\n\nhello")
    assert "no chat template" in chat.notes[0]


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('never') }}", "{{ 1 / 0 }}"])
def test_a_broken_template_is_one_sentence(template: str) -> None:
    with pytest.raises(ModelError, match=r"chat template of .* cannot be rendered"):
        encoder(template)


def test_empty_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="empty prompt"):
        encoder().encode_many(["fine", " \n"])
    assert encoder().encode_many([]) == []


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["template", "plain"])
def test_an_over_long_prompt_loses_its_end_and_keeps_the_generation_prompt(template: str | None) -> None:
    chat = encoder(template, max_length=60)
    ids = chat.encode("word " * 100)
    assert len(ids) == 60
    assert text_of(chat, ids).startswith("<s>[INST] word" if template else "<s>### Instruction:\nword")
    assert text_of(chat, ids).endswith("[/INST]" if template else "### Response:\n")
    chat.encode("word " * 100)
    assert [note for note in chat.notes if "cut" in note] == [
        "1 prompts did not fit into 60 tokens: the end of their text was cut"
    ]


def test_a_length_that_cannot_hold_the_template_is_refused() -> None:
    with pytest.raises(DataError, match="8 tokens cannot hold a prompt"):
        encoder(max_length=8).encode("hello")


def test_answers_follow_the_same_prompt_ids() -> None:
    chat = encoder()
    prompt, whole = chat.encode("hello"), chat.encode("hello", "fine")
    assert whole[: len(prompt)] == prompt and chat.decode(whole[len(prompt) :]) == "fine"
    assert chat.encode_many(["hello", "you"], ["fine", "too"]) == [whole, chat.encode("you", "too")]
    long = chat.encode("word " * 50, "answer " * 50)
    assert len(long) == chat.max_length and chat.decode(long).endswith(("answer " * 50)[: chat.max_length // 2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_marks_the_last_real_token(side: str) -> None:
    chat = encoder()
    batch = chat.pad([[5, 6, 7], [8], [9, 10]], side=side).to("cpu")  # type: ignore[arg-type]
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 3)
    assert batch.input_ids.gather(1, batch.last_index[:, None])[:, 0].tolist() == [7, 8, 10]
    assert (batch.input_ids[batch.attention_mask == 0] == chat.tokenizer.pad_token_id).all()
    assert batch.last_index.tolist() == ([2, 2, 2] if side == "left" else [2, 0, 1])
    assert last_real_index(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])).tolist() == [1, 3]


def test_padding_needs_tokens_but_no_pad_token() -> None:
    chat = encoder()
    for sequences in ([], [[1], []]):
        with pytest.raises(ValueError, match="no empty one"):
            chat.pad(sequences)
    chat.tokenizer.pad_token = None
    assert chat.pad_id == chat.tokenizer.eos_token_id


def test_the_fingerprint_changes_with_what_decides_the_ids() -> None:
    same = encoder().fingerprint()
    assert same == encoder().fingerprint()
    others = {
        encoder(None).fingerprint(),
        encoder(NO_BOS).fingerprint(),
        encoder(max_length=95).fingerprint(),
        encoder(system="Be kind.").fingerprint(),
    }
    assert len(others) == 4 and same not in others


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two"},
]
_TURNS = "<s>[INST] Be kind.\n\none [/INST] yes</s>[INST] two [/INST]"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        pytest.param(CHAT_TEMPLATE, "<s><<Be kind.>>\n[INST] one [/INST] yes</s>[INST] two [/INST]", id="template"),
        pytest.param(NO_SYSTEM, _TURNS, id="refused"),
        pytest.param(DROPS_SYSTEM, "<s>[INST] Be kind.\n\none [/INST][INST] two [/INST]", id="dropped"),
        pytest.param(None, f"<s>{PLAIN_FORM}yes\n\n{PLAIN_FORM}".format("Be kind.\n\none", "two"), id="plain"),
    ],
)
def test_a_conversation_keeps_its_turns_and_its_system_text(template: str | None, text: str) -> None:
    chat = encoder(template)
    assert text_of(chat, chat.encode_conversation(CONVERSATION)) == text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["template", "plain"])
def test_a_conversation_of_one_turn_is_a_prompt(template: str | None) -> None:
    chat = encoder(template)
    assert chat.encode_conversation([{"role": "user", "content": "hello"}]) == chat.encode("hello")


def test_a_conversation_that_a_template_refuses_is_told() -> None:
    chat = encoder("{% if messages|length > 1 %}{{ raise_exception('never') }}{% endif %}" + CHAT_TEMPLATE)
    with pytest.raises(ModelError, match="never"):
        chat.encode_conversation(CONVERSATION[1:])
