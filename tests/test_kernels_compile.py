"""Without a GPU too: the product kernel compiles for Hopper, with tensor cores and the copy engine, within its limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = 232448  # bytes that a block may have on an H100 or H200

# In a process of its own: the interpreter, which the other tests run in, is chosen when triton is imported.
PROGRAM = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gram_newton_schulz import choose_tiles
from kernels.symmetric import _product_kernel as kernel

mode, n, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
t = choose_tiles(n, batch, 132)
tile = lambda rows, columns: f"tensordesc<fp16[{rows}, {columns}]>"
kinds = dict(left=tile(t.rows, t.depth), right=tile(t.columns, t.depth), out=tile(t.rows, t.rows), p="fp32", x="fp32",
             y="fp32", e="fp32", **dict.fromkeys(("sums", "weights", "norms", "bounds", "scales"), "*fp32"))
constants = dict(MODE=mode, ADDENDS={"gram": 0, "plain": 1, "scaled": 2}[mode], ROWS=t.rows, COLUMNS=t.columns,
                 DEPTH=t.depth, GROUP=t.group, FLATTEN=t.flatten)
signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
           if name in ("N", "K") or signature[name][0] == "*"}
options = dict(num_warps=t.warps, num_stages=t.stages) | ({"maxnreg": t.registers} if t.registers else {})
compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                          options=options)
ptx = compiled.asm["ptx"]
print(json.dumps(dict(shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"),
                      copies=ptx.count("cp.async.bulk.tensor"))))
"""


@pytest.mark.parametrize("mode", ["gram", "plain", "scaled"])
@pytest.mark.parametrize("n, batch", [(768, 1), (768, 44), (4096, 1), (8192, 1)])
def test_product_kernel_compiles_for_hopper(mode, n, batch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode, str(n), str(batch)], cwd=ROOT, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wgmma"] > 0 and found["copies"] > 0
    assert found["shared"] <= SHARED_MEMORY
