"""One process of a team that calibrates tiny models: `python -m tests.team_process FOLDER`, as torchrun starts it.

Each process leaves what it has learned in `FOLDER/<engine>.<rank>.safetensors`. Then both start over, under another
name, and the second one ends without a word after it has trained the second block.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from qrealign.calibrate.blockwise import BlockwiseCalibrator
from qrealign.calibrate.distributed import ALONE, Team, joined_team
from qrealign.calibrate.endtoend import EndToEndCalibrator
from qrealign.calibrate.methods import method_settings
from qrealign.errors import DeviceError
from tests.unit import test_blockwise, test_endtoend

BLOCKWISE = method_settings("paper", epochs=1.0, batch_size=3)  # three samples for two processes: an uneven share


def blockwise(folder: Path, team: Team = ALONE, name: str = "streams") -> BlockwiseCalibrator:
    """Return a block-wise calibration of the checkpoints in `folder`, its progress kept there."""
    runner, _ = test_blockwise.calibrator({0: folder / "m0", 1: folder / "m1"}, folder, BLOCKWISE, name=name)
    runner.team = team
    return runner


def endtoend(folder: Path, team: Team = ALONE, name: str = "endtoend") -> EndToEndCalibrator:
    """Return an end-to-end calibration of a tiny model, its shares passing through it undivided."""
    runner = test_endtoend.calibrator(folder, name=name, team=team)
    runner.parts.split = None
    return runner


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined_team() as team:
        by_blocks, whole = blockwise(folder, team), endtoend(folder, team)
        by_blocks.run(progress=None)
        save_file(by_blocks.streams.tensors(), folder / f"blockwise.{team.rank}.safetensors")
        whole.run(progress=None)
        losses = torch.tensor([point.losses["total"] for point in whole.curve], dtype=torch.float64)
        save_file(whole.trainable.state() | {"losses": losses}, folder / f"endtoend.{team.rank}.safetensors")
        broken = blockwise(folder, team, name="broken")
        if not team.leads:
            broken.on_trained = lambda index, _: os._exit(9) if index == 1 else None
        broken.run(progress=None)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except DeviceError as error:
        sys.exit(f"error: {error}")
