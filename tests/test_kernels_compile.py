"""Without a GPU too: the product kernel compiles for Hopper, uses tensor cores and copy engine, keeps its limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.tiles import CANDIDATES

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = 232448  # bytes that a block may have on an H100 or H200

# In a process of its own: the interpreter, which the other tests run in, is chosen when triton is imported.
PROGRAM = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.symmetric import _product_kernel as kernel
from kernels.tiles import CANDIDATES

def build(mode, addends, t):
    side = t.rows // 2 if t.rows == t.columns else t.rows
    tile = lambda rows, columns: f"tensordesc<fp16[{rows}, {columns}]>"
    kinds = dict(left=tile(t.rows, t.depth), right=tile(t.columns, t.depth), out=tile(t.rows, t.rows),
                 small=tile(side, t.depth), small_out=tile(side, side),
                 **dict.fromkeys(("p", "x", "y", "e"), "fp32"),
                 **dict.fromkeys(("sums", "weights", "norms", "bounds", "scales"), "*fp32"))
    constants = dict(MODE=mode, ADDENDS=addends, ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, GROUP=t.group,
                     PERSISTENT=t.persistent, CHAINED=t.chained,
                     CUT=mode != "gram" and not t.persistent)
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if name in ("N", "K") or signature[name][0] == "*"}
    options = dict(num_warps=t.warps, num_stages=t.stages) | ({"maxnreg": t.registers} if t.registers else {})
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                              options=options)
    ptx = compiled.asm["ptx"]
    return dict(shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"),
                copies=ptx.count("cp.async.bulk.tensor"))

print(json.dumps([[build(mode, addends, t) for mode, addends in (("gram", 0), ("scaled", 2))] for t in CANDIDATES]))
"""


@pytest.fixture(scope="module")
def compiled():
    """For every candidate what came of the two modes that hold most in registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("candidate", range(len(CANDIDATES)))
def test_product_kernel_compiles_for_hopper(compiled, candidate):
    for found in compiled[candidate]:
        assert found["wgmma"] > 0 and found["copies"] > 0
        assert found["shared"] * 1 <= SHARED_MEMORY
