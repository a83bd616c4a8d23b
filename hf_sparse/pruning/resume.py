"""Continuing an interrupted run: finished layers on disk, and a fingerprint of the run they belong to.

Only pruned weights are kept. Hidden states are not: running the calibration data through the finished layers again gives
the same ones, so a continued run ends with the same weights as an uninterrupted one.
"""

import hashlib
import json
from pathlib import Path

from torch import nn

from hf_sparse.atomic import atomic_directory
from hf_sparse.config import SparsityConfig

__all__ = ["FinishedLayers", "fingerprint"]


class FinishedLayers:
    """The finished layers of one run in the directory ``path``.

    Raises:
        ValueError: the directory holds another run, or something else altogether.
    """

    def __init__(self, path: str | Path, model: nn.Module, config: SparsityConfig, batches: list[dict]):
        self.path = Path(path)
        content = {key: value for key, value in config.to_dict().items() if key != "provenance"}
        mark = fingerprint(model, batches, content)
        file = self.path / "run.json"
        if file.is_file():
            earlier = json.loads(file.read_text())
            different = [key for key, value in mark.items() if earlier.get(key) != value]
            if different:
                raise ValueError(
                    f"{self.path} holds the progress of another run: its {' and '.join(different)} differ. "
                    "Repeat that run's arguments to continue it, or remove the directory to start anew"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} is there and holds no progress of a run; choose another directory")
        else:
            with atomic_directory(self.path, overwrite=True) as directory:
                (directory / "run.json").write_text(json.dumps(mark, indent=1))

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}"

    def load(self, index: int, model: nn.Module, errors: dict, notes: dict, layer_errors: dict) -> bool:
        """Restores a finished layer's weights and facts; False if it is not finished."""
        from safetensors.torch import load_file

        directory = self._layer(index)
        if not directory.is_dir():
            return False
        for name, tensor in load_file(directory / "weights.safetensors").items():
            model.get_parameter(name).data.copy_(tensor)
        facts = json.loads((directory / "facts.json").read_text())
        errors.update(facts["errors"])
        notes.update(facts["notes"])
        layer_errors[index] = facts["layer_error"]
        return True

    def save(
        self, index: int, names: list[str], model: nn.Module, errors: dict, notes: dict, layer_errors: dict
    ) -> None:
        """Keeps a finished layer; it is there whole or not at all."""
        from safetensors.torch import save_file

        with atomic_directory(self._layer(index), overwrite=True) as directory:
            tensors = {name: model.get_parameter(name).data.contiguous().cpu() for name in names}
            save_file(tensors, directory / "weights.safetensors")
            facts = {
                "errors": {name: errors[name] for name in names if name in errors},
                "notes": {name: notes[name] for name in names if name in notes},
                "layer_error": layer_errors[index],
            }
            (directory / "facts.json").write_text(json.dumps(facts))


def fingerprint(model: nn.Module, batches: list[dict], content: dict) -> dict[str, str]:
    """What tells one run from another: its settings, its data, its model."""
    data = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            data.update(batch[key].contiguous().cpu().numpy().tobytes())
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {parameter.dtype}".encode())
        weights.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return {
        "config": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "calibration data": data.hexdigest(),
        "model": weights.hexdigest(),
    }
