"""One training run of the CIFAR-10 example: the network, its Sparse-IFT variant, and a loop that keeps a GPU busy.

A small network spends more time starting kernels than running them. On a GPU, forward and backward of a step are therefore
recorded once as a CUDA graph, the masking of gradients included, and replayed; the optimizer and hf_sparse's hooks on it run
as always, and mask updates change the masks in place, so that the graph sees them. The one step before a RigL update, which
looks at the gradient of pruned weights, runs without the graph.
"""

import copy
import math
import time
from collections.abc import Callable

import torch
from _cifar10_data import Images, augmented, normalised
from torch import nn
from torch.nn.functional import cross_entropy

from hf_sparse.flops import forward_flops, sparse_flops
from hf_sparse.models.ift import sparse_ift
from hf_sparse.models.paper_flops import paper_flops
from hf_sparse.models.sparse_configs import SparseResNetConfig
from hf_sparse.models.sparse_resnet import SparseResNetForImageClassification
from hf_sparse.training.sparse_training import sparsify

__all__ = ["Step", "network", "prepare", "time_steps", "train"]

IMAGE = {"pixel_values": (1, 3, 32, 32)}


def network(width: int, classes: int = 10) -> SparseResNetForImageClassification:
    """The paper's ResNet-18 for CIFAR (width 64 there): four stages of two basic blocks, W, 2 W, 4 W and 8 W wide.

    Dense: :func:`hf_sparse.models.ift.sparse_ift` makes the variants, so that all take the same way.
    """
    sizes = [width, 2 * width, 4 * width, 8 * width]
    config = SparseResNetConfig(stem="cifar", embedding_size=width, hidden_sizes=sizes, num_labels=classes)
    return SparseResNetForImageClassification(config)


def prepare(variant: dict, seed: int, recipe: dict, steps: int, device: torch.device) -> dict:
    """A model to train: ``model``, ``optimizer``, ``training`` (None if dense), ``facts`` for the result.

    Args:
        variant: ``family`` (None: dense), ``sparsity`` and ``method``.
        recipe: the one schedule of all variants.
        steps: optimizer steps of the training.
    """
    torch.manual_seed(seed)
    model = network(recipe["width"])
    dense = forward_flops(model, IMAGE)
    facts = {"paper_flops_dense": paper_flops(model, IMAGE)}
    report = None
    if variant["family"]:
        moves = {}
        if variant["method"] != "static":
            moves = dict(every=min(recipe["every"], max(1, steps // 4)), end=0.75, drop_fraction=0.3)
        budget = (
            recipe["budget"] if variant["family"] == "wide" else "layer"
        )  # the others keep the width of stem and head
        kind = dict(method=variant["method"], schedule=moves, budget=budget, seed=seed)
        report = sparse_ift(model, variant["family"], variant["sparsity"], inputs=IMAGE, **kind)
    model = model.to(device=device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe["rate"],
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe["decay"],
        fused=device.type == "cuda",
    )
    training = sparsify(model, report.config, optimizer, total_steps=steps) if report else None
    densities = training.densities() if training else {}
    after = forward_flops(model, IMAGE)
    facts |= {
        "sparsity": report.sparsity if report else 0.0,
        "flops_dense": sum(dense.values()),
        "flops": sparse_flops(after, densities),
        "flops_without_zeros_skipped": sum(after.values()),
        "iso_flop_ratio": sparse_flops(after, densities) / sum(dense.values()),
        "layer_ratio": report.layer_ratio if report else 1.0,
        "paper_flops": paper_flops(model, IMAGE, densities),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "nonzero_parameters": int(sum(int(p.count_nonzero()) for p in model.parameters())),
        "ift": str(report) if report else "dense",
    }
    return {"model": model, "optimizer": optimizer, "training": training, "facts": facts}


class Step:
    """Forward and backward on a batch; leaves gradients on the parameters and returns the loss, on the device.

    Args:
        shape: of a batch of images; it never changes.
        graph: record a CUDA graph, on a GPU.
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, graph: bool = True
    ):
        self.model, self.device, self.dtype, self.graph = model, device, dtype, None
        self.images = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.zeros(shape[0], dtype=torch.long, device=device)
        self.parameters = list(model.parameters())
        if graph and device.type == "cuda":
            self._record()

    def _run(self) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False):
            logits = self.model(pixel_values=self.images).logits
        loss = cross_entropy(logits.float(), self.labels)
        loss.backward()
        return loss.detach()

    def _record(self) -> None:
        before = [buffer.clone() for buffer in self.model.buffers()]  # what warming up does to batch norms is undone
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._clear()
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._clear()  # so that gradients come to lie in the graph's memory, written anew by every replay
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._run()
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, whole_gradient: bool) -> torch.Tensor:
        """
        Args:
            whole_gradient: an update of the masks follows, which looks at all gradients.
        """
        self.images.copy_(images)
        self.labels.copy_(labels)
        if self.graph is not None and not whole_gradient:
            self.graph.replay()
            return self.loss
        if self.graph is None:
            self._clear()
        else:  # into the same memory, where the graph will write again
            torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        return self._run()


def rate_at(step: int, steps: int, recipe: dict) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(recipe["warmup"] * steps))
    if step < warm:
        return recipe["rate"] * (step + 1) / warm
    return recipe["rate"] * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _update_follows(training) -> bool:
    """Whether the masks move after the coming step."""
    return training is not None and training.timetable is not None and training.timetable.pending(training.step + 1)


def train(
    variant: dict,
    seed: int,
    recipe: dict,
    data: tuple[Images, Images],
    device: torch.device,
    snapshot: Callable[[str, nn.Module], None] = lambda when, model: None,
    on_epoch: Callable[[str], None] = lambda text: None,
    graph: bool = True,
) -> dict:
    """One run from initial weights to test accuracy.

    Args:
        data: training and test images, on the device.
        snapshot: is given "start" and "end", each with a copy of the model on the CPU, its masks beside the weights.

    Raises:
        FloatingPointError: the loss is not finite at the end of an epoch.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    count = len(data[0].labels) // recipe["batch"]
    steps = count * recipe["epochs"]
    run = prepare(variant, seed, recipe, steps, device)
    model, optimizer, training = run["model"], run["optimizer"], run["training"]
    if training is not None:
        snapshot("start", copy.deepcopy(model).cpu())
    started = time.perf_counter()
    order = torch.Generator().manual_seed(seed)  # the same batches for every variant
    test = normalised(data[1].pixels, dtype)
    model.train()
    step_of = Step(model, (recipe["batch"], 3, 32, 32), device, dtype, graph)
    recorded = time.perf_counter()
    curve, changes = [], 0
    for epoch in range(recipe["epochs"]):
        images, labels = augmented(data[0], order, dtype)
        total = torch.zeros((), device=device)
        for index in range(count):
            part = slice(index * recipe["batch"], (index + 1) * recipe["batch"])
            follows = _update_follows(training)
            changes += follows
            total += step_of(images[part], labels[part], follows)
            optimizer.param_groups[0]["lr"] = rate_at(epoch * count + index, steps, recipe)
            optimizer.step()
        loss = float(total) / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"{variant['name']}, seed {seed}: the loss is {loss} in epoch {epoch + 1}")
        curve.append({"epoch": epoch + 1, "loss": loss, "accuracy": accuracy(model, test, data[1].labels, dtype)})
        on_epoch(f"{variant['name']} seed {seed}: {curve[-1]['accuracy']:.2%}")
    seconds = time.perf_counter() - started
    metrics = training.metrics() if training else {"density": 1.0}
    if training is not None:
        snapshot("end", copy.deepcopy(model).cpu())
        training.finish()
    facts = run["facts"]
    spent = 3 * facts["flops"] * steps + changes * (facts["flops_without_zeros_skipped"] - facts["flops"])
    return facts | {
        "accuracy": curve[-1]["accuracy"],
        "best_accuracy": max(point["accuracy"] for point in curve),
        "density": metrics.pop("density"),
        "mask": metrics,
        "training_flops": spent * recipe["batch"],
        "training_flops_ratio": spent / (3 * facts["flops_dense"] * steps),
        "steps": steps,
        "seconds": seconds,
        "seconds_before_the_first_step": recorded - started,
        "curve": curve,
    }


def time_steps(
    variant: dict, recipe: dict, data: tuple[Images, Images], device: torch.device, count: int, graph: bool = True
) -> dict:
    """What a run will take: seconds to ``begin`` it, of a ``step``, of an ``epoch``'s data and test.

    And ``gradient_error``: by how much the gradients of a replayed graph differ from those without it, relative to their norm.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begin = time.perf_counter()
    run = prepare(variant, 0, recipe | {"every": 10 * count}, 100_000, device)
    run["model"].train()
    step_of = Step(run["model"], (recipe["batch"], 3, 32, 32), device, dtype, graph)
    images, labels = augmented(data[0], torch.Generator().manual_seed(0), dtype)
    test = normalised(data[1].pixels, dtype)
    accuracy(run["model"], test, data[1].labels, dtype)
    first = images[: recipe["batch"]], labels[: recipe["batch"]]
    gradients = []
    for without in (False, True):
        step_of(*first, without)
        gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in step_of.parameters]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    marks = [time.perf_counter()]
    for index in range(2 * count):
        step_of(*first, False)
        run["optimizer"].step()
        if index + 1 in (count, 2 * count):
            float(images[0, 0, 0, 0])  # waits for the device
            marks.append(time.perf_counter())
    images, labels = augmented(data[0], torch.Generator().manual_seed(0), dtype)
    accuracy(run["model"], test, data[1].labels, dtype)
    marks.append(time.perf_counter())
    times = {"begin": marks[0] - begin, "step": (marks[2] - marks[1]) / count, "epoch": marks[3] - marks[2]}
    return times | {"gradient_error": error}


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> float:
    """The share of images whose class is the model's first guess."""
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=images.device)
    for begin in range(0, len(labels), 2000):
        part = slice(begin, begin + 2000)
        with torch.autocast(images.device.type, dtype, dtype != torch.float32):
            right += (model(pixel_values=images[part]).logits.argmax(-1) == labels[part]).sum()
    model.train()
    return int(right) / len(labels)
