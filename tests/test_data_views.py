"""data/views.py: what a training table promises, and that random numbers are the same everywhere."""

import pytest
import torch

from data.views import CUT_COLUMN, FLIP, mix, random_bits, training_table, view_table

OPTIONS = dict(images=1000, batch=300, epochs=4, translate=2, cutout=12, size=32, device="cpu")


def test_a_hash_of_a_tensor_is_that_of_its_integers_and_stays_in_32_bits():
    numbers = [0, 1, 2, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 123456789]
    assert mix(torch.tensor(numbers)).tolist() == [mix(number) for number in numbers]
    assert all(0 <= mix(number) < 2**32 for number in numbers) and len({mix(number) for number in numbers}) == 9


def test_bits_are_even_and_independent_between_streams_epochs_and_neighbours():
    bits = random_bits(3, 4, 20000, "cpu").double() / 2**32
    assert (bits.mean(-1) - 0.5).abs().max() < 0.01 and (bits.var(-1) - 1 / 12).abs().max() < 0.003
    rows = torch.cat([bits.flatten(0, 1), bits[0, :, 1:].new_zeros(0, 20000)])
    different = rows[[i for i in range(24) if i % 6 != FLIP or i < 6]]  # flips are drawn once
    correlation = torch.corrcoef(different) - torch.eye(len(different))
    assert correlation.abs().max() < 0.035  # 1 / √20000 = 0.007
    assert torch.corrcoef(torch.stack([bits[0, 0, 1:], bits[0, 0, :-1]]))[0, 1].abs() < 0.035


def test_every_epoch_has_every_image_at_most_once_in_an_order_of_its_own():
    table = training_table(0, **OPTIONS)
    assert table.shape == (4 * 3, 300, 6) and table.dtype == torch.int32
    epochs = table.view(4, 900, 6)[..., 0]
    assert all(len(set(epoch.tolist())) == 900 and 0 <= epoch.min() and epoch.max() < 1000 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_flips_alternate_and_begin_with_either():
    table = training_table(0, **OPTIONS | dict(batch=1000)).view(4, 1000, 6)
    flips = torch.stack([epoch[epoch[:, 0].argsort(), 1] for epoch in table])
    assert torch.equal(flips[0], flips[2]) and torch.equal(flips[1], 1 - flips[0]) and torch.equal(flips[3], flips[1])
    assert 400 < flips[0].sum() < 600


def test_shifts_and_squares_take_all_places_that_they_may():
    table = training_table(1, **OPTIONS)
    for column in (2, 3):
        assert table[..., column].unique().tolist() == [-2, -1, 0, 1, 2]
    for column in (4, 5):
        assert table[..., column].unique().tolist() == list(range(32 - 12 + 1))
    plain = training_table(1, **OPTIONS | dict(translate=0))
    assert not plain[..., 2:4].any() and torch.equal(plain[..., 0], table[..., 0])


def test_seeds_differ_beyond_32_bits_too():
    orders = {tuple(training_table(seed, **OPTIONS)[0, :, 0].tolist()) for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**40)}
    assert len(orders) == 6


def test_part_of_an_epoch_has_a_whole_table():
    assert len(training_table(0, **OPTIONS | dict(epochs=0.5))) == 3
    assert len(training_table(0, **OPTIONS | dict(epochs=1.1))) == 6


def test_a_view_is_every_image_in_turn():
    assert view_table(3, 1, -1, "cpu").tolist() == [[0, 1, -1, -1, 0, 0], [1, 1, -1, -1, 0, 0], [2, 1, -1, -1, 0, 0]]
    assert CUT_COLUMN == 5


@pytest.mark.gpu
def test_a_gpu_gives_the_same_table():
    options = OPTIONS | dict(images=50000, batch=2000)
    assert torch.equal(training_table(7, **options | dict(device="cuda")).cpu(), training_table(7, **options))
