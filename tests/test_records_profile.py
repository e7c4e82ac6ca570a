"""The profile of a step: sums and shares of known times, and a real step."""

import time

import pytest
import torch

from optim.parts import milliseconds, part, stopwatch
from records.profile import MOST_KERNELS, profile_step, summarise


def test_kernels_are_summed_and_shares_are_of_the_step():
    kernels = [("product", 2.0), ("copy", 1.5), ("product", 1.0), ("ncclDevKernel_Sum", 2.5)]
    table, numbers = summarise(8.0, {"forward": 3.0, "update": 2.0}, kernels)
    assert numbers == {"step_ms": 8.0, "parts_ms": {"forward": 3.0, "update": 2.0}, "nccl_ms": 2.5,
                       "kernels_ms": {"product": 3.0, "ncclDevKernel_Sum": 2.5, "copy": 1.5}}
    assert [line.split()[-1] for line in table.splitlines()[1:]] == ["100.0%", "37.5%", "25.0%", "37.5%", "31.2%", "18.8%"]


def test_only_the_largest_kernels_are_listed():
    kernels = summarise(1.0, {}, [(f"k{i}", float(i)) for i in range(2 * MOST_KERNELS)])[1]["kernels_ms"]
    assert len(kernels) == MOST_KERNELS and max(kernels, key=kernels.get) == f"k{2 * MOST_KERNELS - 1}"


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


def test_a_real_step_is_called_three_times_and_its_parts_are_found():
    calls = []

    def step():
        calls.append(1)
        with part("products"):
            return torch.ones(200, 200) @ torch.ones(200, 200)

    table, numbers = profile_step(step)
    assert len(calls) == 3 and 0 < numbers["parts_ms"]["products"] <= numbers["step_ms"] and "products" in table
