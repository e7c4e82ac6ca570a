"""kernels/add_rows.py against float64. Without a GPU the kernel runs in Triton's interpreter.

At the end: it compiles for Hopper, adds four numbers an instruction, and has no use for shared memory.
"""

import pytest
import torch
from hopper import printed_by

from kernels import add_rows as module
from kernels import bench_add_rows
from kernels.add_rows import DTYPES, Cut, add_rows, add_rows_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (n, N, width): no row, one, rows that repeat, blocks of rows and columns that are not full, odd widths.
SHAPES = [(0, 4, 20), (1, 3, 1), (37, 5, 20), (70, 9, 768), (9, 300, 6), (24, 4, 161), (5, 3, 0)]


def tensors(n, count, width, dtype):
    """table, rows (never the last one, some of them often) and x."""
    generator = torch.Generator().manual_seed(n + width)
    rows = (torch.rand(n, generator=generator) ** 2 * (count - 1)).long()
    table, x = (torch.randn(length, width, generator=generator) for length in (count, n))
    return table.to(DEVICE), rows.to(DEVICE), x.to(DEVICE, dtype)


def added(function, table, rows, x, dtype=torch.float32):
    table = table.to(dtype, copy=True)
    assert function(table, rows, x) is None
    return table


@pytest.mark.parametrize("cut", [Cut(), Cut(8, 256, 4), Cut(1, 1024, evict="")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, dtype, cut, monkeypatch):
    monkeypatch.setattr(module, "CUT", cut)
    table, rows, x = tensors(*shape, dtype)
    found, truth = added(add_rows, table, rows, x), added(add_rows_eager, table, rows, x, dtype=torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)
    whole = (4 * table).round(), rows, (4 * x).round()  # nothing is rounded: the order of sums does not matter
    assert torch.equal(added(add_rows, *whole), added(add_rows_eager, *whole))


def test_other_rows_keep_their_bits():
    """Wherever in memory tensors begin."""
    given = tensors(20, 12, 20, torch.bfloat16)
    table, rows, x = (torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in given)
    others = torch.ones(12, dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
    table[others] = torch.tensor([-0.0, float("nan"), 1e-40, float("inf")], device=DEVICE).repeat(5)
    before, x_before, truth = table.clone(), x.clone(), added(add_rows_eager, table, rows, x)
    add_rows(table, rows, x)
    assert others[-1] and torch.equal(table[others].view(torch.int32), before[others].view(torch.int32))
    torch.testing.assert_close(table[~others], truth[~others], rtol=0, atol=1e-5)
    assert torch.equal(x, x_before)


def test_a_table_of_more_than_two_to_the_31_numbers(tmp_path):
    """9 GB of a GPU's memory; on a CPU a file with holes, of which only pages that are met exist."""
    width, count = 1024, 2**21 + 2
    if DEVICE == "cuda":
        table = torch.zeros(count, width, device=DEVICE)
    else:
        table = torch.from_file(str(tmp_path / "table"), shared=True, size=count * width).view(count, width)
    rows = torch.tensor([count - 1, 1, count - 1, 2**20 + 1], device=DEVICE)
    add_rows(table, rows, torch.arange(1.0, 5, device=DEVICE)[:, None].repeat(1, width))
    met = table[[0, 1, 2, 2**20, 2**20 + 1, 2**21, count - 1]]
    assert torch.equal(met, torch.tensor([0.0, 2, 0, 0, 4, 0, 4], device=DEVICE)[:, None].expand_as(met))


@pytest.mark.parametrize("name, change, said", [
    ("table", lambda t: t.double(), r"table \(N, width\) of torch.float32; got .*torch.float64"),
    ("table", lambda t: t.T, r"table .*got shape \(20, 5\), strides \(1, 20\)"), ("table", lambda t: t[0], r"\(20,\)"),
    ("rows", lambda r: r.int(), "rows .* of torch.int64; got .*torch.int32"), ("rows", lambda r: r[None], r"\(1, 8\)"),
    ("rows", lambda r: r[::2], r"rows .*got shape \(4,\), strides \(2,\)"),
    ("rows", lambda r: r[1:], r"x \(7, 20\) of .*got shape \(8, 20\)"), ("x", lambda x: x[:, 1:], r"\(8, 19\)"),
    ("x", lambda x: x.half(), "bfloat16 or torch.float32; got .*torch.float16"),
    ("x", lambda x: x[:1].expand(8, 20), r"contiguous x .*strides \(0, 1\)")], ids=lambda value: None)
def test_what_does_not_fit_is_said(name, change, said):
    arguments = dict(zip(("table", "rows", "x"), tensors(8, 5, 20, torch.float32)))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=said):
        add_rows(**arguments)


def test_what_the_bench_draws_and_counts():
    rows = bench_add_rows.drawn(65536, 50304, "cpu")
    assert 0.04 < rows.bincount().max() / 65536 < 0.06 and 0 <= rows.min() and rows.max() < 50304
    assert bench_add_rows.moved(torch.tensor([3, 1, 3]), torch.zeros(3, 8, dtype=torch.bfloat16)) == 24 + 48 + 2 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count, width", [(50304, 768), (251520, 512)])
def test_real_sizes(count, width, dtype):
    table, rows, x = torch.randn(count, width, device=DEVICE), *bench_add_rows.given(65536, count, width, dtype)
    truth = added(add_rows_eager, table, rows, x, dtype=torch.float64)
    assert (added(add_rows, table, rows, x) - truth).abs().max() < 1e-5 * truth.abs().max()


PROGRAM = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.add_rows import _add_rows_kernel as kernel, _grid

def build(dtype, width):
    constants = _grid(65536, width)[1]
    options = dict(num_warps=constants.pop("num_warps"))
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | dict(table="*fp32", rows="*i64", x=dtype, n="i32")
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in range(3)})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    sass = compiled.asm["sass"]
    adds = re.findall(r"(?:ATOM|RED)\\w*[.]\\S+", sass)
    return dict(shared=compiled.metadata.shared, spilled="STL" in sass, adds=adds,
                loads=re.findall(r"ld[.]global\\S*[.](v\\d)[.]b32", compiled.asm["ptx"]))

print(json.dumps([[build(dtype, width) for width in (768, 512)] for dtype in ("*bf16", "*fp32")]))
"""


def test_the_kernel_compiles_for_hopper_with_wide_adds_and_without_spilling():
    for load, built in zip(("v2", "v4"), printed_by(PROGRAM)):  # four numbers of x, as of the table
        assert not any(found["spilled"] or found["shared"] for found in built)
        for found in built:
            assert {add.split(".FTZ")[0] for add in found["adds"]} == {"REDG.E.ADD.F32x4"}
            assert set(found["loads"]) == {load}
