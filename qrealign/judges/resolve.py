"""From what a user names to a judge."""

from __future__ import annotations

import os
from pathlib import Path

from qrealign.judges.interface import Judge, RefusalRule

CLASSIFIER_FILE = "judge.json"


def open_judge(spec: str, *, device: str = "auto", batch_size: int = 16, progress: bool = False) -> Judge:
    """Return the judge called `spec`.

    Args:
        spec: `refusal-rule`; the URL of an OpenAI-compatible endpoint with its model, `http://host:8000/v1#name`; a
            folder that `python -m qrealign.judges.train` wrote; or a model judge by Hub id or folder, with its form
            after a `#` where its name does not tell it (`forms.py`).
        device: where a model judge runs, as in `--device`.
        batch_size: most answers that a model judge reads at once; halved when memory runs out.
        progress: whether a model judge shows a bar on standard error.

    Raises:
        JudgeError: the judge is incomplete, damaged or of unknown form.
        ModelError: a model judge cannot be used; subclasses say why.
        AbsentDeviceError: the device is absent.
    """
    if spec == RefusalRule.name:
        return RefusalRule()
    if spec.startswith(("http://", "https://")):
        from qrealign.judges.endpoint import open_endpoint

        return open_endpoint(spec)
    folder = Path(spec).expanduser()
    if os.path.isfile(folder / CLASSIFIER_FILE):  # Path.is_file() raises where a name is too long
        from qrealign.judges.classifier import load_classifier

        return load_classifier(folder)
    from qrealign.judges.model import open_model_judge

    return open_model_judge(spec, device=device, batch_size=batch_size, progress=progress)
