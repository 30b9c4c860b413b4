"""The server as a user starts it: a folder in, an address out, a streamed chat, an orderly end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai

from tests.helpers import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_served_until_a_signal(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "mine" / "model")
    environment = {**os.environ, "QREALIGN_API_KEY": "k", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [
        sys.executable,
        "-m",
        "qrealign.serve",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
        "--max-slots",
        "2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("report:"):
            break
    found = re.search(
        r"serving mine \(float32, 2 slots of 256 tokens, cpu\) at (http://127\.0\.0\.1:\d+)/", "".join(said)
    )
    assert found is not None, said
    assert "nothing is known of the model's safety" in said[-1]
    with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="k", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="mine",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
    assert first.choices[0].delta.role == "assistant" and rest[-1].choices[0].finish_reason == "length"
    _, told = process.communicate(timeout=30)
    assert process.returncode == 0 and told.strip() == "shut down", told
