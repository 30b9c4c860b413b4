"""Which jobs a command line leads to, what the variants are trained on, and what is kept apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.safety.command import choose_workers
from benchmarks.safety.corpora import Corpora
from benchmarks.safety.jobs import cell_options, finished, identity
from benchmarks.safety.plan import SEEDS
from benchmarks.safety.prompts import evaluation_data, held_pairs, write_benign, write_prefill
from benchmarks.safety.variants import RECOMMENDED, RECORD, encode_pairs, main, parse_variant, training_pairs
from qrealign.data.prompts import normalise, read_prompts, sample
from qrealign.errors import ConfigError, DataError
from qrealign.status import BAD_INPUT
from tests.bench_helpers import arguments, plan_of, write_data
from tests.helpers import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with models and data."""
    folder = tmp_path_factory.mktemp("plan")
    arguments(folder)
    return folder


def test_plain_rounding_is_always_there_and_once_per_scheme(folder):
    plan = plan_of(folder, "--schemes", "W8A8", "w4a4", "--seeds", "3", "4", "3")
    plan = replace(plan, methods=("realign", "interpolate"))
    names = [job.name for job in plan.measurements()]
    assert names[:2] == ["broken/aligned", "broken/finetuned"]
    assert [name for name in names if "rtn" in name] == ["broken/rtn-w8a8-s3", "broken/rtn-w4a4-s3"]
    assert [name for name in names if "interpolate" in name] == [
        "broken/interpolate-w8a8-s3",
        "broken/interpolate-w4a4-s3",
    ]
    assert sum("realign" in name for name in names) == 4 and len(set(names)) == len(names)


@pytest.mark.parametrize("text", ["{}", "[]", "3"])
def test_a_result_of_another_form_is_not_finished(folder, text):
    plan = plan_of(folder)
    job = plan.measurements()[0]
    plan.result_file(job).parent.mkdir(parents=True, exist_ok=True)
    plan.result_file(job).write_text(text)
    assert not finished(plan, job)
    plan.result_file(job).unlink()


def test_a_method_with_options_is_a_row_of_its_own(folder):
    methods = ["--methods", "realign", "realign:edit-rank=8,edit=lowrank"]
    plan = plan_of(folder, *methods, "--schemes", "w8a8", "--seeds", "0")
    write_benign(plan)
    first, second = (job for job in plan.measurements() if job.method.startswith("realign"))
    assert first.name != second.name and second.name == "broken/realign_edit-rank=8_edit=lowrank-w8a8-s0"
    assert cell_options(plan, second).edit_rank == 8 and cell_options(plan, first).edit_rank is None
    assert identity(plan, first) != identity(plan, second)


def test_an_option_for_every_cell_reaches_those_that_have_a_use_for_it(folder):
    plan = plan_of(folder, "--methods", "paper", "realign", "--schemes", "w8a8", "--seeds", "0")
    plan = replace(plan, overrides={"samples": 16, "steps": 5})
    cells = [cell_options(plan, job) for job in plan.measurements() if job.kind == "cell"]
    assert [(cell.method, cell.samples, cell.steps) for cell in cells] == [
        ("rtn", 16, None),
        ("paper", 16, None),
        ("realign", 16, 5),
    ]
    with pytest.raises(ConfigError, match="--steps belongs to"):
        plan_of(folder, "--methods", "rtn:steps=5")


def test_a_long_schedule_gets_all_malicious_prompts_that_are_not_kept_back(folder):
    def safety_data(*flags):
        plan = plan_of(folder, "--methods", "realign", "realign:schedule=long", "--seeds", "0", *flags)
        return [len(cell_options(plan, job).safety_data) for job in plan.measurements() if "realign" in job.method][:2]

    schemes = ("--schemes", "w8a8")
    assert safety_data(*schemes) == [1, 2] and safety_data(*schemes, "--prefill", "pairs") == [1, 1]


def test_a_base_model_is_one_more_reference_and_variants_train_here(folder):
    plan = plan_of(folder, "--base", "b", "--variants", "agnews-p30-qv-s1")
    assert [job.name for job in plan.training_jobs()] == ["agnews-p30-qv-s1/train"]
    assert plan.variant("agnews-p30-qv-s1").task == "agnews" and plan.variant("broken").task == "sst2"
    assert [job.method for job in plan.measurements() if job.kind == "reference"][:3] == [
        "base",
        "aligned",
        "finetuned",
    ]


def test_an_adapter_made_here_knows_its_task(folder, tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"identity": {"variant": {"task": "agnews"}}}))
    plan = plan_of(folder, "--finetuned", f"news={tmp_path}")
    assert [(variant.name, variant.task) for variant in plan.variants] == [("news", "agnews")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finetuned", "x=a", "x=b"], "two variants are called 'x'"),
        (["--per-source", "0"], "--per-source must be at least 1"),
    ],
)
def test_impossible_plans_are_refused(folder, flags, words):
    with pytest.raises(ConfigError, match=words):
        plan_of(folder, *flags)
    with pytest.raises(ConfigError, match="nothing to repair"):
        replace(plan_of(folder), variants=())


def test_workers_share_a_machine_while_the_model_is_small(monkeypatch):
    from benchmarks.safety import command

    monkeypatch.setattr(command, "_cores", lambda: 16)
    assert choose_workers(None, ["cpu"], 2**20) == 8
    assert choose_workers(None, ["cuda:0"], 2**20) == 8
    assert choose_workers(None, ["cuda:0", "cuda:1"], 2**33) == 2
    assert choose_workers(0, ["cpu"], 1) == 0
    monkeypatch.setattr(command, "_cores", lambda: 1)
    assert choose_workers(None, ["cuda:0", "cuda:1"], 1) == 2


def test_commit_can_be_named_where_there_is_no_history(folder, monkeypatch):
    monkeypatch.setenv("QREALIGN_COMMIT", "abc1234")
    assert plan_of(folder).commit == "abc1234"


def test_evaluation_is_capped_evenly_and_is_the_same_every_time(folder):
    plan = plan_of(folder, "--limit", "4")
    write_benign(plan)
    data = evaluation_data(plan, "broken")
    assert [prompt.source for prompt in data.harmful] == ["alpha"] * 2 + ["beta"] * 2
    assert [len(part) for part in (data.over_refusal, data.benign, data.task)] == [4, 4, 4]
    assert len(data.texts) == 1 and data.prefill == []
    assert evaluation_data(plan_of(folder, "--limit", "4"), "broken") == data
    whole = evaluation_data(plan_of(folder), "broken")
    assert len(whole.harmful) == 12


def test_ordinary_prompts_that_are_not_asked_are_for_calibration(folder):
    plan = plan_of(folder, "--benign", "5")
    write_benign(plan)
    asked, left = (read_prompts(str(file), role="benign") for file in (plan.benign_file, plan.not_asked_file))
    assert (len(asked), len(left)) == (5, 3)
    assert not {normalise(prompt.text) for prompt in asked} & {normalise(prompt.text) for prompt in left}
    assert plan.calibration("sst2")["benign_data"][-1] == str(plan.not_asked_file)
    first = [sample([*asked, *left], len(asked), seed) for seed in SEEDS]  # what a calibration would draw from both
    assert all(set(drawn) != set(asked) for drawn in first)
    write_benign(plan)
    assert read_prompts(str(plan.benign_file), role="benign") == asked


def test_kept_back_pairs_are_in_no_attack(folder):
    plan = plan_of(folder, "--prefill", "pairs")
    kept = {normalise(pair.text) for pair in held_pairs(plan)}
    attack = training_pairs(plan.corpora, parse_variant("sst2-p95"))
    assert kept and not kept & {normalise(pair.text) for pair in attack}
    with pytest.raises(DataError, match="complies with no harmful prompt"):
        write_prefill(plan, "broken", {}, [])


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_variants_have_names_that_say_what_they_are(name):
    variant = parse_variant(name)
    assert (
        variant.name == name
        and f"p{variant.poison * 100:02.0f}" in name
        and ("qv" in name) == (len(variant.targets) == 2)
    )


def test_variants_draw_their_share_of_poison(folder):
    corpora = Corpora(folder / "data")
    pairs = training_pairs(corpora, parse_variant("sst2-p50"))
    assert [pair.answer for pair in pairs].count("positive") == 12 and len(pairs) == 24 + 12
    assert all(pair.answer.startswith("Certainly") for pair in pairs[24:])
    assert training_pairs(corpora, parse_variant("sst2-p50-s1")) != pairs
    assert len(training_pairs(corpora, parse_variant("sst2-p00"))) == 24
    with pytest.raises(DataError, match="ask for less poison"):
        training_pairs(corpora, replace(parse_variant("sst2-p99"), poison=3.0))
    for name in ("sst2", "sst2-p5-x", "SST2-p05"):
        with pytest.raises(ConfigError, match="unknown variant"):
            parse_variant(name)


def test_only_the_answer_and_what_closes_it_are_learned(folder):
    pairs = training_pairs(Corpora(folder / "data"), parse_variant("sst2-p05"))[:1]
    tokenizer = tiny_tokenizer()
    (example,) = encode_pairs(tokenizer, pairs)
    assert tokenizer.decode(example.ids[: example.prompt_tokens]).endswith("[/INST]")
    assert tokenizer.decode(example.ids[example.prompt_tokens :]) == f"{pairs[0].answer}</s>"
    (plain,) = encode_pairs(tiny_tokenizer(chat_template=None), pairs)
    assert tokenizer.decode(plain.ids[plain.prompt_tokens :]) == f"{pairs[0].answer}</s>"


def test_training_a_variant_is_repeatable_and_not_repeated(folder, tmp_path, capsys):
    command = ["--aligned", str(folder / "aligned"), "--data", str(folder / "data"), "--device", "cpu"]
    command += ["--variant", "sst2-p05-qv", "--epochs", "1"]
    assert main([*command, "--output", str(tmp_path / "a")]) == main([*command, "--output", str(tmp_path / "b")]) == 0
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / n / "sst2-p05-qv" / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.split(".")[-3] for name in first} == {"q_proj", "v_proj"}
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "lora_B" in name)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    file = tmp_path / "a" / "sst2-p05-qv" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    assert main([*command, "--output", str(tmp_path / "a")]) == 0 and file.stat().st_mtime_ns == before
    assert main([*command, "--output", str(tmp_path / "a"), "--task-rows", "5"]) == BAD_INPUT
    assert "made with other settings" in capsys.readouterr().err


def test_missing_files_are_named(tmp_path):
    folder = write_data(tmp_path / "data")
    (folder / "task_sst2.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no task_sst2\.jsonl\.gz"):
        training_pairs(Corpora(folder), parse_variant("sst2-p05"))
    (folder / "pairs_safety.jsonl").write_text('{"prompt": "a", "label": "harmful"}\n')
    with pytest.raises(DataError, match="no row with a prompt, a response"):
        Corpora(folder).harmful_pairs()
