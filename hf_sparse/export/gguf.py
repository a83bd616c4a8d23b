"""GGUF: the model dense with zeros, in one file for llama.cpp and what is built on it.

    export("smollm2-50", "gguf", "smollm2-50.gguf", dtype="f16")

Written with llama.cpp's own ``gguf`` package, as its convert_hf_to_gguf.py writes these families:

    tensors     under llama.cpp's names; matrices in ``dtype``, vectors and position embeddings in float32
    q and k     of Llama and Mistral with the rows of each head interleaved: row i and row i + d/2, which rotary embedding
                pairs, become neighbours (rows 2i and 2i + 1); Qwen and GPT-2 as they are
    GPT-2       weights transposed to [out, in]
    rope        theta in the metadata; Llama 3's scaled frequencies as the tensor ``rope_freqs.weight`` [d/2]
    tokenizer   vocabulary, merges, token types, special ids, the pre-tokenizer's name and the chat template

llama.cpp holds every weight, zero or not: there is no smaller file (but it compresses: zstd) and no gain in speed.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from hf_sparse.export import Exporter
from hf_sparse.export.gguf_tokenizer import check_tokenizer, write_tokenizer
from hf_sparse.export.source import Source

__all__ = ["GGUF"]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # old checkpoints store them; they are no weights


def check_gguf(source: Source, *, dtype: str = "auto", tokenizer: str = "auto", pre: str = "auto") -> None:
    family = source.config.get("model_type")
    if family not in _ARCHITECTURES:
        raise ValueError(f"no GGUF writer for {family!r}; there is one for {', '.join(_ARCHITECTURES)}")
    if dtype not in ("auto", *_DTYPES):
        raise ValueError(f"dtype is auto, {', '.join(_DTYPES)}, got {dtype!r}")
    rope = _rope(source.config)
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise ValueError(f"rope scaling {rope['rope_type']!r} is not written; only default and llama3 are")
    if family != "gpt2" and source.config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"llama.cpp's {_ARCHITECTURES[family]} has SiLU, this model {source.config['hidden_act']}")
    if family == "gpt2" and source.config.get("activation_function", "gelu_new") != "gelu_new":
        raise ValueError(f"llama.cpp's gpt2 has gelu_new, this model {source.config['activation_function']}")
    check_tokenizer(source, tokenizer, pre)
    names = _name_map(source)
    if unknown := [n for n in source.names if not n.endswith(_BUFFERS) and _gguf_name(names, n) is None]:
        raise ValueError(f"llama.cpp's {_ARCHITECTURES[family]} has no tensor for {', '.join(unknown[:3])}")
    if _matrix_dtype(source, dtype) == torch.float16:
        largest = torch.finfo(torch.float16).max
        for name, tensor in source.tensors():
            if tensor.dim() > 1 and not bool((tensor.abs() <= largest).all()):
                raise ValueError(f"{name} has values that float16 cannot hold; give dtype=bf16 or f32")


def write_gguf(
    source: Source, output: Path, *, dtype: str = "auto", tokenizer: str = "auto", pre: str = "auto"
) -> dict[str, Any]:
    import gguf

    chosen = _matrix_dtype(source, dtype)
    writer = gguf.GGUFWriter(output, _ARCHITECTURES[source.config["model_type"]])
    _write_hyperparameters(writer, source, chosen)
    notes = write_tokenizer(writer, source, tokenizer, pre)
    tensors = list(_converted(source, chosen))
    for name, shape, kind, _ in tensors:
        itemsize = kind.itemsize
        code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[kind]
        numel = math.prod(shape)
        writer.add_tensor_info(name, shape, numpy.dtype("f4"), numel * itemsize, gguf.GGMLQuantizationType[code])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    lost = 0
    for _, _, kind, read in tensors:  # one tensor in memory at a time
        tensor = read()
        stored = tensor.to(kind).contiguous()
        lost += int(tensor.count_nonzero()) - int(stored.count_nonzero())
        writer.write_tensor_data(stored.view(torch.uint8).numpy())
    writer.close()
    if lost:
        notes.append(f"{lost} weights are too small for {chosen} and became zero")
    return {"tensors": len(tensors), "notes": notes}


def verify_gguf(source: Source, output: Path, **options: Any) -> str:
    """transformers' own GGUF reader: every weight and, where rope is plain, the logits."""
    import transformers

    from hf_sparse.loading import load_model

    chosen = _matrix_dtype(source, options.get("dtype", "auto"))
    try:
        loaded = load_model(str(output), "float32")
    except Exception as error:  # whatever it raises for a family or size that its reader does not know
        raise RuntimeError(
            f"transformers {transformers.__version__} cannot load it: {error} (verify=False, --no-verify, writes the file all "
            "the same, for llama.cpp)"
        ) from error
    expected = source.model()
    state = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        rounded = tensor.to(chosen) if tensor.dim() > 1 and not name.endswith("wpe.weight") else tensor
        if name not in state or not torch.equal(state[name], rounded.float()):
            raise RuntimeError(f"{name} as transformers reads it from {output.name} is not the model's")
    told = f"loaded by transformers {transformers.__version__}: {len(state)} tensors equal the model's in {chosen}"
    if _rope(source.config).get("rope_type", "default") != "default":
        return f"{told} (logits not compared: transformers does not read scaled rope from GGUF)"
    ids = torch.arange(16).remainder(expected.config.vocab_size)[None] + 3
    with torch.no_grad():
        difference = float((loaded(ids).logits - expected.float()(ids).logits).abs().max())
    if not difference < 1.0:
        raise RuntimeError(f"the logits of the model in {output.name} differ by {difference:.3g} from the model's")
    return f"{told}, logits differ by at most {difference:.1e}"


def _matrix_dtype(source: Source, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    kinds = {source.dtype(name) for name in source.names if len(source.shape(name)) > 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(_DTYPES.values()) else torch.float32


def _rope(config: dict) -> dict:
    """Rope parameters, under the key of transformers 5 or of 4."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _name_map(source: Source) -> Any:
    import gguf

    config = source.config
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    arch = gguf.MODEL_ARCH[_ARCHITECTURES[config["model_type"]].upper()]
    return gguf.get_tensor_name_map(arch, layers)


def _gguf_name(names: Any, name: str) -> str | None:
    return names.get_name(name, try_suffixes=(".weight", ".bias"))


def _converted(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Any]]:
    """``(llama.cpp's name, shape, dtype, function that reads it)`` of every tensor."""
    names, config = _name_map(source), source.config
    if _rope(config).get("rope_type") == "llama3":
        factors = _llama3_factors(config)
        yield "rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors
    heads = config.get("num_attention_heads")
    for name in source.names:
        if name.endswith(_BUFFERS):
            continue
        shape, change = source.shape(name), None
        if config["model_type"] in ("llama", "mistral"):
            if ".q_proj." in name:
                change = heads
            elif ".k_proj." in name:
                change = config.get("num_key_value_heads") or heads
        elif config["model_type"] == "gpt2" and len(shape) == 2 and ".h." in f".{name}":
            shape, change = shape[::-1], "transpose"
        new = _gguf_name(names, name)
        kind = dtype if len(shape) > 1 and new != "position_embd.weight" else torch.float32
        yield new, shape, kind, lambda name=name, change=change: _changed(source.tensor(name), change)


def _changed(tensor: torch.Tensor, change: Any) -> torch.Tensor:
    if change is None:
        return tensor
    if change == "transpose":
        return tensor.T
    halves = tensor.reshape(change, 2, tensor.shape[0] // change // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _llama3_factors(config: dict) -> torch.Tensor:
    """What each rotary frequency is divided by in Llama 3 (1 for fast ones, ``factor`` for slow ones), float32 [d/2]."""
    rope = _rope(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    factor, low, high = rope["factor"], rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi * theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).float()


def _write_hyperparameters(writer: Any, source: Source, dtype: torch.dtype) -> None:
    import gguf

    config = source.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name((source.origin or source.path).name if source.origin else config["model_type"])
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    if config["model_type"] == "gpt2":
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
        return
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope(config).get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(size)
    if size * heads != config["hidden_size"] or config["model_type"] == "qwen3":
        writer.add_key_length(size)
        writer.add_value_length(size)


GGUF = Exporter(
    what="A GGUF file for llama.cpp: the weights dense, with their zeros, and the tokenizer.",
    zeros="llama.cpp stores and multiplies zeros like any other weight: the same size and speed as the dense model. Requests "
    "for sparse weights (issue 931, ggml issue 93) are open since 2023.",
    checked="2026-11-23, llama.cpp as in llama-cpp-python 0.3.36, gguf 0.19, transformers 5.23",
    options={
        "dtype": "of matrices: auto (as stored), f32, f16 or bf16",
        "tokenizer": "auto (written where there is one) or none",
        "pre": "llama.cpp's name of the pre-tokenizer, e.g. llama-bpe; auto recognises the usual ones",
    },
    write=write_gguf,
    check=check_gguf,
    verify=verify_gguf,
    suffix=".gguf",
    consumer="gguf",
    requires="gguf",
    install="pip install 'hf-sparse[gguf]'",
)
