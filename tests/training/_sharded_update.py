"""Masks of sharded tensors equal those of whole ones; run by test_update.py, three processes."""

import random

from _launch import launch


def main():
    import torch
    import torch.distributed as dist

    from hf_sparse.training.update import drop_and_grow_all, lowest, lowest_of_all

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    levels = [-float("inf"), -3.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0 + 2**-23, 7.5, float("inf")]

    def part(tensor):
        """This rank's rows, cut as torch.chunk cuts: some ranks may have none."""
        each = -(-tensor.shape[0] // size)
        return tensor[min(rank * each, tensor.shape[0]) :][:each]

    def same(sharded, whole, what):
        for mine, every in zip(sharded, whole, strict=True):
            assert mine.shape == part(every).shape
            assert torch.equal(mine, part(every)), what

    for trial in range(20):
        rng = random.Random(trial)
        generator = torch.Generator().manual_seed(trial)
        shapes = [(rng.randint(1, 7), rng.randint(1, 6)) for _ in range(rng.randint(1, 4))]
        shapes[0] = (2, 3, 4) if trial % 5 == 0 else shapes[0]
        some = torch.tensor(levels if trial % 3 else [0.0, -0.0])  # or nothing but ties

        def draw(shape, some=some, generator=generator):
            return some[torch.randint(len(some), shape, generator=generator)]

        def flags(shape, generator=generator):
            return torch.rand(shape, generator=generator) < 0.7

        scores, growth = [draw(s) for s in shapes], [draw(s) for s in shapes]
        candidates = [flags(s) for s in shapes]
        counts = [rng.choice([0, int(c.sum()), rng.randint(0, int(c.sum()))]) for c in candidates]
        parts = [part(t) for t in scores], [part(t) for t in candidates]
        same(lowest(*parts, counts, group), lowest(scores, candidates, counts), ("lowest", trial))

        total = rng.randint(0, sum(int(c.sum()) for c in candidates))
        same(lowest_of_all(*parts, total, group), lowest_of_all(scores, candidates, total), ("all", trial))

        kept = [int(c.sum()) for c in candidates]
        drops = [rng.randint(0, k) for k in kept]
        keeps = [rng.randint(k - d, c.numel()) for k, d, c in zip(kept, drops, candidates, strict=True)]
        whole = drop_and_grow_all(candidates, scores, growth, drops, keeps)
        mine = drop_and_grow_all(parts[1], parts[0], [part(t) for t in growth], drops, keeps, group)
        same(mine, whole, ("drop and grow", trial))
        same(
            drop_and_grow_all(parts[1], parts[0], None, drops, keeps, group),
            drop_and_grow_all(candidates, scores, None, drops, keeps),
            ("drop", trial),
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    launch(main, processes=3)
