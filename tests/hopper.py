"""Compiling kernels for an H100 or H200 where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def printed_by(program: str):
    """The JSON in the last line that `program` prints, run by a Python of its own: whether kernels are compiled or
    interpreted, as the tests around want them, is chosen when triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
