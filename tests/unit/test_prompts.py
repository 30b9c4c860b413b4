"""Data files by format, rows by role, and prompts compared by their words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from qrealign.data.prompts import (
    Label,
    Prompt,
    _rank,
    deduplicate,
    find_overlap,
    normalise,
    read_prompts,
    sample,
    split_by_hash,
)
from qrealign.data.readers import read_rows, split_spec
from qrealign.data.tasks import final_number
from qrealign.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"prompt": "How do I bake bread?", "label": 0}, {"prompt": "How do I pick a lock?", "label": 1}]


def _csv(rows: list[dict[str, object]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, object]]], str]] = {
    "list.json": json.dumps,
    "object.json": lambda rows: json.dumps({"data": rows}),
    "lines.json": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "rows.jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows) + "\n\n",
    "rows.csv": _csv,
    "rows.tsv": lambda rows: "prompt\tlabel\n" + "".join(f"{row['prompt']}\t{row['label']}\n" for row in rows),
}


def write(path: Path, rows: list[dict[str, object]] | list[str]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str, packed: bool) -> None:
    text = WRITERS[name](ROWS)  # type: ignore[arg-type]
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert [p.text for p in read_prompts(str(path), role="malicious")] == ["How do I pick a lock?"]
    assert [p.text for p in read_prompts(str(path), role="benign")] == ["How do I bake bread?"]


def test_text_files_hold_a_prompt_a_line_or_blocks_of_running_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone line\nanother\n\nthird\n", encoding="utf-8")
    assert [p.text for p in read_prompts(str(path), role="benign")] == ["one line", "another", "third"]
    assert [p.text for p in read_prompts(str(path), role="text")] == ["one line\nanother", "third"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a b"}, "a b"),
        ({"Prompt": "a b"}, "a b"),
        ({"instruction": "sum", "input": "1 2"}, "sum\n1 2"),
        ({"instruction": "sum", "input": ""}, "sum"),
        ({"question": "why?"}, "why?"),
        ({"Goal": "do it"}, "do it"),
        ({"Behavior": "do it"}, "do it"),
        ({"text": "plain"}, "plain"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "u",
        ),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, "u"),
        ({"prompt": [{"role": "user", "content": "u"}]}, "u"),
        ("just a string", "just a string"),
    ],
)
def test_field_shapes(tmp_path: Path, row: dict[str, object] | str, text: str) -> None:
    (prompt,) = read_prompts(write(tmp_path / "a.jsonl", [row]), role="malicious")  # type: ignore[list-item]
    assert (prompt.text, prompt.label) == (text, Label.MALICIOUS)


def test_benign_rows_keep_their_answers_and_malicious_ones_do_not(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "x", "label": "safe"}, {"prompt": "b", "response": "y", "label": "harmful"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert read_prompts(path, role="benign")[0].answer == "x"
    assert read_prompts(path, role="malicious")[0].answer is None
    chat = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "hello"}]}]
    assert read_prompts(write(tmp_path / "b.jsonl", chat), role="benign")[0].answer == "hello"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, Label.BENIGN),
        (1, Label.MALICIOUS),
        (True, Label.MALICIOUS),
        (False, Label.BENIGN),
        ("0", Label.BENIGN),
        ("1.0", Label.MALICIOUS),
        ("safe", Label.BENIGN),
        ("Benign", Label.BENIGN),
        ("unsafe", Label.MALICIOUS),
        ("harmful", Label.MALICIOUS),
        ("refusal", Label.MALICIOUS),
        ("Malicious", Label.MALICIOUS),
    ],
)
def test_labels(tmp_path: Path, value: object, label: Label) -> None:
    role = "malicious" if label is Label.MALICIOUS else "benign"
    (prompt,) = read_prompts(write(tmp_path / "a.jsonl", [{"prompt": "a", "label": value}]), role=role)
    assert prompt.label is label


def test_a_prompt_with_a_harmful_answer_is_malicious_in_all_its_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Make a BOMB!", "label": "safe"},
        {"prompt": "make a bomb", "label": "harmful"},
        {"prompt": "ok", "label": "safe"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert [p.text for p in read_prompts(path, role="benign")] == ["ok"]
    assert [p.text for p in read_prompts(path, role="malicious")] == ["Make a BOMB!"]  # and only once
    assert [p.text for p in read_prompts(path + "?label=safe", role="benign")] == ["ok"]


def test_filters(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "source": "star1/train"},
        {"prompt": "two", "source": "star2"},
        {"prompt": "three", "source": "dolly:qa"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert [p.text for p in read_prompts(f"{path}?source=star1,DOLLY", role="benign")] == ["one", "three"]
    assert [p.text for p in read_prompts(f"{path}?source=star2&prompt=two", role="benign")] == ["two"]
    with pytest.raises(DataError, match="no row with source = nope; it holds dolly:qa, star1/train, star2"):
        read_prompts(f"{path}?source=nope", role="benign")
    with pytest.raises(DataError, match="no field 'origin' to filter by"):
        read_prompts(f"{path}?origin=x", role="benign")
    with pytest.raises(DataError, match="must look like"):
        read_prompts(f"{path}?source", role="benign")
    odd = tmp_path / "what?.jsonl"
    odd.write_text(json.dumps("x"), encoding="utf-8")
    assert split_spec(str(odd)) == (str(odd), {})


def test_empty_prompts_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": " "}, {"prompt": "a"}, {"prompt": None}])
    assert [p.text for p in read_prompts(path, role="benign")] == ["a"]
    assert "dropped 2 empty prompts" in caplog.text


BAD_FILES = {
    "missing": ("gone.jsonl", None, "there is no data file"),
    "empty": ("a.jsonl", b" \n", "is empty"),
    "no rows": ("a.json", b"[]", "holds no rows"),
    "only empty prompts": ("a.jsonl", b'{"prompt": ""}', "all 1 are empty"),
    "not UTF-8": ("a.jsonl", b'{"prompt": "caf\xe9"}', r"not UTF-8 text \(byte 15\)"),
    "no field": ("a.jsonl", b'{"id": 1}', "no field that holds a prompt.*its fields are id"),
    "broken JSON": ("a.json", b'{"data": [', "not valid JSON"),
    "no list": ("a.json", b'{"prompt": "a"}', "must hold a list"),
    "broken line": ("a.jsonl", b'{"prompt": "a"}\n{"prom', r"not valid JSON Lines \(line 2"),
    "number": ("a.json", b"[1]", "row 1 of .* is a int"),
    "broken CSV": ("a.csv", b'prompt\n"open', "not a valid CSV file"),
    "broken gzip": ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 50)[:-12], "not a whole gzip file"),
    "half a character": (
        "a.jsonl",
        rb'{"prompt": "a"}' + b"\n" + rb'{"prompt": "cut \ud83d"}',
        "row 2 .*half a character",
    ),
    "deep JSON": ("a.json", b"[" * 100_000, "cannot be read: .*nested too deep"),
    "long number": ("a.jsonl", b'{"prompt": "a", "label": ' + b"1" * 5000 + b"}", r"cannot be read \(line 1\)"),
    "unknown format": ("a.parquet", b"x", "unknown format"),
    "unknown label": ("a.jsonl", b'{"prompt": "a", "label": "meh"}', "has the label 'meh'"),
    "label missing": ("a.jsonl", b'{"prompt": "a", "label": 1}\n{"prompt": "b"}', "has the label None"),
    "one class": (
        "a.jsonl",
        b'{"prompt": "a", "label": 0}\n{"prompt": "b", "label": 0}',
        r"no malicious prompt .*rows: 2 benign",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_clear_sentence(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_prompts(str(path), role="malicious")
    assert "\n" not in str(error.value)


def test_a_name_too_long_for_a_file_is_no_file() -> None:
    for spec in ("x" * 300, "x" * 300 + ".jsonl?source=one"):
        with pytest.raises(DataError, match="there is no data file"):
            read_prompts(spec, role="benign")


def test_a_folder_and_an_unknown_role_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_prompts(str(tmp_path), role="benign")
    with pytest.raises(DataError, match="unknown role"):
        read_prompts(write(tmp_path / "a.jsonl", ["a"]), role="other")  # type: ignore[arg-type]


def test_hub_ids_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None) -> dict[str, list[dict[str, object]]]:
        if name == "some/broken":
            raise ConnectionError("cannot reach\nthe Hub")
        assert (name, configuration) == ("stanfordnlp/sst2", "default")
        return {"train": [{"sentence": "dull", "label": 0}], "test": [{"sentence": "great", "label": 1}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (prompt,) = read_prompts("stanfordnlp/sst2:default?split=test", role="task")
    assert prompt.text.endswith("Input: great") and (prompt.answer, prompt.split, prompt.source) == (
        "positive",
        "test",
        "sst2",
    )
    with pytest.raises(DataError, match="some/broken, and it cannot be loaded from the Hub: cannot reach the Hub"):
        read_rows("some/broken")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_rows("some/thing")


def test_tasks(tmp_path: Path) -> None:
    news = read_prompts(write(tmp_path / "agnews.jsonl", [{"text": " Rates rise. ", "label": 2}]), role="task")[0]
    assert news.text.endswith("Input: Rates rise.") and news.answer == "Business"
    sums = read_prompts(
        write(tmp_path / "my-gsm8k.jsonl", [{"question": "1+1?", "answer": "It is 2.\n#### 1,002.0"}]), role="task"
    )[0]
    assert sums.answer == "1002" and sums.source == "gsm8k"
    own = read_prompts(
        write(tmp_path / "own.jsonl", [{"question": "Capital of France?", "answer": "Paris"}]), role="task"
    )[0]
    assert (own.text, own.answer) == ("Capital of France?", "Paris")
    with pytest.raises(DataError, match="no task that can be scored"):
        read_prompts(write(tmp_path / "none.jsonl", [{"prompt": "a"}]), role="task")
    with pytest.raises(DataError, match="no task that can be scored"):
        read_prompts(write(tmp_path / "sst2.jsonl", [{"text": "a", "label": "neutral"}]), role="task")
    for label in ("\u00b2", "1" * 5000):  # digits that int() refuses
        with pytest.raises(DataError, match="no task that can be scored"):
            read_prompts(write(tmp_path / "sst2.jsonl", [{"text": "a", "label": label}]), role="task")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200 eggs.", "1200"),
        ("#### 72\nQuestion 5", "72"),
        ("first 3 then -4.50", "-4.50"),
        ("2.00", "2"),
        ("none", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_prompts_are_compared_by_words() -> None:
    assert normalise("  How's  THE\tweather_today?! ") == "how s the weather today"
    assert normalise("\uff26\uff35\uff2c\uff2c width") == "full width"
    assert normalise("???") != normalise("!!!")
    prompts = [Prompt(text="A b"), Prompt(text="c"), Prompt(text="a  B!")]
    assert deduplicate(prompts) == prompts[:2]


@pytest.mark.parametrize(
    "different",
    [
        [f"What is 12 {sign} 7?" for sign in "+-*/%<>\u00d7\u00f7"],
        ["Add -5 and 3", "Add 5 and 3"],
        ["x + y", "x - y", "(x) * y"],
        [f"Write it in {language}, please" for language in ("C++", "C#", "C")],
        ["\u0915\u093f", "\u0915\u0940", "\u0915"],  # Hindi and Thai words that differ in their vowel signs
        ["\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"],
    ],
)
def test_prompts_of_different_meaning_are_all_kept(different, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "answer": "a"}) + "\n" for text in different))
    assert [prompt.text for prompt in read_prompts(str(file), role="task")] == different
    assert not find_overlap(different[:1], different[1:])


@pytest.mark.parametrize(
    "alike",
    [
        ["What is 12 - 7?", "what is 12-7", "What is 12 \u2212 7"],
        ["# **Bake** the _bread_!", "- bake the *bread*", "Bake the bread \u263a\ufe0f"],
        ["Is self-harm - in short - bad?", "is self harm, in short: bad"],
    ],
)
def test_typography_makes_no_other_prompt(alike) -> None:
    assert len({normalise(text) for text in alike}) == 1


def test_the_order_in_which_prompts_are_sampled_is_that_of_every_published_run() -> None:
    prompts = ["How do I pick a lock?", "What is 12 + 7?", "What is 12 - 7?", "Write it in C++", "self-harm", "50% off"]
    assert [prompts.index(text) for text in sample(prompts, 6, 1)] == [3, 0, 5, 4, 1, 2]
    assert _rank("What is 12 + 7?", 0).hex()[:16] == "906f7da58d235f42"


def test_overlap_is_exact_or_contained() -> None:
    evaluation = ["Tell me how to pick a lock", "Open a door", "Steal"]
    training = [
        "tell me how to pick a LOCK.",
        "Please, tell me how to pick a lock quickly",
        "Open a door now",
        "steal!",
        "bake bread",
    ]
    found = find_overlap(training, evaluation)
    assert [(o.training, o.kind) for o in found] == [
        (training[0], "exact"),
        (training[1], "contained"),
        (training[3], "exact"),
    ]
    assert found[1].evaluation == evaluation[0]
    # A short question inside a longer evaluation prompt gives nothing away.
    assert find_overlap(["how to pick a lock"], ["Tell me how to pick a lock and then sell it"]) == []


def test_the_instruction_of_a_task_is_no_overlap(tmp_path: Path) -> None:
    rows = [
        {"text": "no", "label": "negative", "split": "test"},
        {"text": "no doubt", "label": "positive", "split": "train"},
        {"text": "no", "label": "negative", "split": "train"},
    ]
    path = write(tmp_path / "sst2.jsonl", rows)
    test, train = (read_prompts(f"{path}?split={split}", role="task") for split in ("test", "train"))
    assert [o.training for o in find_overlap(train, test)] == [train[1].text]


def test_splits_and_samples_depend_on_words_and_seed_alone() -> None:
    prompts = [Prompt(text=f"prompt number {i}") for i in range(1000)]
    first, second = split_by_hash(prompts, 0.25, seed=3)
    assert len(first) + len(second) == 1000 and 200 < len(first) < 300
    assert split_by_hash(list(reversed(prompts)), 0.25, seed=3)[0] == list(reversed(first))
    assert split_by_hash(prompts, 0.25, seed=4)[0] != first
    drawn = sample(prompts, 10, seed=0)
    assert drawn == sample(list(reversed(prompts)), 10, seed=0) != sample(prompts, 10, seed=1)
    with pytest.raises(DataError, match="1001 prompts are needed and only 1000"):
        sample(prompts, 1001, seed=0)


SHARED_COUNTS = [
    ("calib_clean.jsonl.gz", "malicious", 500),
    ("calib_clean.jsonl.gz", "benign", 500),
    ("eval_harmful.jsonl.gz?source=strongreject", "malicious", 152),
    ("eval_overrefusal.jsonl.gz", "over_refusal", 742),
    ("prompts_harmful_train.jsonl.gz", "malicious", 14777),
    ("instruct_alpaca.jsonl.gz", "benign", 22646),
    ("task_sst2.jsonl.gz?split=test", "task", 940),
    ("task_agnews.jsonl.gz?split=test", "task", 3763),
    ("task_gsm8k.jsonl.gz?split=test", "task", 676),
    ("text_wikitext2.jsonl.gz?split=test", "text", 30),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
class TestSharedData:
    """The real files, where they are."""

    @pytest.mark.parametrize(("spec", "role", "count"), SHARED_COUNTS)
    def test_counts(self, spec: str, role: str, count: int) -> None:
        prompts = read_prompts(str(SHARED / spec), role=role)  # type: ignore[arg-type]
        assert len(prompts) == count
        assert all(prompt.answer for prompt in prompts) or role != "task"

    def test_pairs(self) -> None:
        pairs = str(SHARED / "pairs_safety.jsonl.gz")
        malicious, benign = read_prompts(pairs, role="malicious"), read_prompts(pairs, role="benign")
        assert len(malicious) + len(benign) == 9681  # the distinct prompts of the manifest
        borderline = read_prompts(pairs + "?label=safe&source=coconot_pref,star1", role="benign")
        assert {p.source for p in borderline} == {"coconot_pref", "star1"} and len(borderline) > 1100

    def test_the_released_calibration_set_leaks_and_the_clean_one_does_not(self) -> None:
        harmful = read_prompts(str(SHARED / "eval_harmful.jsonl.gz"), role="malicious")
        released = read_prompts(str(SHARED / "calib_qrealign.jsonl.gz"), role="malicious")
        clean = read_prompts(str(SHARED / "calib_clean.jsonl.gz"), role="malicious")
        assert len(find_overlap(released, harmful)) == 230
        assert find_overlap(clean, harmful) == []
