"""The profile of steps: groups, sums and shares of known times, FLOPs, the report, the picture, and a real step."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from kernels import cross_entropy, fp8
from optim.parts import milliseconds, part, stopwatch
from records import profile
from records.plot import step_bars
from records.profile import (GROUPS, MOST_KERNELS, gpu_kernels, group_of, largest_costs, model_flops, operators,
                             peak_tflops, profile_step, report, summarise, visible_keys)

CPU = torch.device("cpu")


def test_a_stopwatch_sums_the_spans_of_a_part_while_it_runs():
    with part("outside"):
        pass
    with stopwatch() as watch:
        for _ in range(2):
            with part("inside"):
                time.sleep(0.02)
    with part("outside"):
        pass
    times = milliseconds(watch)
    assert list(times) == ["inside"] and (torch.cuda.is_available() or times["inside"] >= 40)


def test_a_part_that_fails_leaves_the_stopwatch_usable():
    with stopwatch() as watch:
        with pytest.raises(KeyError), part("fails"):
            raise KeyError
        with part("works"):
            pass
    assert list(milliseconds(watch)) == ["works"]


# ---------------------------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("name, group", [
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),  # these are of an H200
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)", "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "products"),
    ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<int> >(int)", "products"),
    ("triton_tem_fused_mm_3", "products"), ("aten::addmm", "products"), ("aten::_scaled_mm", "products"),
    ("mkldnn::_linear_pointwise", "products"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t> >(Flash)", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
    ("autograd::engine::evaluate_function: ScaledDotProductFlashAttentionForCpuBackward0", "attention"),
    ("triton_tem_fused_flex_attention_0", "attention"), ("_attention_dkdv_kernel", "attention"),
    ("triton_poi_fused_mul_pow_relu_threshold_backward_1", "others"),
    ("triton_red_fused_mm_flash_attention_2", "others"),
    ("Memcpy HtoD (Pinned -> Device)", "others"), ("aten::mul", "others"), ("aten::sum", "others"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)", "others"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4> >(int)", "optimizer"),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("gloo:all_reduce", "communication"), ("aten::_log_softmax", "loss"), ("aten::nll_loss_forward", "loss"),
])
def test_groups_of_names(name, group):
    assert group_of(name) == group


def test_every_kernel_of_the_loss_is_the_loss_s():
    names = [name for module in (cross_entropy, fp8)
             for name in re.findall(r"^def (_\w+_kernel)\(", Path(module.__file__).read_text(), re.MULTILINE)]
    assert len(names) >= 3 and {group_of(name) for name in names} == {"loss"}


def event(name, start, end, annotation=False, device=DeviceType.CUDA):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=annotation,
                           device_type=device)


def test_what_runs_inside_an_optimizer_is_its_own_and_hidden_communication_costs_nothing():
    events = [event("forward and backward", 0, 5000, True), event("nvjet", 0, 4000),
              event("ncclDevKernel_Early", 3000, 4500),            # 1 ms of it behind a product
              event("muon: apply", 5000, 7000, True), event("nvjet", 5000, 6000), event("_scale_kernel", 6000, 7000),
              event("Optimizer.step#Adam", 7000, 8000, True), event("copy", 7000, 7500),
              event("ncclDevKernel_Late", 7000, 9000), event("inside", 7100, 7400), event("third", 7450, 7600),
              event("add", 8500, 9500),
              event("aten::mm", 0, 9999, device=DeviceType.CPU)]
    assert sorted(gpu_kernels(events, {"muon: apply"})) == [
        ("_scale_kernel", "optimizer", 1.0), ("add", "others", 1.0), ("copy", "optimizer", 0.5),
        ("inside", "optimizer", pytest.approx(0.3)), ("ncclDevKernel_Early", "communication", 0.5),
        ("ncclDevKernel_Late", "communication", pytest.approx(0.9)), ("nvjet", "optimizer", 1.0),
        ("nvjet", "products", 4.0), ("third", "optimizer", 0.15)]


def test_operators_count_without_those_they_call_and_belong_to_the_group_around_them():
    def operator(name, own_ms, parent=None, annotation=False):
        return SimpleNamespace(name=name, self_cpu_time_total=1000 * own_ms, cpu_time_total=9e9, cpu_parent=parent,
                               is_user_annotation=annotation, device_type=DeviceType.CPU)

    update = operator("muon: apply", 50.0, operator("forward and backward", 60.0, annotation=True), annotation=True)
    attention = operator("aten::scaled_dot_product_attention", 1.0)
    events = [update, attention, operator("aten::add", 2.0, operator("aten::_softmax", 3.0, attention)),
              operator("aten::bmm", 4.0), operator("aten::bmm", 5.0, update), operator("gloo:all_reduce", 6.0, update)]
    assert operators(events, {"muon: apply"}) == [
        ("aten::scaled_dot_product_attention", "attention", 1.0), ("aten::add", "attention", 2.0),
        ("aten::bmm", "products", 4.0), ("aten::bmm", "optimizer", 5.0), ("gloo:all_reduce", "communication", 6.0)]


def test_kernels_are_summed_by_group_and_the_rest_of_a_step_is_idle():
    kernels = [("gemm", "products", 2.0), ("add", "others", 1.5), ("gemm", "products", 1.0), ("gemm", "optimizer", 0.5)]
    numbers = summarise(8.0, {"forward": 3.0}, kernels, 1e9)
    assert numbers["groups_ms"] == dict(products=3.0, attention=0, loss=0, others=1.5, optimizer=0.5, communication=0,
                                        idle=3.0)
    assert numbers["kernels_ms"] == {"products": {"gemm": 3.0}, "others": {"add": 1.5}, "optimizer": {"gemm": 0.5}}
    assert list(numbers["groups_ms"]) == list(GROUPS)
    assert summarise(4.0, {}, kernels, 1e9)["groups_ms"]["idle"] == 0


def test_a_real_step_and_its_groups():
    calls, x = [], torch.randn(400, 400, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1e-3)

    def step():
        calls.append(1)
        with part("forward and backward"):
            q = (x @ x).view(1, 4, 400, 100)
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            torch.nn.functional.cross_entropy(y.reshape(400, 400), torch.arange(400)).backward()
        with part("own update"):
            x.grad.mul_(x.detach() @ x.detach())
        optimizer.step()

    numbers = profile_step(step, 1e9, count=2, device=CPU)
    groups, kernels = numbers["groups_ms"], numbers["kernels_ms"]
    assert len(calls) == 6 and numbers["parts_ms"].keys() == {"forward and backward", "own update"}
    assert 0 < sum(numbers["parts_ms"].values()) <= numbers["step_ms"] and numbers["model_flops"] == 1e9
    assert all(groups[group] > 0 for group in ("products", "attention", "loss", "others", "optimizer"))
    assert kernels["products"].keys() >= {"aten::mm"} and kernels["optimizer"].keys() >= {"aten::mm", "aten::mul_"}
    assert "aten::mul_" not in kernels["others"]  # what is inside the optimizer alone
    assert any("add" in name for name in kernels["optimizer"])  # SGD's, which has no part, but torch's own label


def test_times_are_of_one_of_the_steps(monkeypatch):
    monkeypatch.setattr(profile, "milliseconds", lambda watch: {"adam": 6.0, "whole step": 30.0})
    monkeypatch.setattr(profile, "operators", lambda events, optimizers: [("aten::mm", "products", 12.0)])
    numbers = profile_step(lambda: None, 1e9, count=3, device=CPU)
    assert (numbers["step_ms"], numbers["parts_ms"]) == (10.0, {"adam": 2.0})
    assert numbers["kernels_ms"] == {"products": {"aten::mm": 4.0}}


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_visible_keys_by_counting(window):
    bounds = [0, 1, 8, 9, 40, 77, 100]
    pairs = sum(1 for a, b in zip(bounds, bounds[1:]) for i in range(a, b) for j in range(a, i + 1) if i - j < window)
    assert visible_keys(torch.tensor(bounds, dtype=torch.int32), window) == pairs


def test_attention_s_flops_are_those_that_torch_counts_for_all_pairs():
    from torch.utils.flop_counter import FlopCounterMode
    q, k, v = (torch.randn(2, 30, 8, requires_grad=True) for _ in range(3))  # heads, tokens, head_dim
    with FlopCounterMode(display=False) as counter:
        ((q @ k.transpose(1, 2)).softmax(-1) @ v).sum().backward()
    one = model_flops(0, torch.tensor([0, 30]), [(16, 30)])
    assert counter.get_total_flops() / 30**2 == one / (30 * 31 / 2) == 12 * 16  # a query sees half of them, and itself


def test_the_model_s_flops_are_the_sum_of_products_and_attention():
    bounds = torch.tensor([0, 4, 10])
    assert model_flops(1000, bounds, []) == 6 * 1000 * 10
    assert model_flops(0, bounds, [(16, 4), (16, 1)]) == 12 * 16 * (10 + 18 + 10)


def test_peaks_are_of_known_devices_alone():
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.5
    assert peak_tflops("NVIDIA H100 PCIe") < 800 and peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("Graphics 9000") is None and peak_tflops(None) is None


# ---------------------------------------------------------------------------------------------------------------------
# The report


def stage(first, steps, step_ms, kernels, flops=1e12):
    return dict(first_step=first, steps=steps, work=f"work {first}") | summarise(
        step_ms, {"adam": 0.25 * step_ms}, kernels, flops)


def two_stages():
    return [stage(0, 3, 4.0, [("gemm", "products", 3.0), ("flash", "attention", 0.5)]),
            stage(3, 1, 8.0, [("gemm", "products", 3.0), ("flash", "attention", 2.5), ("copy", "others", 0.4)], 3e12)]


def test_the_report_weighs_stages_by_their_steps():
    text, numbers = report(two_stages(), "NVIDIA H200")
    mean = numbers["mean"]
    assert (mean["step_ms"], mean["parts_ms"], mean["model_flops"]) == (5.0, {"adam": 1.25}, 1.5e12)
    assert mean["groups_ms"] == dict(products=3.0, attention=1.0, loss=0.0, others=0.1, optimizer=0.0,
                                     communication=0.0, idle=0.9)
    assert mean["kernels_ms"] == {"products": {"gemm": 3.0}, "attention": {"flash": 1.0}, "others": {"copy": 0.1}}
    assert (mean["tflops"], mean["mfu"]) == (300.0, round(300 / 989.5, 4))
    assert [(one["tflops"], one["mfu"]) for one in numbers["stages"]] == [(250.0, 0.2527), (375.0, 0.379)]
    assert numbers["costs"] == (
        "of a mean step of 5.000 ms the largest costs after products are attention 1.000 ms (20.0%, above all flash); "
        "idle 0.900 ms (18.0%); others 0.100 ms (2.0%, above all copy)")
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["steps", "step", *GROUPS, "TFLOP/s", "MFU"]
    assert rows[2] == ["0–2", "4.00", "3.00", "0.50", *["0.00"] * 4, "0.50", "250", "25.3%", "work", "0"]
    assert rows[4][:2] == ["mean", "5.00"] and rows[4][-2:] == ["300", "30.3%"]
    assert numbers["costs"] in text
    assert ["gemm", "3.000", "60.0%", "products"] in rows and ["adam", "1.250", "25.0%"] in rows
    json.dumps(numbers, allow_nan=False)


def test_without_a_known_peak_there_are_flops_and_no_utilisation():
    text, numbers = report(two_stages(), "Graphics 9000")
    assert numbers["mean"]["mfu"] is None is numbers["peak_tflops"] and numbers["mean"]["tflops"] == 300
    assert "the peak of Graphics 9000 is not known" in text and "the peak of this device" in report(two_stages())[0]


def test_only_the_largest_kernels_are_kept_and_the_mean_is_of_all():
    kernels = [[(f"k{i}", "others", float(i)) for i in order] for order in (range(30), range(29, -1, -1))]
    numbers = report([stage(i, 1, 1000.0, kernels[i]) for i in (0, 1)])[1]
    for one in (*numbers["stages"], numbers["mean"]):
        assert one["kernels_ms"] == {"others": {f"k{i}": i for i in range(29, 29 - MOST_KERNELS, -1)}}


def test_the_largest_costs_are_three_and_never_products():
    groups = dict.fromkeys(GROUPS, 0.0) | dict(products=50.0, loss=3.0, communication=5.0, optimizer=4.0, others=2.0)
    said = largest_costs({"step_ms": 64.0, "groups_ms": groups, "kernels_ms": {"loss": {"a": 1.0, "b": 2.0}}})
    assert re.findall(r"(\w+) [\d.]+ ms \(", said) == ["communication", "optimizer", "loss"] and "above all b" in said


# ---------------------------------------------------------------------------------------------------------------------
# The picture


@pytest.mark.filterwarnings("error")  # matplotlib warns where the layout fails
@pytest.mark.parametrize("device", ["NVIDIA H200", None])
def test_the_picture_shows_each_group_by_its_time(tmp_path, device):
    image, colors = pytest.importorskip("matplotlib.image"), pytest.importorskip("matplotlib.colors")
    from records.plot import COLOURS
    (tmp_path / "record.json").write_text(json.dumps({
        "track": "text-local", "name": "run", "validation": [], "extra": {"profile": report(two_stages(), device)[1]}}))
    assert step_bars(tmp_path) == tmp_path / "profile.png"
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(tmp_path / "profile.png")[..., :3]

    def amount(colour):
        return int((abs(pixels[:, :1200] - list(colors.to_rgb(colour))).max(-1) < 0.02).sum())  # without the legend

    products, attention, idle = (amount(colour) for colour in (COLOURS[0], COLOURS[1], "#d9d9d9"))
    assert attention / products == pytest.approx(3.0 / 6.0, rel=0.05)  # of both stages
    assert idle / products == pytest.approx(2.6 / 6.0, rel=0.1) and amount(COLOURS[2]) == 0  # no loss


def test_a_record_without_stages_has_no_picture(tmp_path):
    for extra in ({}, {"profile": {"step_ms": 3.0}}):
        (tmp_path / "record.json").write_text(json.dumps({"track": "text-local", "name": "run", "extra": extra}))
        assert step_bars(tmp_path) is None and len(list(tmp_path.iterdir())) == 1
