"""Model judges: how each form is asked and read, with tiny models built to notice exclamation marks."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qrealign.errors import DeviceError, JudgeError, ModelError
from qrealign.judges.forms import BEAVER_DAM, CHAT, FORMS, HARMBENCH, LLAMA_GUARD, WILDGUARD, find_form, split_form
from qrealign.judges.model import QuestionWriter, label_probabilities
from qrealign.judges.question import YES_OR_NO, Unread, read_verdict, settle_verdicts
from qrealign.judges.resolve import open_judge
from tests.helpers import CHAT_TEMPLATE, tiny_config, tiny_model, tiny_tokenizer

PROMPTS = ["first", "second prompt", "third", "the fourth prompt is longer"]
ANSWERS = [
    "!!!!!!!!!!!!!!!!!!!!",
    "calm and short",
    "no marks at all in this one, which is the longest",
    "wild!!!!!!!!!!!!",
]
TRUTH = [True, False, False, True]
WORDS = {
    "harmbench": ("yes", "no"),
    "chat": ("Yes", "No"),
    "llama-guard": ("\n\nunsafe", "\n\nsafe"),
    "wildguard": (
        "Harmful request: yes\nResponse refusal: no\nHarmful response: yes",
        "Harmful request: yes\nResponse refusal: no\nHarmful response: no",
    ),
}
SIZE = {"vocab_size": 272, "max_position_embeddings": 4096}
# A template that shows content in parts only, as that of Llama Guard 3 1B does.
PARTS_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}; {% endfor %}verdict:"
)


def notice_marks(model, tokenizer):
    """Set weights so that channel 0 of the last token holds the share of `!` in the text, and channel 1 about 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 1] = 1.0
        embeddings[tokenizer("!", add_special_tokens=False).input_ids[0], 0] = 1.0
        for layer in model.model.layers:  # queries and keys are zero: attention takes the mean over the text
            layer.self_attn.v_proj.weight[0, 0] = 1.0
            layer.self_attn.o_proj.weight[0, 0] = 1.0
    return embeddings


def judge_folder(folder, form, chat_template=CHAT_TEMPLATE):
    """Save a tiny language model that writes the harmful word of `form` for texts with `!`, and the safe one else."""
    tokenizer = tiny_tokenizer(chat_template)
    words = WORDS[form]
    tokenizer.add_tokens(list(words))
    harmful, safe = tokenizer.convert_tokens_to_ids(list(words))
    model = tiny_model("llama", tie_word_embeddings=False, **SIZE)
    embeddings = notice_marks(model, tokenizer)
    with torch.no_grad():
        embeddings[[harmful, safe], 2] = 1.0  # after the verdict, stop
        model.lm_head.weight[harmful, 0] = 100.0
        model.lm_head.weight[safe, 1] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id, 2] = 1000.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier_folder(folder):
    """Save a tiny classifier of 14 kinds of harm, of which the fourth is texts with `!`."""
    tokenizer = tiny_tokenizer(None)
    config = tiny_config("llama", num_labels=14, problem_type="multi_label_classification", **SIZE)
    model = AutoModelForSequenceClassification.from_config(config)
    notice_marks(model, tokenizer)
    with torch.no_grad():
        model.score.weight[:, 1] = -1.0
        model.score.weight[3, 0] = 100.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", WORDS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_language_model_judges_read_the_answer(form, batch_size, tmp_path):
    folder = judge_folder(tmp_path / "judge", form)
    judge = open_judge(f"{folder}#{form}", device="cpu", batch_size=batch_size)
    assert judge.harmful(PROMPTS, ANSWERS) == TRUTH
    assert form in judge.note
    assert judge.harmful([], []) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_classifier_judges_read_the_answer(batch_size, tmp_path):
    judge = open_judge(str(classifier_folder(tmp_path / "moderation")), device="cpu", batch_size=batch_size)
    assert judge.harmful(PROMPTS, ANSWERS) == TRUTH


def test_a_judge_that_does_not_fit_is_streamed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("qrealign.models.loading.RESIDENT_SHARE", 0.0)
    for spec in (
        f"{judge_folder(tmp_path / 'language', 'chat')}#chat",
        str(classifier_folder(tmp_path / "classifier")),
    ):
        caplog.clear()
        assert open_judge(spec, device="cpu", batch_size=2).harmful(PROMPTS, ANSWERS) == TRUTH
        assert "streamed" in caplog.text


def test_probabilities_do_not_depend_on_padding_or_on_what_the_last_token_is(tmp_path):
    folder = classifier_folder(tmp_path / "moderation")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    writer = QuestionWriter(tiny_tokenizer(None), BEAVER_DAM, 4096)
    questions = [writer.write(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert all(ids[-1] == writer.encoder.tokenizer.eos_token_id for ids in questions)
    questions[0] = [*questions[0], writer.encoder.pad_id]  # the model's own pooling would drop this token
    together = label_probabilities(model, writer.encoder.pad(questions))
    alone = torch.cat([label_probabilities(model, writer.encoder.pad([ids])) for ids in questions])
    assert together.shape == (4, 14)
    torch.testing.assert_close(together, alone)


def test_a_verdict_that_cannot_be_read_counts_as_harmful(tmp_path):
    folder = judge_folder(tmp_path / "judge", "chat")
    judge = open_judge(f"{folder}#llama-guard", device="cpu")
    assert judge.harmful(PROMPTS, ANSWERS) == [True] * 4
    judge.harmful(PROMPTS[:1], ANSWERS[:1])
    assert "5 of 5 verdicts could not be read" in judge.note
    with pytest.raises(JudgeError, match="none of the 12 verdicts of judge judge#llama-guard can be read"):
        judge.harmful(PROMPTS * 3, ANSWERS * 3)


@pytest.mark.parametrize("form", [HARMBENCH, WILDGUARD, BEAVER_DAM, LLAMA_GUARD, CHAT], ids=lambda form: form.name)
def test_long_texts_lose_their_end_and_never_the_form(form):
    writer = QuestionWriter(tiny_tokenizer(CHAT_TEMPLATE), form, 4096)
    short, long = writer.write("PROMPT", "ANSWER"), writer.write("PROMPT " + "p" * 9000, "ANSWER " + "a" * 9000)
    limit = form.max_length - (form.max_new_tokens if form.verdict else 0)
    assert limit - 20 <= len(long) <= limit
    text, cut = (writer.encoder.tokenizer.decode(ids) for ids in (short, long))
    assert "PROMPT" in cut and "ANSWER" in cut
    assert cut.startswith(text.split("PROMPT")[0]) and cut.endswith(text.split("ANSWER")[1])
    assert cut.count("p" * 50) and cut.count("a" * 50)
    assert short[0] == 1 and short.count(1) == 1  # one bos


def test_llama_guard_templates_that_take_parts_are_given_parts():
    writer = QuestionWriter(tiny_tokenizer(PARTS_TEMPLATE), LLAMA_GUARD, 4096)
    assert writer.encoder.tokenizer.decode(writer.write("ask", "tell")) == "user: ask; assistant: tell; verdict:"


@pytest.mark.parametrize(
    ("template", "form", "words"),
    [
        (None, LLAMA_GUARD, "no chat template"),
        (None, CHAT, "no chat template"),
        ("{{ messages[0]['content'] }}", LLAMA_GUARD, "shows no answer"),
        ("{{ raise_exception('no') }}", LLAMA_GUARD, "shows no answer"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, form, words):
    with pytest.raises(ModelError, match=words):
        QuestionWriter(tiny_tokenizer(template), form, 4096)


def test_a_judge_that_reads_too_little_is_refused():
    with pytest.raises(ModelError, match="too few"):
        QuestionWriter(tiny_tokenizer(None), HARMBENCH, 256)


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("cais/HarmBench-Llama-2-13b-cls", HARMBENCH),
        ("cais/HarmBench-Mistral-7b-val-cls", HARMBENCH),
        ("/models/wildguard", WILDGUARD),
        ("meta-llama/LlamaGuard-7b", LLAMA_GUARD),
        ("meta-llama/Meta-Llama-Guard-2-8B", LLAMA_GUARD),
        ("meta-llama/Llama-Guard-3-8B", LLAMA_GUARD),
        ("PKU-Alignment/beaver-dam-7b", BEAVER_DAM),
    ],
)
def test_forms_are_found_by_name(model, form):
    assert find_form(model, None, {}) is form


def test_forms_are_found_by_the_configuration_or_by_the_users_word():
    assert find_form("/copy", None, {"_name_or_path": "allenai/wildguard"}) is WILDGUARD
    assert find_form("/copy", None, {"problem_type": "multi_label_classification"}) is BEAVER_DAM
    assert find_form("allenai/wildguard", "chat", {}) is CHAT
    assert split_form("org/name#chat") == ("org/name", "chat")
    assert split_form("org/name") == ("org/name", None)
    with pytest.raises(JudgeError, match="name its form, as in org/unknown#chat"):
        find_form("org/unknown", None, {})
    with pytest.raises(JudgeError, match="no form 'oracle'"):
        find_form("org/unknown", "oracle", {})
    assert all(form.name == name for name, form in FORMS.items())


def test_judges_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="does not exist"):
        open_judge(f"{tmp_path / 'nowhere'}#chat")
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_judge(f"{tmp_path / 'empty'}#chat")
    for unknown in (str(tmp_path / "empty"), "refusal_rule", "org/name"):
        with pytest.raises(JudgeError, match="check the name, or name its form"):
            open_judge(unknown)
    folder = judge_folder(tmp_path / "judge", "chat")
    with pytest.raises(DeviceError, match="no device"):
        open_judge(f"{folder}#chat", device="abacus")


@pytest.mark.parametrize(
    ("text", "pattern", "verdict"),
    [
        ("yes", YES_OR_NO, True),
        ("**No.**", YES_OR_NO, False),
        ("Yes, it does", YES_OR_NO, True),
        ("<think>yes or no?\nhm</think>\n\nno", YES_OR_NO, False),
        ("nothing", YES_OR_NO, None),
        ("I cannot say yes", YES_OR_NO, None),
        ("", YES_OR_NO, None),
        ("\n\nunsafe\nS2", LLAMA_GUARD.verdict, True),
        ("safe", LLAMA_GUARD.verdict, False),
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: no", WILDGUARD.verdict, False),
        ("Harmful request: no\nResponse refusal: n/a\nHarmful response: yes", WILDGUARD.verdict, True),
        ("Harmful request: yes", WILDGUARD.verdict, None),
    ],
)
def test_verdicts_are_read(text, pattern, verdict):
    assert read_verdict(text, pattern) is verdict


def test_a_few_verdicts_may_be_unreadable():
    unread = Unread()
    assert settle_verdicts([], YES_OR_NO, "x", unread) == [] and unread.remark() == ""
    assert settle_verdicts(["no"] + ["hm"] * 20, YES_OR_NO, "x", unread) == [False] + [True] * 20
    assert settle_verdicts(["yes"], YES_OR_NO, "x", unread) == [True]
    assert unread == Unread(count=20, asked=22)
    with pytest.raises(JudgeError, match="the first is 'hm'"):
        settle_verdicts(["hm"] * 11, YES_OR_NO, "x", unread)
