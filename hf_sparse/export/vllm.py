"""vLLM: a stock directory, dense with zeros, and nothing in it that vLLM would stumble over.

    export("smollm2-50", "vllm", "smollm2-vllm")        then: vllm serve smollm2-vllm

vLLM reads config.json, the safetensors files and the tokenizer as transformers does. What it rejects is left out:

- ``quantization_config`` and ``compression_config``: with compressed-tensors' sparsity in them vLLM raises
  ("Sparsity support has been removed"; for 2:4 NotImplementedError), and files such as hf_quant_config.json;
- every tensor that the model class does not have: masks of a training are refused, packed weights are unpacked first.

Our own key in config.json stays (``hf_sparse``, not ``sparsity_config``): of the keys it does not know, vLLM 0.33 asks for
the two above, at the top and in ``text_config``, and for nothing else.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hf_sparse.atomic import require_free_space
from hf_sparse.export import Exporter
from hf_sparse.export.source import Source

__all__ = ["VLLM", "write_vllm"]

_REJECTED_KEYS = ("quantization_config", "compression_config", "sparsity_config")
_REJECTED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A process of its own that has never heard of hf_sparse: what stock transformers makes of the directory.
_STOCK_LOADER = """
import json, pathlib, sys, torch, transformers
from safetensors import safe_open
folder = pathlib.Path(sys.argv[1])
architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
loader = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
model, info = loader.from_pretrained(folder, dtype="auto", output_loading_info=True)
assert "hf_sparse" not in sys.modules
loaded, same, different, other = model.state_dict(), 0, [], 0
for file in sorted(folder.glob("*.safetensors")):
    with safe_open(file, "pt") as reader:
        for name in reader.keys():
            if name not in loaded:  # experts, which transformers stacks
                other += 1
            elif torch.equal(loaded[name], reader.get_tensor(name)):
                same += 1
            else:
                different.append(name)
problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
print(json.dumps({"class": type(model).__name__, "same": same, "other": other, "different": different, **problems}))
"""


def check_vllm(source: Source) -> None:
    if not source.config.get("architectures"):
        raise ValueError("config.json states no architectures, by which vLLM chooses the model class")
    for name in source.names:
        if source.dtype(name).is_floating_point and source.dtype(name) not in _DTYPES:
            raise ValueError(f"{name} is stored in {source.dtype(name)}; vLLM loads bfloat16, float16 and float32")


def write_vllm(source: Source, output: Path) -> dict:
    """Writes the stock directory ``output``: the weight files byte for byte, config.json without what vLLM rejects."""
    require_free_space(output, source.dense_bytes)
    for file in sorted(set(source.files.values())):
        shutil.copyfile(file, output / file.name)
    index = source.path / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, output / index.name)
    source.copy_other_files(output, leave_out=("config.json", *_REJECTED_FILES))
    config = {key: value for key, value in source.config.items() if key not in _REJECTED_KEYS}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k not in _REJECTED_KEYS}
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    gone = [key for key in _REJECTED_KEYS if key in source.config]
    return {"tensors": len(source.files), "notes": [f"left out of config.json: {key}" for key in gone]}


def verify_vllm(source: Source, output: Path) -> str:
    """vLLM needs a GPU build to run; a process with stock transformers alone loads the directory in its place."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _STOCK_LOADER, str(output)], capture_output=True, text=True, timeout=3600
    )
    if done.returncode:
        raise RuntimeError(f"stock transformers cannot load the directory: {(done.stderr or '').strip()[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    model, same, other = told.pop("class"), told.pop("same"), told.pop("other")
    if problems := {kind: names for kind, names in told.items() if names}:
        raise RuntimeError(f"stock transformers does not load {model} as it was saved: {problems}")
    return (
        f"stock transformers, in a process without hf_sparse, loads {model}: nothing missing or left over, {same} of "
        f"{same + other} tensors compared value by value; vLLM itself was not run"
    )


VLLM = Exporter(
    what="A stock Hugging Face directory, dense with zeros, that vLLM serves like any other.",
    zeros="vLLM multiplies the zeros like any other number: the same speed and memory as the dense model. Its 2:4 kernels "
    "were removed in March 2026 (PR 36799), unstructured sparsity was never in it.",
    checked="2026-11-23, vLLM 0.33.0, its code read (config.py, weight_utils.py, compressed_tensors.py); PR 36799, issue 11563",
    write=write_vllm,
    check=check_vllm,
    verify=verify_vllm,
    output="directory",
)
