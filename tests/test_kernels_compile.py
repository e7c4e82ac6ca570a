"""Without a GPU too: the product kernel compiles for Hopper, uses tensor cores and copy engine, keeps its limits."""

import pytest
from hopper import printed_by

from kernels.tiles import CANDIDATES

SHARED_MEMORY = 232448  # bytes that a block may have on an H100 or H200

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
    return printed_by(PROGRAM)


@pytest.mark.parametrize("candidate", range(len(CANDIDATES)))
def test_product_kernel_compiles_for_hopper(compiled, candidate):
    for found in compiled[candidate]:
        assert found["wgmma"] > 0 and found["copies"] > 0
        assert found["shared"] * 1 <= SHARED_MEMORY
