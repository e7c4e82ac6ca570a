"""Which image comes when in training, and how: tables of integers for kernels/augment.py, the same on every device.

A row says of one image of a batch: image, flip, shift down, shift right, row and column of the blanked square.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ORDER, FLIP, DOWN, RIGHT, CUT_ROW, CUT_COLUMN = range(6)  # streams of random numbers


def mix(x):
    """A hash of integers in [0, 2^32), Python's or an int64 tensor of them; no product leaves int64."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & MASK
    return (x >> 16) ^ x


def random_bits(seed: int, epochs: int, images: int, device) -> Tensor:
    """(epochs, 6, images) int64 in [0, 2^32): a function of seed, epoch, stream and image. FLIP is that of epoch 0."""
    base = mix(mix(seed & MASK) ^ (seed >> 32 & MASK))
    keys = [[mix(base + (0 if stream == FLIP else 6 * epoch) + stream + 1 & MASK) for stream in range(6)]
            for epoch in range(epochs)]
    image = torch.arange(images, device=device) * 0x9E3779B1 & MASK
    return mix(image + torch.tensor(keys, device=device)[..., None] & MASK)


def training_table(seed: int, *, images: int, batch: int, epochs: float, translate: int, cutout: int, size: int,
                   device) -> Tensor:
    """(batches of all epochs begun, batch, 6) int32: in every epoch each image once, in a new order and newly shifted;
    mirrored in every other epoch, where a random half of them begins mirrored (airbench's alternating flip).

    translate: images are shifted by up to so many pixels.  cutout: side of the square, 0 for none.  size: of an image.
    What an epoch has beyond full batches is left out.
    """
    epochs = math.ceil(epochs)
    bits = random_bits(seed, epochs, images, device)
    order = torch.sort((bits[:, ORDER] - 2**31).int(), dim=1, stable=True).indices  # stable: the same everywhere
    shift, free = 2 * translate + 1, size - cutout + 1
    epoch = torch.arange(epochs, device=device)[:, None]
    columns = [(bits[:, FLIP] + epoch) & 1, bits[:, DOWN] % shift - translate, bits[:, RIGHT] % shift - translate,
               bits[:, CUT_ROW] % free, bits[:, CUT_COLUMN] % free]
    columns = [order, *(column.gather(1, order) for column in columns)]
    table = torch.stack(columns, dim=-1)[:, : images // batch * batch].int()
    return table.reshape(-1, batch, len(columns))


def view_table(images: int, flip: int, shift: int, device) -> Tensor:
    """(images, 6) int32: every image in turn, mirrored or not, shifted down and right by `shift` pixels."""
    table = torch.zeros(images, 6, dtype=torch.int32, device=device)
    table[:, 0] = torch.arange(images, device=device)
    table[:, 1], table[:, 2], table[:, 3] = flip, shift, shift
    return table
