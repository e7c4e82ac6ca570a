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


def built(kernel, signature: dict, constants: dict, aligned: dict | None = None, **options) -> dict:
    """For such a program: what `kernel`, compiled for Hopper, needs of shared memory, and how often its PTX multiplies
    with wgmma, with the older mma, and has the copy engine move tiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                              options=options)
    ptx = compiled.asm["ptx"]
    return dict(shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"), other=ptx.count("mma.sync"),
                copies=ptx.count("cp.async.bulk.tensor"))


def assert_products_are_hopper_s(found: dict) -> None:
    """`built` found wgmma alone, tiles that the copy engine moves, and no more shared memory than there is."""
    assert found["shared"] <= 232448 and found["wgmma"] > 0 and found["other"] == 0 and found["copies"] > 0
