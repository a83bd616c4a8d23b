"""CIFAR-10 as tensors: read from Parquet, decoded once, cropped and flipped on the device that trains.

All images stay on the device as bytes [N, 3, 32, 32], 154 MB; an epoch of them is shuffled, augmented and normalised in one go.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Images", "augmented", "normalised", "read_cifar10", "synthetic"]

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, per channel
PAD = 4  # pixels of black on every side, of which a random crop keeps some


class Images(NamedTuple):
    """``pixels``: uint8 [N, 3, 32, 32]; ``labels``: int64 [N]."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def to(self, device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """The training and the test images of ``cifar10_train.parquet`` and ``cifar10_test.parquet``.

    The columns are those of the Hub's data set: ``img`` with the bytes of a PNG or JPEG file, and ``label``.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: images are of another size.
    """
    return _read(Path(folder) / "cifar10_train.parquet"), _read(Path(folder) / "cifar10_test.parquet")


def _read(path: Path) -> Images:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; --data names the folder of cifar10_train.parquet and cifar10_test.parquet")
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(path)
    files = table.column("img").combine_chunks().field("bytes")
    pixels = np.empty((len(files), 32, 32, 3), np.uint8)

    def decode(index: int) -> None:
        image = Image.open(io.BytesIO(files[index].as_py())).convert("RGB")
        if image.size != (32, 32):
            raise ValueError(f"{path}, row {index}: an image of {image.size[0]} x {image.size[1]} pixels, not 32 x 32")
        pixels[index] = image

    with ThreadPoolExecutor() as pool:  # decoders leave Python's lock
        list(pool.map(decode, range(len(files)), chunksize=500))
    labels = torch.from_numpy(table.column("label").to_numpy().astype("int64"))
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def synthetic(train: int, test: int, seed: int = 0) -> tuple[Images, Images]:
    """Ten noisy patterns: something to learn in seconds, for trying the program out."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.randint(40, 216, (10, 3, 4, 4), generator=random).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def some(count: int) -> Images:
        labels = torch.randint(10, (count,), generator=random)
        noise = torch.randint(-40, 40, (count, 3, 32, 32), generator=random)
        return Images((patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels)

    return some(train), some(test)


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [N, 3, 32, 32] -> zero mean, unit variance per channel, channels last."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(MEAN, device=pixels.device).view(shape)
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(shape)
    values = pixels.to(dtype, memory_format=torch.channels_last) / 255
    return ((values - mean) / deviation).to(dtype, memory_format=torch.channels_last)


def augmented(images: Images, generator: torch.Generator, dtype: torch.dtype, chunk: int = 10_000):
    """One epoch: (normalised images [N, 3, 32, 32], labels [N]), shuffled, cropped out of a frame of ``PAD`` pixels, flipped.

    All randomness comes from ``generator``, on the CPU, so that an epoch is the same on every device.
    """
    count, device = len(images.labels), images.pixels.device
    order = torch.randperm(count, generator=generator).to(device)
    shift = torch.randint(2 * PAD + 1, (2, count, 1), generator=generator).to(device)
    flip = torch.randint(2, (count, 1), generator=generator).to(device)
    steps = torch.arange(32, device=device)
    rows = shift[0] + steps
    columns = shift[1] + torch.where(flip.bool(), steps.flip(0), steps)
    epoch = torch.empty(count, 3, 32, 32, dtype=dtype, device=device, memory_format=torch.channels_last)
    channels = torch.arange(3, device=device).view(1, 3, 1, 1)
    for begin in range(0, count, chunk):
        part = slice(begin, min(begin + chunk, count))
        framed = torch.nn.functional.pad(images.pixels[order[part]], (PAD,) * 4)
        here = torch.arange(len(framed), device=device).view(-1, 1, 1, 1)
        epoch[part] = normalised(framed[here, channels, rows[part, None, :, None], columns[part, None, None, :]], dtype)
    return epoch, images.labels[order]
