"""Which prompts go where: calibration, probe and evaluation, read, sampled from the seed and kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qrealign.calibrate.methods import FEWEST_SAMPLES, CalibrationSettings
from qrealign.data.prompts import (
    Prompt,
    Role,
    deduplicate,
    find_overlap,
    normalise,
    read_prompts,
    sample,
    split_by_hash,
)
from qrealign.demo import demo_paths
from qrealign.errors import DataError
from qrealign.evaluate.suite import EvaluationData
from qrealign.files import sha256_of_text
from qrealign.pipeline.options import RunOptions

PROBE_PROMPTS = 400  # at most, of each class
HELD_OUT_SHARE = 0.25  # of data given for calibration, where none was given for evaluation
# Most prompts a quick evaluation asks: a few minutes on two cores for a small model.
QUICK_HARMFUL, QUICK_PER_SOURCE, QUICK_BENIGN, QUICK_OVER_REFUSAL, QUICK_TASK = 240, 60, 100, 100, 300


@dataclass(kw_only=True)
class CalibrationPrompts:
    """The prompts that calibration sees; `benign`, `task` and `borderline` are answered as by the fine-tuned model.

    `text` is running text, of which the method takes windows.
    """

    malicious: list[Prompt]
    benign: list[Prompt]
    task: list[Prompt] = field(default_factory=list)
    borderline: list[Prompt] = field(default_factory=list)
    text: list[Prompt] = field(default_factory=list)

    def harmless(self) -> list[Prompt]:
        """Return every prompt that is not malicious; running text is no prompt."""
        return [*self.benign, *self.task, *self.borderline]

    def counts(self) -> dict[str, int]:
        return {name: len(prompts) for name, prompts in vars(self).items()}


@dataclass(kw_only=True)
class PreparedData:
    """All prompts of a run, disjoint where they must be, and remarks that the report repeats.

    `samples` is how many malicious and ordinary prompts calibration got together.
    """

    samples: int
    calibration: CalibrationPrompts
    probe_malicious: list[Prompt]
    probe_benign: list[Prompt]
    evaluation: EvaluationData
    notes: list[str]

    def fingerprint(self) -> str:
        """Return a SHA-256 over every prompt in its place."""
        lists = [
            *vars(self.calibration).values(),
            self.probe_malicious,
            self.probe_benign,
            *vars(self.evaluation).values(),
        ]
        return _fingerprint(lists)

    def evaluation_fingerprint(self) -> str:
        """Return a SHA-256 over the evaluation's prompts and texts: runs that share it can be compared."""
        return _fingerprint(list(vars(self.evaluation).values()))

    def counts(self) -> dict[str, int]:
        """Return how many prompts of each kind the run uses."""
        evaluation = {f"evaluation {name}": len(items) for name, items in vars(self.evaluation).items()}
        probe = {"probe malicious": len(self.probe_malicious), "probe benign": len(self.probe_benign)}
        return {f"calibration {name}": count for name, count in self.calibration.counts().items()} | probe | evaluation


def _fingerprint(lists: Sequence[Sequence[Prompt | str]]) -> str:
    """Return a SHA-256 over every prompt in its place."""
    return sha256_of_text(
        *(
            f"{item.text}\t{item.answer}" if isinstance(item, Prompt) else str(item)
            for part in lists
            for item in (*part, "--")
        )
    )


def prepare_data(options: RunOptions, settings: CalibrationSettings) -> PreparedData:
    """Read and select every prompt of a run.

    Raises:
        DataError: a file is unusable, there are too few prompts, or evaluation prompts stand in the calibration data.
    """
    shipped, notes = demo_paths(), list[str]()
    seed = options.seed
    evaluates = options.eval != "none"
    hold_harmful, hold_benign = evaluates and not options.eval_harmful, evaluates and not options.eval_benign
    safety, held_safety = _pool(options.safety_data, str(shipped.safety), "malicious", hold_harmful, seed)
    benign, held_benign = _pool(options.benign_data, str(shipped.benign), "benign", hold_benign, seed)
    borderline = _read(options.borderline_data or (str(shipped.borderline),), "benign")
    task, test = _task_pools(options, str(shipped.task), str(shipped.eval_task))
    samples = settings.samples if options.samples else _fitting_samples(settings, len(safety), len(benign))
    settings = settings.fitted(samples)
    counts = settings.counts()
    calibration = CalibrationPrompts(
        malicious=_draw(safety, counts["malicious"], seed, "--safety-data", settings),
        benign=_draw(benign, counts["benign"], seed, "--benign-data", settings),
        task=sample(task, min(len(task), counts["task"]), seed),
        borderline=sample(borderline, min(len(borderline), counts["borderline"]), seed),
    )
    if settings.text_share:
        calibration.text = _read(options.text_data, "text")
    probe_malicious, probe_benign = (sample(pool, min(len(pool), PROBE_PROMPTS), seed) for pool in (safety, benign))
    evaluation = _evaluation_data(options, held_safety, held_benign, test, notes)
    _refuse_shared_text(calibration.text, evaluation.texts)
    training = [*calibration.malicious, *calibration.harmless(), *probe_malicious, *probe_benign]
    evaluation = _keep_apart(training, evaluation, options)
    return PreparedData(
        samples=settings.samples,
        calibration=calibration,
        probe_malicious=probe_malicious,
        probe_benign=probe_benign,
        evaluation=evaluation,
        notes=notes,
    )


def _read(specs: Sequence[str], role: Role) -> list[Prompt]:
    prompts = [prompt for spec in specs for prompt in read_prompts(spec, role=role)]
    return prompts if role == "text" else deduplicate(prompts)


def _pool(
    specs: tuple[str, ...], shipped: str, role: Role, holds_out: bool, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Return what calibration may use, and what is held out of the user's own data for the evaluation."""
    pool = _read(specs or (shipped,), role)
    if not specs or not holds_out:
        return pool, []
    held, kept = split_by_hash(pool, HELD_OUT_SHARE, seed)
    return kept, held


def _task_pools(options: RunOptions, shipped: str, shipped_test: str) -> tuple[list[Prompt], list[Prompt]]:
    """Return task prompts for calibration and for the evaluation: by their split where rows name one, else by hash."""
    if not options.task_data:
        return (_read((shipped,), "task"), _read((shipped_test,), "task")) if options.is_demo else ([], [])
    prompts = _read(options.task_data, "task")
    if options.eval_task:
        return prompts, []
    test = [prompt for prompt in prompts if prompt.split in ("test", "validation", "valid", "dev")]
    final = [prompt for prompt in test if prompt.split == "test"] or test
    if final:
        return [prompt for prompt in prompts if prompt.split in (None, "train")], final
    if options.eval == "none":
        return prompts, []
    half, other = split_by_hash(prompts, 0.5, options.seed)
    return half, other


def _fitting_samples(settings: CalibrationSettings, malicious: int, benign: int) -> int:
    """Return the method's number of samples, or what the data has of it, but no fewer than `FEWEST_SAMPLES`."""
    share = settings.malicious_share
    most = min((int(count / part) for count, part in ((malicious, share), (benign, 1 - share)) if part), default=0)
    return max(min(settings.samples, most), min(settings.samples, FEWEST_SAMPLES))


def _draw(pool: list[Prompt], count: int, seed: int, flag: str, settings: CalibrationSettings) -> list[Prompt]:
    if len(pool) < count:
        raise DataError(
            f"{flag} has {len(pool)} usable prompts for calibration, but --samples {settings.samples} with "
            f"--malicious-share {settings.malicious_share:g} needs {count}: give more prompts or lower --samples"
        )
    return sample(pool, count, seed)


def _evaluation_data(
    options: RunOptions, held_harmful: list[Prompt], held_benign: list[Prompt], test: list[Prompt], notes: list[str]
) -> EvaluationData:
    """Return what is asked; without an evaluation what was named for one, which the training must not hold either."""
    data = EvaluationData(
        harmful=_read(options.eval_harmful, "malicious"),
        benign=_read(options.eval_benign, "benign"),
        over_refusal=_read(options.eval_over_refusal, "over_refusal"),
        task=_read(options.eval_task, "task"),
        texts=[prompt.text for prompt in _read(options.eval_text, "text")],
    )
    if options.eval == "none":
        return data
    shipped = demo_paths()
    data.harmful = data.harmful or _stand_in(held_harmful, str(shipped.eval_harmful), "malicious", "harmful", notes)
    data.benign = data.benign or _stand_in(held_benign, str(shipped.eval_benign), "benign", "ordinary", notes)
    data.over_refusal = data.over_refusal or _stand_in(
        [], str(shipped.eval_over_refusal), "over_refusal", "borderline", notes
    )
    data.task = data.task or test
    data.texts = data.texts or [prompt.text for prompt in _read((str(shipped.text),), "text")]
    return _quick(data, options.seed) if options.eval == "quick" else data


def _stand_in(held_out: list[Prompt], shipped: str, role: Role, word: str, notes: list[str]) -> list[Prompt]:
    """Return evaluation prompts where none were given: those held out of the calibration data, else the shipped."""
    if held_out:
        notes.append(f"{word} evaluation prompts were held out of the calibration data, so they are of the same kind")
        return held_out
    notes.append(f"{word} evaluation prompts are the mild ones shipped with the project")
    return _read((shipped,), role)


def _quick(data: EvaluationData, seed: int) -> EvaluationData:
    """Return a sample small enough for minutes, evenly over the sources of the harmful prompts."""
    sources = sorted({prompt.source for prompt in data.harmful})
    share = max(1, min(QUICK_PER_SOURCE, QUICK_HARMFUL // len(sources))) if len(sources) > 1 else QUICK_HARMFUL
    harmful = []
    for source in sources:
        prompts = [prompt for prompt in data.harmful if prompt.source == source]
        harmful += sample(prompts, min(len(prompts), share), seed)

    def some(prompts: list[Prompt], most: int) -> list[Prompt]:
        return sample(prompts, min(len(prompts), most), seed)

    return replace(
        data,
        harmful=harmful,
        benign=some(data.benign, QUICK_BENIGN),
        over_refusal=some(data.over_refusal, QUICK_OVER_REFUSAL),
        task=some(data.task, QUICK_TASK),
    )


def _refuse_shared_text(calibration: list[Prompt], evaluation: list[str]) -> None:
    """Refuse running text that is calibrated on and measured as well: its perplexity would prove nothing."""
    shared = {normalise(prompt.text) for prompt in calibration} & {normalise(text) for text in evaluation}
    if shared:
        raise DataError(
            f"{len(shared)} texts of --text-data are among those of --eval-text (such as {min(shared)[:60]!r}): a "
            "perplexity on them would prove nothing, so give other text to one of them"
        )


def _keep_apart(training: list[Prompt], evaluation: EvaluationData, options: RunOptions) -> EvaluationData:
    """Refuse evaluation files that share prompts with the training data.

    Such prompts are dropped where we held them out ourselves.
    """
    kept = {}
    for name, given in (
        ("harmful", options.eval_harmful),
        ("benign", options.eval_benign),
        ("over_refusal", options.eval_over_refusal),
        ("task", options.eval_task),
    ):
        prompts = getattr(evaluation, name)
        overlaps = find_overlap(training, prompts)
        if overlaps and given:
            flag = f"--eval-{name.replace('_', '-')}"
            raise DataError(
                f"{len(overlaps)} calibration or probe prompts give away prompts of {flag} (such as "
                f"{overlaps[0].evaluation[:60]!r}): a score on them would prove nothing, so give data without them"
            )
        shared = {normalise(overlap.evaluation) for overlap in overlaps}
        kept[name] = [prompt for prompt in prompts if normalise(prompt.text) not in shared]
    if not kept["harmful"] and options.eval != "none":
        raise DataError(
            "no harmful prompt is left for the evaluation: give some with --eval-harmful, or use --eval none"
        )
    return replace(evaluation, **kept)
