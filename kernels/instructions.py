"""Instructions of a GPU, and what Triton's interpreter does in their place, which knows no assembly and no bfloat16.

exp2 and inverse: by tl.exp2 and a division they would be several instructions each, for numbers that are not needed.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, sums=None):
    """sums + a @ b in float32, without TF32."""
    if INTERPRETED:  # it holds bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def exp2(x):
    """2ˣ to 22 bits, of float32; what is below 2⁻¹²⁶ is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def inverse(x):
    """1 / x to 23 bits, of float32."""
    if INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
