"""Loading a causal language model and its tokenizer: a Hub id, a directory, or a GGUF file.

transformers reads GGUF files but marks the result as quantized, although every weight has been expanded; such a model can
neither be saved nor trained. Its tensors are moved into a plain model of the same config here.
"""

import importlib.util
import struct
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["load_model", "load_tokenizer"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(source: str, dtype: str = "auto", trust_remote_code: bool = False):
    """The model, on the CPU, in evaluation mode.

    Args:
        source: Hub id, directory or ``.gguf`` file.
        dtype: ``auto`` (as stored; GGUF: float32), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"dtype is auto, {', '.join(_DTYPES)}, got {dtype!r}")
    _check_exists(source)
    if _is_gguf(source):
        return _load_gguf(Path(source), _DTYPES.get(dtype, torch.float32)).eval()
    chosen = _DTYPES.get(dtype, "auto")
    return AutoModelForCausalLM.from_pretrained(source, dtype=chosen, trust_remote_code=trust_remote_code).eval()


def load_tokenizer(source: str, trust_remote_code: bool = False):
    """The tokenizer of :func:`load_model`'s source."""
    from transformers import AutoTokenizer

    _check_exists(source)
    if _is_gguf(source):
        with _reading_gguf(Path(source)):
            return AutoTokenizer.from_pretrained(str(Path(source).parent), gguf_file=Path(source).name)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def _is_gguf(source: str) -> bool:
    return source.endswith(".gguf")


def _check_exists(source: str) -> None:
    path = Path(source)
    if _is_gguf(source) and not path.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if path.is_file() and not _is_gguf(source):
        raise ValueError(f"{source} is a file; a model is a Hub id, a directory with config.json, or a .gguf file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{source} has no config.json and so is not a model directory")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"no such directory: {source}")


@contextmanager
def _reading_gguf(path: Path):
    """Errors of a missing package, of a file that is no GGUF and of a damaged one, in words."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a GGUF file needs the gguf package: pip install 'hf-sparse[gguf]'")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"{path} cannot be read as a GGUF file; is it complete? {error!r}") from error


def _load_gguf(path: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    with _reading_gguf(path):
        expanded = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    config = expanded.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(expanded.state_dict(), assign=True)  # the tensors move, nothing is copied
    plain.tie_weights()
    plain.generation_config = expanded.generation_config
    config._name_or_path = path.stem
    return plain
