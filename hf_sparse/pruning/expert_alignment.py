"""Alignment: the hidden units of one expert in the order of another's, so that their weights can be averaged.

    f(x) = sum over units i of  down[:, i] * act(gate[i] x) * (up[i] x)

The sum does not care in which order its terms come, so two experts that compute the same thing may hold their units in
different orders, and their average would compute nothing. Unit i of an expert is one vector: its row of gate, its row of up
(with their biases) and its column of down. The order wanted is the one-to-one assignment of units to the reference's units
that makes the summed squared distance of these vectors least ("weight matching", arxiv.org/abs/2209.04836); as orders change
no norms, that is the assignment with the largest summed inner product.

    gate_up_proj [E, 2I, H]   gate first, then up          down_proj [E, H, I]
    gate_up_proj [E, H, 2I]   is_transposed                down_proj [E, I, H]
    gate and up alternate     not is_concatenated          (gpt_oss, which has biases as well)
"""

import numpy as np
import torch
from torch import nn

__all__ = ["align_expert", "assign", "check_alignable"]


def assign(cost: np.ndarray) -> np.ndarray:
    """The assignment of rows to columns with the least summed cost: ``columns [n]``, row i to ``columns[i]``.

    Shortest augmenting paths (Jonker and Volgenant, 1987): rows that cannot have their cheapest column for themselves are
    assigned one after another, each along the cheapest path of reassignments. Exact; 0.2 s for 768 units on one CPU core.

    Args:
        cost: ``[n, n]``, finite.

    Raises:
        ValueError: not a square matrix of finite numbers.
    """
    cost = np.asarray(cost, dtype=np.float64)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not np.isfinite(cost).all():
        raise ValueError(f"an assignment needs a square matrix of finite costs, got one of shape {cost.shape}")
    size = len(cost)
    column_price = cost.min(axis=0)
    row_price = (cost - column_price).min(axis=1)
    column_of, row_of = np.full(size, -1), np.full(size, -1)
    for row, column in zip(*np.nonzero(cost - column_price - row_price[:, None] <= 0), strict=True):
        if column_of[row] < 0 and row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for start in np.nonzero(column_of < 0)[0]:
        ahead = np.full(size, np.inf)  # length of the cheapest path to each column that was not visited yet
        came_from = np.full(size, -1)
        visited, lengths = [], []
        row, low = start, 0.0
        while True:
            through = cost[row] - column_price + (low - row_price[row])
            shorter = through < ahead
            shorter[visited] = False
            ahead[shorter] = through[shorter]
            came_from[shorter] = row
            column = int(ahead.argmin())
            low = ahead[column]
            if row_of[column] < 0:
                break
            visited.append(column)
            lengths.append(low)
            ahead[column] = np.inf
            row = row_of[column]
        row_price[start] += low  # prices with which every assigned pair stays the cheapest of its row
        slack = low - np.array(lengths)
        row_price[row_of[visited]] += slack
        column_price[visited] -= slack
        row = -1
        while row != start:  # back along the path, each row takes the column that was reached from it
            row = came_from[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return column_of


def check_alignable(experts: nn.Module, name: str) -> None:
    """Raises ValueError unless it is known which rows of these experts' weights belong to one hidden unit."""
    try:
        parts = _parts(experts)
    except ValueError as error:
        raise ValueError(f"the hidden units of {name} ({type(experts).__name__}) cannot be aligned: {error}") from error
    if len({len(rows[0]) for _, _, rows in parts}) != 1:
        sizes = ", ".join(f"{key} {tuple(getattr(experts, key).shape)}" for key, _, _ in parts)
        raise ValueError(f"the hidden units of {name} cannot be aligned: its weights disagree on how many: {sizes}")


@torch.no_grad()
def align_expert(experts: nn.Module, expert: int, reference: int) -> torch.Tensor:
    """Puts the hidden units of one expert in the order of another's, in place; what it computes stays the same.

    Returns:
        The order ``[I]``: unit i is now the former unit ``order[i]``.
    """
    parts = _parts(experts)
    units = [torch.cat([_rows(experts, *part, which) for part in parts], dim=1) for which in (reference, expert)]
    cost = -(units[0] @ units[1].T)
    order = torch.as_tensor(assign(cost.double().cpu().numpy()), device=cost.device)
    for key, dim, rows in parts:
        weight = getattr(experts, key).data[expert]
        rows = rows.to(weight.device)
        where = torch.empty(rows.numel(), dtype=torch.int64, device=weight.device)
        where[rows.flatten()] = rows[:, order].flatten()
        weight.copy_(weight.index_select(dim, where))
    return order


def _parts(experts: nn.Module) -> list[tuple[str, int, torch.Tensor]]:
    """``(parameter, its dimension of hidden units in one expert, indices [1 or 2, I] of the units there)``."""
    own = dict(experts.named_parameters(recurse=False))
    transposed = getattr(experts, "is_transposed", None)
    interleaved = not getattr(experts, "is_concatenated", True)
    if transposed is None:  # Llama 4 has no such attribute: hidden states are multiplied from the left
        if "gate_up_proj" not in own or own["gate_up_proj"].shape[2] != 2 * own["down_proj"].shape[1]:
            raise ValueError("they do not say whether their weights are transposed")
        transposed = True
    parts = []
    for key, value in own.items():
        first, matrix = key.split("_proj")[0], value.dim() == 3
        if first in ("gate_up", "gate", "up"):
            dim = 1 if matrix and transposed else 0
            size = value.shape[dim + 1]
            indices = torch.arange(size)
            if first == "gate_up":
                indices = indices.view(-1, 2).T if interleaved else indices.view(2, -1)
            parts.append((key, dim, indices.reshape(-1, indices.shape[-1])))
        elif first == "down" and matrix:
            dim = 0 if transposed else 1
            parts.append((key, dim, torch.arange(value.shape[dim + 1]).view(1, -1)))
        elif first != "down":  # a bias of down has no hidden units
            raise ValueError(f"it is not known what {key} {tuple(value.shape)} does")
    if {key.split("_proj")[0] for key, _, _ in parts} not in (
        {"gate_up", "down"},
        {"gate", "up", "down"},
        {"up", "down"},
    ):
        raise ValueError(f"they have {', '.join(own)}, not gate_up_proj and down_proj")
    return parts


def _rows(experts: nn.Module, key: str, dim: int, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """One expert's weights of one parameter by hidden unit, ``[I, ...]`` in float32 or wider."""
    weight = getattr(experts, key).data[expert]
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.unsqueeze(1) if weight.dim() == 1 else weight.movedim(dim, 0)
    return torch.cat([weight[one.to(weight.device)] for one in rows], dim=1)
