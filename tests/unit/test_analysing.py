"""The analysis stage: which prompts, which blocks, one record per block and model, and nothing asked twice."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qrealign.data.generate import generate_answers
from qrealign.data.prompts import Prompt
from qrealign.judges.degeneracy import is_degenerate
from qrealign.pipeline import analysing
from qrealign.pipeline.analysing import EXIT_TOKENS, exit_cost, run_analysis
from qrealign.pipeline.context import build_context
from qrealign.pipeline.evaluating import load
from qrealign.pipeline.options import RunOptions
from qrealign.pipeline.preflight import preflight
from qrealign.pipeline.reporting import analysis_from_json, analysis_to_json
from tests.helpers import tiny_checkpoint


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A run of plain rounding on a tiny model, with its folder open."""
    folder = tmp_path_factory.mktemp("run")
    files = {}
    for name, verb in (("harmful", "break"), ("benign", "paint")):
        files[name] = folder / f"{name}.jsonl"
        rows = [{"prompt": f"{verb} the thing of number {index}", "source": "xyz"[index // 10]} for index in range(30)]
        files[name].write_text("\n".join(map(json.dumps, rows)))
    model = str(tiny_checkpoint(folder / "model", num_hidden_layers=3))
    context = build_context(
        RunOptions(
            model=model,
            aligned=model,
            method="rtn",
            output=str(folder / "out"),
            eval_harmful=(str(files["harmful"]),),
            eval_benign=(str(files["benign"]),),
            max_new_tokens=3,
            device="cpu",
            quiet=True,
        ),
        lambda _line: None,
    )
    context.workspace.open(context.identity(), fresh=False, must_exist=False)
    return context


def test_every_block_gets_every_models_separability(context):
    blocks, projections = run_analysis(context, None)
    models = {"aligned", "finetuned", "quantized", "realigned"}
    assert [block.index for block in blocks] == [0, 1, 2] and projections
    for block in blocks:
        assert set(block.fisher_ratio) == set(block.distance_ratio) == set(block.semantic_separability) == models
        for name, rates in block.semantic_separability.items():
            assert (rates["n_malicious"], rates["n_benign"]) == (12, 12)
            assert all(0 <= rates[share] <= 1 for share in ("refused_malicious", "refused_benign", "degenerate")), name
        assert block.semantic_separability["realigned"] == block.semantic_separability["quantized"]
        assert block.fisher_ratio["realigned"] == block.fisher_ratio["quantized"]
    assert analysis_from_json(json.loads(json.dumps(analysis_to_json(blocks, projections)))) == (blocks, projections)
    # The last block's answers are the whole model's.
    evaluation = context.data.evaluation
    asked = [*analysing._spread(evaluation.harmful, 12), *analysing._spread(evaluation.benign, 12)]
    answers = generate_answers(load(context, "finetuned"), context.encoder, asked, max_new_tokens=3, batch_size=64)
    broken = sum(map(is_degenerate, answers)) / len(answers)
    assert blocks[-1].semantic_separability["finetuned"]["degenerate"] == pytest.approx(broken)


def test_early_answers_on_disk_are_not_asked_again(context, monkeypatch):
    blocks, _ = run_analysis(context, None)
    monkeypatch.setattr(analysing, "semantic_separability", lambda *_args, **_options: pytest.fail("asked again"))
    again, _ = run_analysis(context, None)
    assert again == blocks


def test_streamed_models_are_analysed_alike(context, monkeypatch):
    resident, _ = run_analysis(context, None)
    monkeypatch.setattr("qrealign.pipeline.models.RESIDENT_SHARE", 0.0)
    context.pool.release()
    for file in context.workspace.state.glob("exits-*.json"):
        file.unlink()
    streamed, _ = run_analysis(context, None)
    for one, other in zip(resident, streamed, strict=True):
        assert one.semantic_separability == other.semantic_separability
        assert one.fisher_ratio == pytest.approx(other.fisher_ratio, rel=1e-3)


def test_an_unknown_architecture_that_counts_its_blocks_goes_without(context, monkeypatch, caplog):
    def counting(*_args, **_options):
        raise IndexError("index 2 is out of range")

    monkeypatch.setattr(analysing, "semantic_separability", counting)
    with pytest.raises(IndexError):
        analysing._early_answers(context, "aligned", None)
    monkeypatch.setattr(context, "finetuned", SimpleNamespace(spec=SimpleNamespace(known=False), num_blocks=3))
    assert analysing._early_answers(context, "aligned", None) == {}
    assert "cannot stop at an early block" in caplog.text


def test_the_cost_is_said_before(context):
    assert exit_cost(context) == ([0, 1, 2], 24, 3)
    line = next(line for line in preflight(context) if line.startswith("analysis"))
    assert line.endswith("early answers of each model from 3 of 3 blocks: 24 prompts, 3 tokens")


@pytest.mark.parametrize(("size", "asked", "prompts"), [("quick", None, 17), ("full", 200, 105), ("full", 4, 105)])
def test_the_cost_is_bounded(size, asked, prompts):
    data = SimpleNamespace(evaluation=SimpleNamespace(harmful=[None] * 500, benign=[None] * 5))
    options = SimpleNamespace(eval=size, max_new_tokens=asked)
    found = exit_cost(SimpleNamespace(options=options, data=data, finetuned=SimpleNamespace(num_blocks=80)))
    assert len(found[0]) == (6 if size == "quick" else 12) and found[0][-1] == 79
    assert found[1:] == (prompts, min(EXIT_TOKENS, asked or EXIT_TOKENS))


def test_prompts_are_taken_from_every_source():
    prompts = [Prompt(text=f"{source}{index}", source=source) for source in "abc" for index in range(10)]
    assert analysing._spread(prompts, 6) == ["a0", "a5", "b0", "b5", "c0", "c5"]
    assert len(analysing._spread(prompts, 100)) == 30


def test_too_few_prompts_leave_the_analysis_out(context, monkeypatch):
    monkeypatch.setattr(context.data.evaluation, "benign", context.data.evaluation.benign[:1])
    assert run_analysis(context, None) == ([], [])
