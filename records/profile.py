"""Where the time of training steps goes: by labelled part (optim.parts.part), by kernel, and by group of kernels.

A kernel belongs to the first of these groups that claims it, by RULES and, for the optimizer, by what it runs inside:

    communication  NCCL and gloo, as far as no other kernel runs meanwhile
    optimizer      all that runs inside an optimizer's step
    attention      FlashAttention and what else calls itself attention
    loss           the kernels of kernels/cross_entropy.py, and torch's own; not the products of the head
    products       matrix products of any library
    others         the rest: elementwise passes, reductions, look-ups, copies, and the loss where our kernels do not run
    idle           the time of the step that no kernel takes

On a CPU operators stand for kernels, each without the operators it calls, and belong to the group of the one around
them where they have none themselves. The profiler slows those down, so there the groups may exceed the step.

Model FLOPs count what the mathematics of a step needs, forward and twice that backward, nothing for recomputing:

    6 · parameters of matrices, with the head · tokens  +  12 · Σ over layers: width · visible keys of all tokens

(arXiv 2204.02311, appendix B, but with the keys that a window and a document leave: min(window, place in it)). Their
utilisation (MFU) is of the device's dense bfloat16 peak, also where some products are in 8 bits.
"""
import re

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from optim.parts import milliseconds, part, stopwatch

MOST_KERNELS = 15   # lines of the table
GROUPS = ("products", "attention", "loss", "others", "optimizer", "communication", "idle")
RULES = tuple((group, re.compile(pattern)) for group, pattern in (      # of names in lower case; the first one counts
    ("communication", r"^nccl|^gloo|^c10d"),
    ("optimizer", r"multi_tensor|adam"),
    ("others", r"^triton_(?!tem_)"),    # inductor names what it fuses after all that is nearby, not so its templates
    ("attention", r"flash|fmha|attention"),
    ("loss", r"^_(rows|slopes|cast)_kernel|cross_entropy|log_softmax|nll_loss"),
    ("products", r"nvjet|gemm|gemv|cublas|cutlass|xmma|^_relu_squared_kernel|^triton_tem_|^aten::(linear|matmul|\w*mm)$"
     r"|mkl\w*::\w*linear")))
MODEL = "forward and backward"      # the one part of a step that is not the optimizer's
# Dense bfloat16 TFLOP/s by NVIDIA's data sheets, half of what they print for sparse matrices. The first name that fits.
PEAKS = {"H100 PCIe": 756.5, "H100 NVL": 835.5, "H200 NVL": 835.5, "H100": 989.5, "H200": 989.5, "A100": 312.0}


def profile_step(step, flops, *, count=1, device=None):
    """Time the parts of `count` steps, and the kernels of as many others; as many before these are not looked at.

    Parts are timed without the profiler, which slows CUDA graphs down: on the GPU's own clock, where there is one.

    step: function without arguments.  flops: model FLOPs of a call of it on this device (float).  count: of these steps
    (int); all times are means of a step.  device: torch.device, None for CUDA where torch finds it.
    Returns dict:
        step_ms      the whole step
        parts_ms     part -> its time
        groups_ms    group, all of GROUPS -> its time
        kernels_ms   group -> kernel -> sum of its launches
        model_flops  flops
    """
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    for _ in range(count):
        step()
    with stopwatch() as watch, part("whole step"):
        for _ in range(count):
            step()
    parts = {name: ms / count for name, ms in milliseconds(watch).items()}
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as profiler:
        for _ in range(count):
            step()
    kernels = (gpu_kernels if gpu else operators)(profiler.events(), parts.keys() - {MODEL, "whole step"})
    return summarise(parts.pop("whole step"), parts, [(name, group, ms / count) for name, group, ms in kernels], flops)


def gpu_kernels(events, optimizers):
    """(name, group, ms) of each launch, of communication only what it adds.  events: of torch.profiler.  optimizers:
    names of parts that belong to one; its spans on the GPU and those of torch's own label tell what runs inside."""
    events = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [event.time_range for event in events if event.is_user_annotation and _optimizers(event.name, optimizers)]
    kernels, talks, busy, until = [], [], [], 0.0
    for event in sorted((event for event in events if not event.is_user_annotation), key=lambda e: e.time_range.start):
        start, end, group = event.time_range.start, event.time_range.end, group_of(event.name)
        if group == "communication":
            talks.append((event.name, start, end))
            continue
        if any(span.start <= start < span.end for span in spans):
            group = "optimizer"
        kernels.append((event.name, group, (end - start) / 1000))
        busy.append((max(start, until), end))
        until = max(end, until)     # so that no time is in `busy` twice
    for name, start, end in talks:
        hidden = sum(max(0.0, min(end, last) - max(start, first)) for first, last in busy)
        kernels.append((name, "communication", (end - start - hidden) / 1000))
    return kernels


def operators(events, optimizers):
    """The same of a CPU's operators."""
    found = []
    for event in events:
        around = [event]
        while around[-1].cpu_parent is not None:
            around.append(around[-1].cpu_parent)
        if event.is_user_annotation or event.device_type != DeviceType.CPU:
            continue
        group = next((group for one in around if (group := group_of(one.name)) != "others"), "others")
        if any(_optimizers(one.name, optimizers) for one in around if one.is_user_annotation):
            group = "optimizer" if group != "communication" else group
        found.append((event.name, group, event.self_cpu_time_total / 1000))
    return found


def _optimizers(label, optimizers):
    return label in optimizers or label.startswith("Optimizer.")     # torch.optim labels the steps of its subclasses


def group_of(name):
    """The group (str) of a kernel or an operator by its name (str)."""
    return next((group for group, pattern in RULES if pattern.search(name.lower())), "others")


def summarise(step_ms, parts, kernels, flops):
    """What profile_step returns.  step_ms: float.  parts: dict name -> ms.  kernels: list of (name, group, ms)."""
    sums = {}
    for name, group, ms in kernels:
        of_group = sums.setdefault(group, {})
        of_group[name] = of_group.get(name, 0.0) + ms
    groups = {group: sum(sums.get(group, {}).values()) for group in GROUPS}
    groups["idle"] = max(0.0, step_ms - sum(groups.values()))
    return {"step_ms": step_ms, "parts_ms": parts, "groups_ms": groups, "kernels_ms": sums, "model_flops": flops}


# -- model FLOPs -----------------------------------------------------------------------------------------------------

def visible_keys(cu_seqlens, window):
    """Keys that all tokens together attend to (int), themselves included: at most `window`, in their own document.

    cu_seqlens: (documents + 1,) int, where documents begin, and the end.  window: int, at least 1.
    """
    lengths = cu_seqlens.long().diff()
    short = lengths.clamp(max=window)       # of the first tokens of a document each sees one more than the one before
    return int((short * (short + 1) // 2 + (lengths - short) * window).sum())


def model_flops(parameters, cu_seqlens, attention):
    """FLOPs of a training step, by the formula above (int).

    parameters: of all matrices (int).  cu_seqlens: of the tokens, as in visible_keys.
    attention: list of (width, window) of each layer.
    """
    keys = sum(width * visible_keys(cu_seqlens, window) for width, window in attention)
    return 6 * parameters * int(cu_seqlens[-1]) + 12 * keys


def peak_tflops(name):
    """Dense bfloat16 TFLOP/s (float) of the device that torch calls `name` (str or None); None where not known."""
    return next((peak for key, peak in PEAKS.items() if name is not None and key in name), None)


# -- the report ------------------------------------------------------------------------------------------------------

def report(stages, device=None):
    """All stages of a run together.

    stages: iterable of dict: what profile_step returned, and first_step, steps (int) and work (str) of the stage.
    device: name of what it ran on (str), None if that has none.
    Returns (text, numbers): tables and a sentence as str; numbers for record.json, a dict with the stages, their mean
    over all steps of the run, the device's peak and the sentence about the largest costs.
    """
    stages = list(stages)
    peak, weights = peak_tflops(device), [stage["steps"] for stage in stages]
    keys = ("step_ms", "parts_ms", "groups_ms", "kernels_ms", "model_flops")
    mean = {key: _mean([stage[key] for stage in stages], weights) for key in keys}
    for one in (*stages, mean):
        one["tflops"] = one["model_flops"] / one["step_ms"] / 1e9
        one["mfu"] = one["tflops"] / peak if peak else None
    costs = largest_costs(mean)
    text = [_stage_table(stages, mean), f"MFU is of {peak:g} TFLOP/s, {device}'s dense bfloat16 peak" if peak else
            f"no MFU: the peak of {device or 'this device'} is not known", costs, _kernel_table(mean)]
    numbers = {"device": device, "peak_tflops": peak, "costs": costs, "mean": _rounded(mean),
               "stages": [_rounded(stage) for stage in stages]}
    return "\n".join(text), numbers


def largest_costs(mean):
    """A sentence (str) about the three groups that take most after products, each with its largest kernel."""
    groups = sorted(set(GROUPS) - {"products"}, key=lambda group: -mean["groups_ms"][group])[:3]
    said = []
    for group in groups:
        ms, kernels = mean["groups_ms"][group], mean["kernels_ms"].get(group)
        most = f", above all {max(kernels, key=kernels.get)[:60]}" if kernels else ""
        said.append(f"{group} {ms:.3f} ms ({ms / mean['step_ms']:.1%}{most})")
    return f"of a mean step of {mean['step_ms']:.3f} ms the largest costs after products are {'; '.join(said)}"


def _stage_table(stages, mean):
    heads = ["step", *GROUPS, "TFLOP/s", "MFU"]
    widths = [max(len(head) + 2, 9) for head in heads]
    lines = ["one step of each stage, in ms",
             f"{'steps':>11}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths))]
    for one in (*stages, mean):
        place = f"{one['first_step']}–{one['first_step'] + one['steps'] - 1}" if "work" in one else "mean"
        cells = [f"{ms:.2f}" for ms in (one["step_ms"], *one["groups_ms"].values())]
        cells += [f"{one['tflops']:.3g}", "–" if one["mfu"] is None else f"{one['mfu']:.1%}"]
        lines.append(f"{place:>11}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
                     + f"  {one.get('work', '')}".rstrip())
    return "\n".join(lines)


def _kernel_table(mean):
    rows = [(mean["step_ms"], "", "whole step"), *((ms, "", name) for name, ms in mean["parts_ms"].items())]
    rows += sorted(((ms, group, name) for group, kernels in _largest(mean["kernels_ms"]).items()
                    for name, ms in kernels.items()), reverse=True)
    return "\n".join([f"{'the mean step':60} {'ms':>9}  share",
                      *(f"{name[:60]:60} {ms:9.3f} {ms / mean['step_ms']:6.1%}  {group}".rstrip()
                        for ms, group, name in rows)])


def _largest(groups):
    """Of group -> kernel -> ms the MOST_KERNELS kernels that take most."""
    kept = sorted(((ms, group, name) for group, kernels in groups.items() for name, ms in kernels.items()),
                  reverse=True)[:MOST_KERNELS]
    return {group: {name: ms for ms, of, name in kept if of == group} for _, group, _ in kept}


def _mean(values, weights):
    """Weighted mean of numbers, or of dicts of them at any depth; what one of them has not is 0 there."""
    if any(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value or {})
        return {key: _mean([(value or {}).get(key) for value in values], weights) for key in keys}
    return sum((value or 0.0) * weight for value, weight in zip(values, weights)) / sum(weights)


def _rounded(one):
    """For record.json: the largest kernels alone, times to a microsecond."""
    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return round(value, 4) if isinstance(value, float) else value
    return rounded(one | {"kernels_ms": _largest(one["kernels_ms"])})
