"""Methods of sparse training: rows of one table, not a family of classes.

A row says which weights are kept at the start, by what score weights are dropped and grown at an update, which shape the
zeros take, how the sparsity is shared among parameters, and when all that happens. The defaults are those of the papers;
``SparsityConfig(method=..., pattern=..., allocation=..., schedule={...})`` overrides any of them by name.

| method     | start     | drop           | grow     | pattern         | allocation | paper             |
|------------|-----------|----------------|----------|-----------------|------------|-------------------|
| `static`   | random    |                |          | unstructured    | uniform    | SPDF, 2303.10464  |
| `set`      | random    | magnitude      | random   | unstructured    | erk        | 1707.04780        |
| `rigl`     | random    | magnitude      | gradient | unstructured    | erk        | 1911.11134        |
| `gmp`      | magnitude | magnitude      |          | unstructured    | uniform    | 1710.01878        |
| `granet`   | random    | magnitude      | gradient | unstructured    | erk        | 2106.10404        |
| `srigl`    | random    | magnitude      | gradient | constant-fan-in | erk        | 2305.02299        |
| `sr-ste`   | magnitude | magnitude      | (dense)  | 2:4             | uniform    | 2102.04010        |
| `top-kast` | magnitude | magnitude      | (dense)  | unstructured    | uniform    | 2106.03517        |
| `chts`     | random    | soft-magnitude | topology | unstructured    | uniform    | 2501.19107        |

``sr-ste`` and ``top-kast`` keep a dense copy of the weights and train it through the sparse ones; all others train the kept
weights only. ``static`` takes any start, ``zeros`` among them: the zeros the model already has.
"""

from dataclasses import dataclass, field
from types import MappingProxyType

from hf_sparse.schedules import SCHEDULES, as_step

__all__ = ["METHODS", "STARTS", "Method", "schedule_options"]

STARTS = ("random", "magnitude", "zeros")  # by name; any callable saliency that needs no data works too


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        start: the saliency of the first mask, a name of :data:`STARTS`.
        drop: what is dropped first at an update: ``magnitude`` or ``soft-magnitude``; None: nothing ever moves.
        grow: what is grown: ``random``, ``gradient``, ``topology``; None: nothing.
        pattern: the default pattern.
        allocation: the default allocation.
        schedule: its options and their defaults: ``every``, ``begin``, ``end`` (a step, or a share of training),
            ``drop_fraction`` and ``anneal`` (how it shrinks), ``initial_sparsity`` and ``ramp`` (how sparsity grows),
            ``scope`` (pruned down in every ``layer`` by itself, or by one ``global`` threshold), and what only this
            method knows.
        dense_weights: a dense copy of the weights is trained through the sparse ones.
        paper: where it comes from.
    """

    start: str
    drop: str | None = None
    grow: str | None = None
    pattern: str = "unstructured"
    allocation: str = "uniform"
    schedule: MappingProxyType = field(default_factory=lambda: MappingProxyType({}))
    dense_weights: bool = False
    paper: str = ""

    @property
    def is_dynamic(self) -> bool:
        """Whether masks move during training."""
        return "every" in self.schedule

    @property
    def needs_gradient(self) -> bool:
        """Whether an update looks at the gradient of the pruned weights."""
        return self.grow == "gradient"


def _row(*columns: str | None, dense_weights: bool = False, **schedule) -> Method:
    start, drop, grow, pattern, allocation, paper = columns
    return Method(start, drop, grow, pattern, allocation, MappingProxyType(schedule), dense_weights, paper)


_MOVE = dict(every=100, begin=0, end=0.75, drop_fraction=0.3, anneal="cosine")

METHODS: dict[str, Method] = {
    "static": _row("random", None, None, "unstructured", "uniform", "2303.10464"),
    "set": _row(
        *("random", "magnitude", "random", "unstructured", "erk", "1707.04780"),
        **{**_MOVE, "end": 1.0, "anneal": "constant"},
    ),
    "rigl": _row("random", "magnitude", "gradient", "unstructured", "erk", "1911.11134", **_MOVE),
    "gmp": _row(
        *("magnitude", "magnitude", None, "unstructured", "uniform", "1710.01878"),
        **dict(every=100, begin=0, end=0.75, initial_sparsity=0.0, ramp="cubic", scope="layer"),
    ),
    "granet": _row(
        *("random", "magnitude", "gradient", "unstructured", "erk", "2106.10404"),
        **dict(every=1000, begin=0, end=1.0, drop_fraction=0.5, anneal="cosine", final_drop_fraction=0.005),
        **dict(initial_sparsity=0.5, ramp="cubic", ramp_end=0.7, scope="global"),
    ),
    "srigl": _row(
        *("random", "magnitude", "gradient", "constant-fan-in", "erk", "2305.02299"),
        **dict(_MOVE, gamma_sal=0.3),
    ),
    "sr-ste": _row(
        *("magnitude", "magnitude", None, "2:4", "uniform", "2102.04010"),
        **dict(every=1, begin=0, end=1.0, decay=2e-4),
        dense_weights=True,
    ),
    "top-kast": _row(
        *("magnitude", "magnitude", None, "unstructured", "uniform", "2106.03517"),
        **dict(every=100, begin=0, end=1.0, backward_sparsity=0.5, strength=1e-4),
        dense_weights=True,
    ),
    "chts": _row(
        *("random", "soft-magnitude", "topology", "unstructured", "uniform", "2501.19107"),
        **dict(_MOVE, initial_temperature=1.0, final_temperature=3.0),
    ),
}


def schedule_options(method: str, given: dict) -> dict:
    """The schedule of a method with what the user changed, checked.

    Raises:
        ValueError: an unknown method or option (with what exists), or a value out of its range.
    """
    row = METHODS[method]
    for name in given:
        if name not in row.schedule:
            known = ", ".join(row.schedule) or "none: its masks never change"
            raise ValueError(f"method {method!r} has no schedule option {name!r}; it has {known}")
    options = dict(row.schedule) | dict(given)
    for name in ("anneal", "ramp"):
        if name in options and options[name] not in SCHEDULES:
            raise ValueError(f"unknown schedule {options[name]!r} for {name}; known are {', '.join(SCHEDULES)}")
    if options.get("ramp") == "constant":
        raise ValueError("ramp='constant' never reaches the sparsity; choose linear, cubic, cosine or exponential")
    if options.get("scope", "layer") not in ("layer", "global"):
        raise ValueError(f"scope is 'layer' or 'global', got {options['scope']!r}")
    for name in ("drop_fraction", "final_drop_fraction", "initial_sparsity", "backward_sparsity", "gamma_sal"):
        value = options.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is a fraction in [0, 1], got {value!r}")
    for name in ("decay", "strength", "initial_temperature", "final_temperature"):
        value = options.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0.0:
            raise ValueError(f"{name} is a number >= 0, got {value!r}")
    if "every" in options:
        every = options["every"]
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is a whole number of optimizer steps, at least 1, got {every!r}")
        _check_order(options["begin"], options["end"])
        _check_order(options["begin"], options.get("ramp_end", options["end"]))
    return options


def _check_order(begin: float, end: float) -> None:
    """Two steps, or two shares, can be compared before the length of training is known."""
    for name, value in (("begin", begin), ("end", end)):
        as_step(value, 1, name)  # raises for what is neither
    same_kind = isinstance(begin, int) == isinstance(end, int) or begin == 0
    if same_kind and end <= begin:
        raise ValueError(f"the schedule ends ({end!r}) before it begins ({begin!r}), or at once: no mask would change")
