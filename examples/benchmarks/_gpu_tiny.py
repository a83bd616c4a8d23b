"""``--tiny`` of the GPU benchmarks: what can be seen of the layouts without a GPU, their sizes and that they are exact."""

import torch

from hf_sparse.runtime.gpu import delta, paired


def show_sizes(shape=(256, 1024)) -> None:
    torch.manual_seed(0)
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        weight = torch.randn(shape).bfloat16().masked_fill_(torch.rand(shape) < sparsity, 0)
        sizes = []
        for name, layout in {"delta": delta, "paired": paired}.items():
            packed = layout.pack(weight)
            assert torch.equal(layout.unpack(packed, shape, weight.dtype), weight), f"{name} is not exact"
            sizes.append(f"{name} {layout.nbytes(packed) / weight.nbytes:.3f}")
        print(f"{shape[0]}x{shape[1]} at {sparsity:.0%}: {', '.join(sizes)} of dense, exact; times need a GPU")
