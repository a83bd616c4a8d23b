"""SparsityConfig: the one contract that every stage reads and writes.

It says which parameters are sparse (targets, ignore), in what shape (pattern), how much (sparsity, allocation, overrides)
and how the zeros were chosen (saliency and its options). It travels inside ``config.json`` under the key ``hf_sparse``,
so a checkpoint tells every later stage what its zeros mean, and it reads and writes YAML or JSON for people:

    config = SparsityConfig(sparsity=0.5, saliency="sparsegpt")
    config = SparsityConfig(pattern="2:4", saliency="wanda", overrides={r"re:.*down_proj": 0.0})
    config = SparsityConfig(sparsity=0.75, method="rigl", schedule={"every": 500})     # for training, see hf_sparse.methods
    SparsityConfig.from_dict(config.to_dict()) == config
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sparse import patterns, saliency
from hf_sparse.allocation import ALLOCATIONS
from hf_sparse.methods import METHODS, STARTS, schedule_options

__all__ = ["CONFIG_KEY", "CONFIG_VERSION", "SparsityConfig"]

CONFIG_KEY = (
    "hf_sparse"  # our key in config.json; not `sparsity_config`, which serving engines read as compressed-tensors'
)
CONFIG_VERSION = 1
_DEFAULT_SPARSITY = 0.5


@dataclass(kw_only=True)
class SparsityConfig:
    """What is sparse, in which shape, how much, and how it was chosen.

    Args:
        sparsity: fraction of zeros over all targets, in [0, 1). Default 0.5; an n:m pattern fixes it to 1 - n/m.
        pattern: see :mod:`hf_sparse.patterns`: ``unstructured``, ``row``, ``n:m``, ``RxC``, ``constant-fan-in``, ``channel``.
            Default: the method's; else the comparison group of the saliency's paper (``row`` for wanda, ``unstructured``
            for the others).
        saliency: a name of :data:`hf_sparse.saliency.SALIENCIES` or a solver (``sparsegpt``, ``alps``), or a callable
            ``(weight [out, in], statistics) -> scores [out, in]``. Default ``magnitude``. With a training method: what
            chooses the first mask, ``random``, ``magnitude`` or ``zeros`` (those the model has); default the method's.
        method: how to train with zeros, a name of :data:`hf_sparse.methods.METHODS` (``static``, ``set``, ``rigl``,
            ``gmp``, ...); None for one-shot pruning.
        schedule: when masks change, options of the method, e.g. ``{"every": 500, "end": 0.8, "drop_fraction": 0.3}``.
            A whole number is an optimizer step, a float up to 1 a share of training.
        allocation: ``uniform``, ``erk`` or ``owl``, or a dict of ``{name or re: pattern: sparsity}`` for every target.
            Default: the method's, else ``uniform``.
        allocation_options: keyword arguments of the allocation, e.g. ``{"lam": 0.08, "outlier": 5.0}`` for OWL.
        overrides: ``{name or re: pattern: sparsity or pattern string}`` for some targets; they are left out of the average.
        targets: which parameters; names, ``re:`` patterns or class names. Default: every linear, convolution and fused
            expert weight that is not an embedding, output head or router.
        ignore: targets to leave dense, in the same grammar.
        repair: re-fit the kept weights by least squares after the mask is chosen (needs calibration data).
        permute: for n:m, reorder the hidden units of every MLP so that the pattern costs less (RIA's channel permutation).
        block_size: columns per block of the SparseGPT solve.
        damp: ridge added to a Hessian's diagonal, as a fraction of its mean.
        seed: seed of all randomness: the ``random`` saliency, and what SET and CHTs grow.
        provenance: how the checkpoint came to be (base model, calibration data, command, versions); free-form, JSON.

    Raises:
        ValueError: a value is out of range, contradicts another, or a field is unknown.
    """

    sparsity: float | None = None
    pattern: str | None = None
    saliency: str | Callable | None = None
    method: str | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    allocation: str | dict[str, float] | None = None
    allocation_options: dict[str, float] = field(default_factory=dict)
    overrides: dict[str, float | str] = field(default_factory=dict)
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    repair: bool = False
    permute: bool = False
    block_size: int = 128
    damp: float = 0.01
    seed: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.method is not None:
            self._fill_in_method()
        elif self.schedule:
            raise ValueError(f"schedule={self.schedule!r} needs a training method, one of {', '.join(METHODS)}")
        self.saliency = self.saliency or "magnitude"
        self.allocation = self.allocation or "uniform"
        if self.method is None or self.saliency != "zeros":
            saliency.needs(self.saliency)  # raises for an unknown name
        pattern = patterns.parse(self.pattern or saliency.default_pattern(self.saliency))
        self.pattern = str(pattern)
        implied = pattern.implied_sparsity
        if self.sparsity is None:
            self.sparsity = _DEFAULT_SPARSITY if implied is None else implied
        self.sparsity = _checked_sparsity(self.sparsity, "sparsity")
        if implied is not None and abs(self.sparsity - implied) > 1e-6:
            raise ValueError(
                f"pattern {pattern} keeps {pattern.n} of {pattern.m} weights and so always has sparsity {implied:g}; "
                f"leave sparsity out or choose a pattern for {self.sparsity:g}"
            )
        if implied is not None:
            self.sparsity = implied
        if self.method is not None:
            initial = schedule_options(self.method, self.schedule).get("initial_sparsity", 0.0)
            if self.sparsity and initial > self.sparsity:
                raise ValueError(
                    f"initial_sparsity {initial:g} is more than the sparsity at the end, {self.sparsity:g}, and gradual "
                    f"pruning revives nothing; give schedule={{'initial_sparsity': ...}} at most {self.sparsity:g}"
                )
        self.ignore = [] if self.ignore is None else self.ignore  # an empty entry in YAML
        self.overrides = {} if self.overrides is None else self.overrides
        for name in ("targets", "ignore"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} is a list of names and patterns, got the string {value!r}; write [{value!r}]")
            if value is not None:
                setattr(self, name, list(value))
        for entry in [*(self.targets or []), *self.ignore, *self.overrides]:
            _checked_regex(entry)
        for name, value in self.overrides.items():
            if isinstance(value, str):
                patterns.parse(value)
            elif _checked_sparsity(value, f"the override of {name!r}") > 0 and implied is not None:
                raise ValueError(
                    f"the override of {name!r} asks for sparsity {value:g}, but pattern {pattern} fixes it; override with a "
                    f"pattern such as '1:{pattern.m}' or 'unstructured', or with 0 to leave it dense"
                )
        if isinstance(self.allocation, Mapping):
            self.allocation = dict(self.allocation)
            for name, value in self.allocation.items():
                _checked_regex(name)
                _checked_sparsity(value, f"the allocation of {name!r}")
        elif self.allocation not in ALLOCATIONS:
            hint = _near(self.allocation, ALLOCATIONS, "known are a dict of sparsities,")
            raise ValueError(f"unknown allocation {self.allocation!r}{hint}")
        options = () if isinstance(self.allocation, dict) else ALLOCATIONS[self.allocation]
        for name in self.allocation_options:
            if name not in options:
                what = "of a dict" if isinstance(self.allocation, dict) else repr(self.allocation)
                raise ValueError(f"allocation {what} has no option {name!r}; it has {', '.join(options) or 'none'}")
        for name, value in self.allocation_options.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"the option {name!r} of the allocation is a number >= 0, got {value!r}")
        if self.permute and implied is None:
            raise ValueError(
                f"permute reorders channels for an n:m pattern; with pattern {self.pattern!r} it has no effect"
            )
        for name in ("block_size", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name == "block_size"):
                raise ValueError(f"{name} is a whole number >= {int(name == 'block_size')}, got {value!r}")
        if isinstance(self.damp, bool) or not isinstance(self.damp, (int, float)) or not self.damp >= 0:
            raise ValueError(f"damp is a number >= 0, a share of the Hessian's diagonal, got {self.damp!r}")
        if self.targets == []:
            raise ValueError("targets=[] selects nothing; leave it out for every linear layer, or name some")

    def _fill_in_method(self) -> None:
        """The method's row where the user said nothing, and what does not go together with training."""
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}{_near(self.method, METHODS, 'known are')}")
        row = METHODS[self.method]
        self.schedule = dict(self.schedule or {})
        schedule_options(self.method, self.schedule)  # raises for what is unknown or out of range
        self.saliency = self.saliency or row.start
        self.pattern = self.pattern or row.pattern
        self.allocation = self.allocation or row.allocation
        pattern = patterns.parse(self.pattern)
        if row.is_dynamic and pattern.implied_sparsity is not None and self.method != "sr-ste":
            raise ValueError(
                f"method {self.method!r} moves single weights or changes the sparsity, pattern {pattern} fixes both in every "
                f"group of {pattern.m}; train n:m with method 'sr-ste', or 'static' for a mask that stays"
            )
        if (row.grow is not None or self.method == "top-kast") and self.pattern != row.pattern:
            raise ValueError(
                f"method {self.method!r} moves {'inputs of a neuron' if self.method == 'srigl' else 'single weights'}: its "
                f"pattern is {row.pattern!r}, not {self.pattern!r}; 'static' and 'gmp' take any pattern"
            )
        if self.saliency == "zeros" and self.method != "static":
            raise ValueError(
                f"saliency 'zeros' keeps the zeros a model has; method {self.method!r} chooses its own: leave it out"
            )
        if (
            self.saliency in saliency.SALIENCIES
            and saliency.needs(self.saliency) != "nothing"
            or self.saliency in saliency.SOLVERS
        ):
            raise ValueError(
                f"saliency {self.saliency!r} looks at data, which a training method does not have; prune() the model first and "
                f"train with method 'static' and saliency 'zeros'. The starts are {', '.join(STARTS)}"
            )
        if self.allocation == "owl":
            raise ValueError("allocation 'owl' looks at data; prune() the model first and train with saliency 'zeros'")
        for name, value in (self.overrides or {}).items():
            if not isinstance(value, str) or not row.is_dynamic or self.method == "sr-ste":
                continue
            if str(patterns.parse(value)) != row.pattern and (self.method != "gmp" or ":" in value):
                raise ValueError(
                    f"the override of {name!r} asks for pattern {value}, which method {self.method!r} cannot move; override "
                    "its sparsity, or ignore it"
                )
        for name in ("repair", "permute"):
            if getattr(self, name):
                raise ValueError(f"{name} belongs to one-shot pruning; with method {self.method!r} it has no effect")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the format version. A callable saliency is recorded by its qualified name."""
        content = dataclasses.asdict(self)
        if callable(self.saliency):
            content["saliency"] = f"{self.saliency.__module__}.{self.saliency.__qualname__}"
        return {"version": CONFIG_VERSION, **content}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SparsityConfig":
        """The config a dict describes.

        Raises:
            ValueError: an unknown field (with the near match), or a config written by a newer version.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"a sparsity config is a mapping of fields, got {type(content).__name__}")
        content = dict(content)
        version = content.pop("version", CONFIG_VERSION)
        if not isinstance(version, int) or version > CONFIG_VERSION:
            raise ValueError(
                f"this sparsity config has version {version}, but this hf_sparse reads up to version {CONFIG_VERSION}; "
                "upgrade it with `pip install -U hf-sparse`"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for name in content:
            if name not in known:
                raise ValueError(f"unknown field {name!r} in a sparsity config{_near(name, known, 'the fields are')}")
        return cls(**content)

    @classmethod
    def from_model_config(cls, config) -> "SparsityConfig | None":
        """The sparsity config a transformers config carries, or None."""
        content = getattr(config, CONFIG_KEY, None)
        return None if content is None else cls.from_dict(content)

    @classmethod
    def from_file(cls, path: str | Path) -> "SparsityConfig":
        """The config in a ``.yaml``/``.yml`` or ``.json`` file.

        Raises:
            FileNotFoundError, ValueError: no such file, or it is not a sparsity config.
        """
        return cls.from_dict(read_fields(path))

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def read_fields(path: str | Path) -> Any:
    """What a ``.yaml``/``.yml`` or ``.json`` file says, without the defaults it leaves open; not checked."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no sparsity config at {path}")
    import yaml

    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error


def _checked_sparsity(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is a number in [0, 1), got {value!r}")
    if not 0.0 <= value < 1.0:
        hint = f"; did you mean {value / 100:g}?" if 1.0 < value < 100.0 else ""
        raise ValueError(f"{what} is the fraction of zeros and lies in [0, 1), got {value:g}{hint}")
    return float(value)


def _near(name, known, otherwise: str) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; {otherwise} {', '.join(known)}"


def _checked_regex(entry: str) -> None:
    if not isinstance(entry, str):
        raise ValueError(f"targets are named by strings, got {entry!r}")
    if entry.startswith("re:"):
        try:
            re.compile(entry[3:])
        except re.error as error:
            raise ValueError(f"{entry!r} is not a valid regular expression: {error}") from error
