"""The inner loop of SparseGPT on a GPU: one launch for a block of columns, and one mask without a sort.

SparseGPT (arxiv.org/abs/2301.00774) walks over the columns of a weight ``[rows, d_in]`` in blocks of 128. Inside a
block it prunes one column at a time and spreads that column's error over the columns to its right, with ``U``, the upper
Cholesky factor of the inverse Hessian (``H^-1 = U^T U``), holding everything that has to be known about the inputs:

    e       = (w_i - q_i) / U[i, i]          [rows]   q_i is w_i where kept and 0 where dropped
    W[:, j] -= e * U[i, j]   for j >= i               rows never talk to each other, columns do, in order
    err[:, i] = e                                     later: W[:, block end:] -= err @ U[block, block end:]

Written with tensor operations this is about ten launches a column, eleven million for a Llama of 7 billion parameters:
minutes of launch overhead around a few hundred milliseconds of arithmetic. Here the whole loop is one launch
(:func:`prune_block`), and the mask of the block (the k lowest of rows * 128 scores, exactly, equal scores in index
order) is a radix selection of six launches that never sorts and never waits for the host (:func:`lowest_mask`).

Two kernels compute the loop, the same numbers up to the order of sums:

    "panel"   columns in panels of 16 held in registers; a panel first catches up with all columns to its left by a
              small matrix product, then runs its own 16 rank-one steps on 16 columns instead of 128. The default.
    "rank1"   the block as it is written above, the whole [BR, 128] tile in registers. The simplest thing that is right.
    "torch"   no kernel: a Python loop over columns, for CPUs and machines without Triton.

Both functions only queue work (no ``.item()``, no copies to the host, no sizes that depend on data), so after one call
that compiles them they can be captured in a CUDA graph. Triton is imported at the first use, never at import.
"""

from __future__ import annotations  # the kernels below annotate with tl.constexpr before tl exists

import functools
import importlib.util
import math
from collections.abc import Sequence

import torch

from hf_sparse.patterns import _drop_lowest

__all__ = ["lowest_mask", "prune_block"]

tl = None  # triton.language, bound by _kernels(): the kernels find it among this module's globals
_CHUNK = 4096  # scores per program of the selection
_DIGITS, _BINS = 4, 256  # a 32-bit key is four digits of eight bits, most significant first


def prune_block(
    weight: torch.Tensor,
    upper: torch.Tensor,
    keep: torch.Tensor | None = None,
    n: int = 0,
    m: int = 0,
    *,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
    rows_per_program: int = 32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune one block of columns, column by column, moving each column's error to those on its right.

    Args:
        weight: ``[rows, cols]`` float32, a view of a larger matrix is fine (columns adjacent in memory). Not changed.
        upper: ``[cols, cols]`` float32, the block on the diagonal of U (``upper=True`` Cholesky factor of H^-1). Only
            its upper triangle is read.
        keep: ``[rows, cols]`` bool or uint8, True = kept, for patterns decided before the loop; None for n:m.
        n, m: keep the n highest scores ``w^2 / U[i, i]^2`` of every m consecutive columns, chosen when the loop reaches
            the group, so from weights that already absorbed the errors of the columns before it. Equal scores: the
            lower column is dropped. ``cols`` is a multiple of m.
        out: where to write the new weights; may be ``weight`` itself. A new tensor if None.
        kernel: ``"panel"``, ``"rank1"`` or ``"torch"``; None picks the first on a GPU with Triton, else the last.
        rows_per_program: rows one GPU program owns, a power of two from 16.

    Returns:
        (new weight, err, keep), each ``[rows, cols]``: float32 with exact zeros where dropped, float32, bool.

    Raises:
        ValueError: both or neither of ``keep`` and ``m`` are given, or shapes or types do not match.
    """
    rows, cols = weight.shape
    if (keep is None) == (m == 0):
        given = "neither" if keep is None else "both"
        raise ValueError(f"the mask comes either from keep or from n:m, got {given}")
    if m and (not 0 < n <= m or cols % m):
        raise ValueError(f"n:m keeps n of m, 0 < n <= m, in a block of whole groups; got {n}:{m} and {cols} columns")
    if upper.shape != (cols, cols) or (keep is not None and keep.shape != weight.shape):
        raise ValueError(f"weight {tuple(weight.shape)} needs upper [{cols}, {cols}] and keep of its own shape")
    if weight.dtype != torch.float32 or upper.dtype != torch.float32:
        raise ValueError(f"the solve is done in float32, got weight {weight.dtype} and upper {upper.dtype}")
    kernel = kernel or ("panel" if _has_triton(weight) and m <= 64 else "torch")
    if kernel == "torch":
        new, err, keep = _prune_block_torch(weight, upper, keep, n, m)
        return (new if out is None else out.copy_(new)), err, keep

    if out is None:
        out = torch.empty(rows, cols, device=weight.device)
    elif out.stride(1) != 1:
        raise ValueError(f"the columns of out must be adjacent in memory, got strides {out.stride()}")
    weight, upper = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (weight, upper))
    err = torch.empty(rows, cols, device=weight.device)
    kept = torch.empty(rows, cols, dtype=torch.bool, device=weight.device) if keep is None else keep.contiguous()
    if kernel == "panel":
        width = max(16, 1 << (m - 1).bit_length() if m else 16)
        step = width // m * m if m else width  # whole groups: 15 of 16 columns for m = 3
    elif kernel == "rank1":
        width, step = max(16, 1 << (cols - 1).bit_length()), 0
    else:
        raise ValueError(f"kernel is 'panel', 'rank1' or 'torch', got {kernel!r}")
    if rows:
        with torch.cuda.device_of(weight):
            _kernels()[kernel][(-(-rows // rows_per_program),)](
                weight,
                upper,
                kept.view(torch.uint8),
                out,
                err,
                rows,
                weight.stride(0),
                upper.stride(0),
                kept.stride(0),
                out.stride(0),
                N=n,
                M=m,
                COLS=cols,
                STEP=step,
                BR=rows_per_program,
                BC=width,
                BK=64,  # columns of the past per step of the catch-up
                num_warps=4,
                num_stages=1,  # a panel reads errors its own program wrote: no prefetch across the barrier
            )
    return out, err, kept.view(torch.bool)


def lowest_mask(
    scores: torch.Tensor,
    k: int | Sequence[int],
    segments: Sequence[int] | None = None,
    *,
    kernel: str | None = None,
) -> torch.Tensor:
    """The mask (True = kept) that drops exactly the ``k`` lowest scores of a matrix, equal scores in index order.

    Args:
        scores: ``[rows, cols]`` floating point. NaN counts as the highest score, -0.0 equals 0.0.
        k: how many to drop; one number, or one for each segment.
        segments: row counts that sum to ``rows``: matrices stacked along the rows that are ranked each on its own, such
            as the query, key and value projections, which share their input and so their Hessian.
        kernel: ``"radix"`` or ``"torch"``; None picks the first on a GPU with Triton, else the last.

    Returns:
        bool ``[rows, cols]``.

    Raises:
        ValueError: segments do not sum to the rows, or a k is outside [0, entries of its segment].

    The selection reads float bits as integers that order like the floats and finds the k-th lowest key digit by digit,
    eight bits at a time: a histogram of the first digit tells in which bin the k-th lowest lies and how many are still
    wanted from that bin, and so on; four histograms give the key of the threshold and how many of the scores equal to
    it must go. The first call with new (segments, k) copies them to the GPU, later calls find them there.
    """
    rows, cols = scores.shape
    segments = (rows,) if segments is None else tuple(segments)
    counts = (k,) if isinstance(k, int) else tuple(k)
    if sum(segments) != rows or len(counts) != len(segments) or min(segments, default=0) < 0:
        raise ValueError(f"{len(counts)} counts for segments {segments} of a matrix with {rows} rows")
    for part, count in zip(segments, counts, strict=True):
        if not 0 <= count <= part * cols:
            raise ValueError(f"cannot drop {count} of the {part * cols} scores of a segment of {part}x{cols}")
    kernel = kernel or ("radix" if _has_triton(scores) and scores.dtype.itemsize <= 4 else "torch")
    if kernel == "torch":
        drops = []
        for part, count in zip(scores.split(segments), counts, strict=True):
            drops.append(_drop_lowest(part.reshape(1, -1), count).view_as(part))
        return ~torch.cat(drops)
    if kernel != "radix":
        raise ValueError(f"kernel is 'radix' or 'torch', got {kernel!r}")

    scores = scores.float().contiguous()  # exact and order preserving from 16 bits
    keep = torch.empty(rows, cols, dtype=torch.bool, device=scores.device)
    chunks = max(-(-part * cols // _CHUNK) for part in segments)
    if chunks:
        grid = (chunks, len(segments))
        plan = _segment_plan(segments, counts, cols, scores.device)
        histogram = torch.zeros(len(segments), _DIGITS, _BINS, dtype=torch.int32, device=scores.device)
        local = torch.empty(len(segments), chunks, _BINS, dtype=torch.int32, device=scores.device)
        kernels = _kernels()
        sizes = dict(CHUNK=_CHUNK, ALIGN=math.gcd(cols, 16), num_warps=4)  # whole vectors of loads where rows allow it
        with torch.cuda.device_of(scores):
            for digit in range(_DIGITS):
                kernels["histogram"][grid](scores, plan, histogram, local, DIGIT=digit, **sizes)
            earlier = max(1024, 1 << (chunks - 1).bit_length())  # compiled once for all but the largest matrices
            kernels["write"][grid](scores, plan, histogram, local, keep.view(torch.uint8), CHUNKS=earlier, **sizes)
    return keep


@functools.lru_cache(maxsize=256)
def _segment_plan(segments: tuple, counts: tuple, cols: int, device: torch.device) -> torch.Tensor:
    """int32 ``[segments, 3]`` on the device: first entry, end, how many to drop."""
    ends = [sum(segments[: i + 1]) * cols for i in range(len(segments))]
    plan = [[end - part * cols, end, count] for end, part, count in zip(ends, segments, counts, strict=True)]
    plan = torch.tensor(plan, dtype=torch.int32, pin_memory=device.type == "cuda")
    return plan.to(device, non_blocking=True)  # from pinned memory: the host does not wait


def _prune_block_torch(weight, upper, keep, n, m):
    """The same loop in tensor operations, on the transpose so that a column is contiguous, in panels of 32 columns:
    inside a panel a rank-one update per column, then one matrix product for everything to its right."""
    rows, cols = weight.shape
    w = weight.t().clone(memory_format=torch.contiguous_format)  # [cols, rows]
    if m:
        drop = torch.zeros_like(w, dtype=torch.bool)
    else:
        drop = ~keep.bool().t().contiguous()
    err = torch.zeros_like(w)
    diagonal = upper.diagonal()
    step = max(32 // m * m, m) if m else 32
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        for i in range(start, stop):
            if m and i % m == 0:
                score = w[i : i + m].square() / diagonal[i : i + m, None].square()
                drop[i : i + m].scatter_(0, score.argsort(dim=0, stable=True)[: m - n], True)
            err[i] = torch.where(drop[i], w[i], 0.0) / diagonal[i]
            w[i + 1 : stop].addr_(upper[i, i + 1 : stop], err[i], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].t(), err[start:stop], alpha=-1)
    w.masked_fill_(drop, 0.0)
    return w.t().contiguous(), err.t().contiguous(), (~drop).t().contiguous() if m else keep.view(torch.bool)


# ---------------------------------------------------------------------------------------------------------------------
# Triton. Plain functions here, compiled by _kernels(), so that importing this file does not need Triton.
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and _triton_installed()


@functools.cache
def _kernels() -> dict:
    """Import Triton and wrap the functions below; helpers become globals because kernels look names up there."""
    import triton
    import triton.language

    here = globals()
    here["tl"] = triton.language
    for helper in ("_lowest_of_group", "_ordered_bits", "_find_digit"):
        here[helper] = triton.jit(here[helper])
    sources = {"panel": _panel, "rank1": _rank1, "histogram": _digit_histogram, "write": _write_mask}
    return {name: triton.jit(function) for name, function in sources.items()}


def _lowest_of_group(w, diagonal, c, first, N: tl.constexpr, M: tl.constexpr, BC: tl.constexpr):
    """bool [BR, BC], True at the M - N lowest w^2 / diagonal^2 among columns first .. first + M - 1 of each row."""
    score = w * w / (diagonal * diagonal)[None, :]
    left = ((c >= first) & (c < first + M))[None, :] & (score == score)
    drop = left & (c < 0)[None, :]
    for _ in tl.static_range(M - N):
        lowest = tl.min(tl.where(left, score, float("inf")), axis=1)
        column = tl.min(tl.where(left & (score == lowest[:, None]), c[None, :], BC), axis=1)  # ties: the lower index
        chosen = c[None, :] == column[:, None]
        drop = drop | chosen
        left = left & (c[None, :] != column[:, None])
    return drop


def _panel(
    weight,
    upper,
    keep,
    out,
    err,
    rows,
    ld_weight,
    ld_upper,
    ld_keep,
    ld_out,
    N: tl.constexpr,
    M: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BR rows, panels of STEP <= BC columns. The errors of earlier panels are read back from global memory (a cache
    holds them): the program wrote them itself, and the barrier makes them visible to all of its threads."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    c = tl.arange(0, BC)
    for start in range(0, COLS, STEP):
        column = start + c
        in_panel = (c < STEP) & (column < COLS)
        inside = (row < rows) & in_panel[None, :]
        w = tl.load(weight + row * ld_weight + column[None, :], mask=inside, other=0.0)
        # Catch up with all panels to the left. In full float32 ("ieee"): it is cheap, and TF32 would cost digits.
        for before in range(0, start, BK):
            past = before + tl.arange(0, BK)
            e_past = tl.load(err + row * COLS + past[None, :], mask=(row < rows) & (past < start)[None, :], other=0.0)
            u_past = tl.load(
                upper + past[:, None] * ld_upper + column[None, :],
                mask=(past < start)[:, None] & in_panel[None, :],
                other=0.0,
            )
            w -= tl.dot(e_past, u_past, input_precision="ieee")
        if M == 0:
            drop = tl.load(keep + row * ld_keep + column[None, :], mask=inside, other=1) == 0
        else:
            diagonal = tl.load(upper + column * ld_upper + column, mask=in_panel, other=1.0)
            drop = (row < 0) & in_panel[None, :]
        e_panel = tl.zeros([BR, BC], dtype=tl.float32)
        for i in tl.static_range(STEP):
            if M > 0:  # noqa: SIM102  (at compile time: i % 0 must not be seen)
                if i % M == 0:
                    drop = drop | (_lowest_of_group(w, diagonal, c, i, N, M, BC) & inside)
            here = (c == i)[None, :]
            u_row = upper + (start + i) * ld_upper
            u_ii = tl.load(u_row + start + i, mask=start + i < COLS, other=1.0)
            u_right = tl.load(u_row + column, mask=(c > i) & in_panel, other=0.0)
            e = tl.sum(tl.where(here & drop, w, 0.0), axis=1) / u_ii  # 0 where kept: nothing to hand on
            w -= e[:, None] * u_right[None, :]
            e_panel = tl.where(here, e[:, None], e_panel)
        tl.store(out + row * ld_out + column[None, :], tl.where(drop, 0.0, w), mask=inside)
        tl.store(err + row * COLS + column[None, :], e_panel, mask=inside)
        if M > 0:
            tl.store(keep + row * ld_keep + column[None, :], tl.where(drop, 0, 1).to(tl.uint8), mask=inside)
        tl.debug_barrier()


def _rank1(
    weight,
    upper,
    keep,
    out,
    err,
    rows,
    ld_weight,
    ld_upper,
    ld_keep,
    ld_out,
    N: tl.constexpr,
    M: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BR rows of the whole block in registers. Column i is taken out of the tile as a masked sum over the columns."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    c = tl.arange(0, BC)
    inside = (row < rows) & (c < COLS)[None, :]
    w = tl.load(weight + row * ld_weight + c[None, :], mask=inside, other=0.0)
    if M == 0:
        drop = tl.load(keep + row * ld_keep + c[None, :], mask=inside, other=1) == 0
    else:
        diagonal = tl.load(upper + c * ld_upper + c, mask=c < COLS, other=1.0)
        drop = (row < 0) & (c < COLS)[None, :]
    e_block = tl.zeros([BR, BC], dtype=tl.float32)
    for i in range(COLS):
        if M > 0:  # noqa: SIM102
            if i % M == 0:
                drop = drop | (_lowest_of_group(w, diagonal, c, i, N, M, BC) & inside)
        here = (c == i)[None, :]
        u_ii = tl.load(upper + i * ld_upper + i)
        u_right = tl.load(upper + i * ld_upper + c, mask=(c > i) & (c < COLS), other=0.0)
        e = tl.sum(tl.where(here & drop, w, 0.0), axis=1) / u_ii
        w -= e[:, None] * u_right[None, :]
        e_block = tl.where(here, e[:, None], e_block)
    tl.store(out + row * ld_out + c[None, :], tl.where(drop, 0.0, w), mask=inside)
    tl.store(err + row * COLS + c[None, :], e_block, mask=inside)
    if M > 0:
        tl.store(keep + row * ld_keep + c[None, :], tl.where(drop, 0, 1).to(tl.uint8), mask=inside)


def _ordered_bits(x):
    """uint32 that compares like the float: flip all bits of negatives and the sign bit of the rest."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == 0.0, 0, bits)  # -0.0 ties with 0.0
    bits = tl.where(x != x, 0x7FFFFFFF, bits)  # NaN above infinity, whatever its sign
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -0x80000000).to(tl.uint32, bitcast=True)


def _find_digit(histogram, wanted):
    """The bin that holds the ``wanted``-th lowest (counting from 1), and how many of that bin are wanted."""
    bins = tl.arange(0, 256)
    count = tl.load(histogram + bins)
    below = tl.cumsum(count, 0) - count
    hit = (below < wanted) & (wanted <= below + count)
    return tl.sum(tl.where(hit, bins, 0), 0).to(tl.uint32), wanted - tl.sum(tl.where(hit, below, 0), 0)


def _digit_histogram(scores, plan, histogram, local, DIGIT: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr):
    """Count the DIGIT-th eight bits of the keys whose higher digits are those of the threshold. Of the last digit each
    program also leaves its own counts, from which :func:`_write_mask` knows how many ties precede its chunk."""
    chunk, segment = tl.program_id(0), tl.program_id(1)
    first = tl.multiple_of(tl.load(plan + segment * 3), ALIGN)
    end = tl.multiple_of(tl.load(plan + segment * 3 + 1), ALIGN)
    wanted = tl.load(plan + segment * 3 + 2)
    histogram += segment * 1024
    offset = first + chunk * CHUNK + tl.arange(0, CHUNK)
    key = _ordered_bits(tl.load(scores + offset, mask=offset < end, other=0.0))
    match = offset < end
    for d in tl.static_range(DIGIT):
        digit, wanted = _find_digit(histogram + d * 256, wanted)
        match = match & (((key >> (24 - 8 * d)) & 255) == digit)
    bins = tl.arange(0, 256)
    count = tl.histogram(((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32), 256, mask=match)
    tl.atomic_add(histogram + DIGIT * 256 + bins, count, mask=count > 0, sem="relaxed")
    if DIGIT == 3:
        tl.store(local + (segment * tl.num_programs(0) + chunk) * 256 + bins, count)


def _write_mask(scores, plan, histogram, local, keep, CHUNK: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr):
    """Drop every key below the threshold, and of the keys equal to it the first ``wanted`` in index order."""
    chunk, segment = tl.program_id(0), tl.program_id(1)
    first = tl.multiple_of(tl.load(plan + segment * 3), ALIGN)
    end = tl.multiple_of(tl.load(plan + segment * 3 + 1), ALIGN)
    wanted = tl.load(plan + segment * 3 + 2)
    threshold = tl.zeros([], dtype=tl.uint32)
    last = tl.zeros([], dtype=tl.uint32)
    for d in tl.static_range(4):
        last, wanted = _find_digit(histogram + (segment * 4 + d) * 256, wanted)
        threshold = (threshold << 8) | last
    earlier = tl.arange(0, CHUNKS)
    counts = local + (segment * tl.num_programs(0) + earlier) * 256 + last.to(tl.int32)
    ties_before = tl.sum(tl.load(counts, mask=earlier < chunk, other=0), 0)
    offset = first + chunk * CHUNK + tl.arange(0, CHUNK)
    key = _ordered_bits(tl.load(scores + offset, mask=offset < end, other=0.0))
    tie = ((key == threshold) & (offset < end)).to(tl.int32)
    rank = ties_before + tl.cumsum(tie, 0) - tie
    drop = (key < threshold) | ((tie == 1) & (rank < wanted))
    tl.store(keep + offset, tl.where(drop, 0, 1).to(tl.uint8), mask=offset < end)
