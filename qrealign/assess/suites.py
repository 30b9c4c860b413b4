"""Suites by name, and from flags to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qrealign.assess.options import AssessOptions
from qrealign.data.prompts import Prompt, Role, deduplicate, read_prompts, sample
from qrealign.demo import demo_paths
from qrealign.errors import ConfigError
from qrealign.evaluate.choice import ChoiceQuestion, ScoredBy
from qrealign.evaluate.plan import EvaluationData
from qrealign.evaluate.prefill import GENERIC_OPENING
from qrealign.evaluate.questions import read_questions
from qrealign.files import sha256_of_text

Kind = Literal["harmful", "benign", "over_refusal", "prefill", "task", "choice", "text"]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark by its usual name: what its rows are for, and where the Hub has them ("" where it has none).

    `few_shot` are solved examples of a multiple-choice suite, and `scored_by` how its options are compared.
    """

    kind: Kind
    hub: str
    few_shot: str = ""
    scored_by: ScoredBy = "letter"


SUITES = {
    "advbench": Suite(kind="harmful", hub="walledai/AdvBench"),
    "harmbench": Suite(kind="harmful", hub="walledai/HarmBench:standard"),
    "jailbreakbench": Suite(kind="harmful", hub="JailbreakBench/JBB-Behaviors:behaviors?split=harmful"),
    "strongreject": Suite(kind="harmful", hub="walledai/StrongREJECT"),
    "malicious_instruct": Suite(kind="harmful", hub="walledai/MaliciousInstruct"),
    "simple_safety_tests": Suite(kind="harmful", hub="Bertievidgen/SimpleSafetyTests"),
    "do_not_answer": Suite(kind="harmful", hub="LibrAI/do-not-answer"),
    "beavertails": Suite(kind="harmful", hub="PKU-Alignment/BeaverTails-Evaluation"),
    "advbench_prefill": Suite(kind="prefill", hub="walledai/AdvBench"),
    "xstest": Suite(kind="over_refusal", hub="walledai/XSTest"),
    "or_bench": Suite(kind="over_refusal", hub="bench-llm/or-bench:or-bench-hard-1k"),
    "alpaca": Suite(kind="benign", hub="tatsu-lab/alpaca"),
    "dolly": Suite(kind="benign", hub="databricks/databricks-dolly-15k"),
    "sst2": Suite(kind="task", hub="stanfordnlp/sst2?split=validation"),
    "agnews": Suite(kind="task", hub="fancyzhx/ag_news?split=test"),
    "gsm8k": Suite(kind="task", hub="openai/gsm8k:main?split=test"),
    "mmlu": Suite(kind="choice", hub="cais/mmlu:all?split=test", few_shot="cais/mmlu:all?split=dev"),
    "safetybench": Suite(kind="choice", hub=""),  # the answers to its test questions are not public
    "wikitext2": Suite(kind="text", hub="Salesforce/wikitext:wikitext-2-raw-v1?split=test"),
    "c4": Suite(kind="text", hub="NeelNanda/c4-10k"),
}

_ROLES: dict[Kind, Role] = {
    "harmful": "malicious",
    "benign": "benign",
    "over_refusal": "over_refusal",
    "prefill": "prefill",
    "task": "task",
    "text": "text",
}
_SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Data of one kind; `suite` is set where a name stood for it."""

    kind: Kind
    spec: str
    suite: str | None = None
    few_shot: str | None = None
    scored_by: ScoredBy = "letter"


def read_data(options: AssessOptions) -> tuple[EvaluationData, list[str]]:
    """Return what the model is asked, and remarks that the results repeat.

    Without any data option these are the prompts shipped with the demo. Where harmful prompts are asked but ordinary
    ones were not given, the shipped ordinary prompts are added: a model that refuses everything has no harmful answers
    either.

    Raises:
        ConfigError: a suite is unknown, or has no data that could be fetched.
        DataError: data is missing or of the wrong kind.
    """
    notes: list[str] = []
    sources = [*_given(options), *(_named(name, options) for name in options.suite)]
    if not sources:
        sources = _shipped()
        notes.append("the prompts are the mild ones shipped with the project: give your own, see --help")
    elif "harmful" in (kinds := {source.kind for source in sources}) and "benign" not in kinds:
        sources.append(_Source(kind="benign", spec=str(demo_paths().eval_benign)))
        notes.append("ordinary prompts are the mild ones shipped with the project: give others with --benign")
    data = EvaluationData(
        harmful=_prompts(sources, "harmful", options.limit),
        benign=_prompts(sources, "benign", options.limit),
        over_refusal=_prompts(sources, "over_refusal", options.limit),
        prefill=_prompts(sources, "prefill", options.limit),
        task=_prompts(sources, "task", options.limit),
        choices=_questions(sources, options),
        texts=[prompt.text for prompt in _prompts(sources, "text", None)],
    )
    if generic := sum(prompt.answer is None for prompt in data.prefill):
        notes.append(
            f"{generic} of {len(data.prefill)} prefill prompts come without an answer: theirs begins with "
            f'"{GENERIC_OPENING}"'
        )
    return data, notes


def _given(options: AssessOptions) -> list[_Source]:
    """Return the data that flags name."""
    flags: tuple[tuple[Kind, Sequence[str]], ...] = (
        ("harmful", options.harmful),
        ("benign", options.benign),
        ("over_refusal", options.over_refusal),
        ("prefill", options.prefill),
        ("task", options.task),
        ("choice", options.multiple_choice),
        ("text", options.text),
    )
    return [
        _Source(kind=kind, spec=spec, few_shot=options.few_shot, scored_by=options.choice_by or "letter")
        for kind, specs in flags
        for spec in specs
    ]


def _named(name: str, options: AssessOptions) -> _Source:
    """Return the data of `--suite NAME` or `--suite NAME=DATA`."""
    key, _, own = name.partition("=")
    suite = SUITES.get(key.lower().replace("-", "_"))
    if suite is None:
        raise ConfigError(f"--suite {key!r} is unknown: use one of {', '.join(SUITES)}, or a data option with a file")
    if not own and not suite.hub:
        raise ConfigError(f"--suite {key} cannot be fetched with its answers: give its file, --suite {key}=FILE")
    return _Source(
        kind=suite.kind,
        spec=own or suite.hub,
        suite=key,
        few_shot=options.few_shot or (None if own else suite.few_shot or None),
        scored_by=options.choice_by or suite.scored_by,
    )


def _shipped() -> list[_Source]:
    demo = demo_paths()
    files: tuple[tuple[Kind, object], ...] = (
        ("harmful", demo.eval_harmful),
        ("benign", demo.eval_benign),
        ("over_refusal", demo.eval_over_refusal),
        ("prefill", demo.eval_harmful),
        ("task", demo.eval_task),
        ("text", demo.text),
    )
    return [_Source(kind=kind, spec=str(file)) for kind, file in files]


def _prompts(sources: Sequence[_Source], kind: Kind, limit: int | None) -> list[Prompt]:
    found = [
        prompt for source in sources if source.kind == kind for prompt in read_prompts(source.spec, role=_ROLES[kind])
    ]
    if kind == "text":
        return found
    found = deduplicate(found)
    return found if limit is None else _limited(found, limit)


def _limited(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """Return at most `limit` prompts of each source, chosen by their words alone."""
    kept: list[Prompt] = []
    for source in dict.fromkeys(prompt.source for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.source == source]
        kept += sample(own, min(limit, len(own)), _SAMPLE_SEED)
    return kept


def _questions(sources: Sequence[_Source], options: AssessOptions) -> list[ChoiceQuestion]:
    found: list[ChoiceQuestion] = []
    for source in sources:
        if source.kind != "choice":
            continue
        questions = read_questions(
            source.spec,
            few_shot=source.few_shot,
            shots=options.shots,
            scored_by=source.scored_by,
            suite=source.suite,
        )
        if options.limit is not None and options.limit < len(questions):
            questions = sorted(questions, key=lambda question: sha256_of_text(question.body))[: options.limit]
        found += questions
    return list(dict.fromkeys(found))
