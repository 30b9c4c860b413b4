"""`python -m qrealign.judges.train`: make an offline harm classifier from labelled answers, and measure its error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from qrealign.data.prompts import split_by_hash
from qrealign.errors import ConfigError, DataError
from qrealign.judges.agreement import Agreement, compare
from qrealign.judges.classifier import PARTS, OfflineJudge, part_texts
from qrealign.judges.labelled import LabelledAnswer, read_labelled
from qrealign.judges.resolve import CLASSIFIER_FILE
from qrealign.records import Score
from qrealign.status import exit_status

HELD_OUT_SHARE = 0.2
MOST_TERMS = {"answer_words": 60_000, "answer_characters": 100_000, "prompt_words": 30_000}
MOST_FOLDS = 5  # of whole sources left out in turn
REGULARISATION = 1.0  # scikit-learn's C; 10 fits the held-out prompts better and other sources worse
_FEWEST = 10  # labelled answers of each class


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and store a judge; return 0, or another exit status after one sentence on standard error."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _run(options), interrupted="no judge was stored")


def _run(options: argparse.Namespace) -> int:
    _check_output(options.output)
    rows = list(chain.from_iterable(map(read_labelled, options.data)))
    judge, measured = train_judge(rows, seed=options.seed, name=f"offline {options.output.name}")
    judge.save(options.output, {"data": options.data, "rows": len(rows), "seed": options.seed, **measured})
    print(f"{options.output}: {judge.note}")
    return 0


def train_judge(
    rows: Sequence[LabelledAnswer], *, seed: int = 0, name: str = "offline"
) -> tuple[OfflineJudge, dict[str, Any]]:
    """Train on the answers to four fifths of the prompts, measure on the rest; the judge returned is the one measured.

    A second figure says more about answers of another kind: the error on sources that were left out of the training,
    several at a time until each had its turn.

    Args:
        rows: answers labelled harmful, safe or refusal; the latter two count as harmless.
        seed: decides which prompts are held out.
        name: the judge's.

    Returns:
        The judge, its note holding both errors with intervals, and the same figures as plain data.

    Raises:
        DataError: there are too few answers of one class.
    """
    held_prompts = set(split_by_hash(sorted({row.prompt for row in rows}), HELD_OUT_SHARE, seed)[0])
    fitted = [row for row in rows if row.prompt not in held_prompts]
    held_out = [row for row in rows if row.prompt in held_prompts]
    _check_classes(fitted, "to train on")
    _check_classes(held_out, "to measure the error on")
    judge = _fit(fitted, name)
    table = compare("harmful", name, held_out, _judge(judge, held_out))[-1]
    transfer = _measure_transfer(rows)
    judge.note = _note(table, transfer)
    measured = {"held_out": asdict(table), "other_sources": None if transfer is None else asdict(transfer)}
    return judge, measured


def _fit(rows: Sequence[LabelledAnswer], name: str) -> OfflineJudge:
    """Return a judge of these rows; the rarer class weighs more, so that neither verdict is the easy one."""
    prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    vectorizers: dict[str, TfidfVectorizer] = {}
    features: list[csr_matrix] = []
    for part, spec in PARTS.items():
        vectorizers[part] = TfidfVectorizer(**spec.settings, max_features=MOST_TERMS[part], min_df=2)
        try:
            features.append(vectorizers[part].fit_transform(part_texts(part, prompts, answers)))
        except ValueError as error:  # no terms are left
            raise DataError(
                f"the {spec.reads}s hold no {part.partition('_')[2]} that two of them share: give labelled answers "
                "that are whole texts"
            ) from error
    regression = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=1000)
    regression.fit(hstack(features).tocsr(), [row.label == "harmful" for row in rows])
    ends = np.cumsum([matrix.shape[1] for matrix in features])[:-1]
    weights = dict(zip(PARTS, np.split(regression.coef_[0], ends), strict=True))
    return OfflineJudge(
        name,
        "",
        {part: vectorizer.get_feature_names_out().tolist() for part, vectorizer in vectorizers.items()},
        {part: vectorizer.idf_ for part, vectorizer in vectorizers.items()},
        weights,
        float(regression.intercept_[0]),
    )


def _measure_transfer(rows: Sequence[LabelledAnswer]) -> Agreement | None:
    """Return the agreement on sources that were not trained on, None where there is one source alone."""
    families = [row.family for row in rows]
    if len(set(families)) < 2:
        return None
    verdicts = [False] * len(rows)
    for train, test in GroupKFold(min(MOST_FOLDS, len(set(families)))).split(rows, groups=families):
        fold = [rows[index] for index in train]
        if len({row.label == "harmful" for row in fold}) < 2:
            return None  # all harmful answers come from one source
        found = _judge(_fit(fold, "fold"), [rows[index] for index in test])
        for index, verdict in zip(test, found, strict=True):
            verdicts[index] = verdict
    return compare("harmful", "other sources", rows, verdicts)[-1]


def _judge(judge: OfflineJudge, rows: Sequence[LabelledAnswer]) -> list[bool]:
    return judge.harmful([row.prompt for row in rows], [row.answer for row in rows])


def _check_classes(rows: Sequence[LabelledAnswer], purpose: str) -> None:
    harmful = sum(row.label == "harmful" for row in rows)
    if min(harmful, len(rows) - harmful) < _FEWEST:
        raise DataError(
            f"there are {harmful} harmful and {len(rows) - harmful} other answers {purpose}, and {_FEWEST} of each are "
            "needed: give more labelled answers"
        )


def _note(held_out: Agreement, transfer: Agreement | None) -> str:
    assert held_out.agreement is not None  # both classes are there
    note = f"wrong on {_error(held_out.agreement)} of {held_out.n} held-out answers of its training sources"
    if transfer is not None and transfer.agreement is not None:
        note += f", and on {_error(transfer.agreement)} of {transfer.n} from sources left out of training"
    return note


def _error(agreement: Score) -> str:
    return f"{100 - agreement.value:.1f} % ({100 - agreement.high:.1f}-{100 - agreement.low:.1f})"


def _check_output(folder: Path) -> None:
    """Refuse to replace a folder that is no judge."""
    if (
        folder.exists()
        and not (folder / CLASSIFIER_FILE).is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ConfigError(f"--output {folder} exists and is no judge: name a new folder, because it would be replaced")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qrealign.judges.train",
        description="Train an offline harm classifier on labelled answers, measure it, and store it as a judge.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="DATA",
        help="files or Hub ids of rows with prompt, response, label (harmful, safe, refusal) and source",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the judge, replaced")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides which prompts are held out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
