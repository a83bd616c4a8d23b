"""Cerebras: a checkpoint whose masks lie beside the weights, as cerebras_pytorch trains with them.

    export("llama-75", "cerebras", "llama-75.mdl", names="modelzoo")

A ``torch.save`` file, which ``cerebras.pytorch.load`` reads where it finds none of its own HDF5 files:

    {"model":    {name: weight with its zeros, name + "_mask": bool, True = kept, for every sparse weight},
     "sparsity": {"step": int64 tensor, "sparsity": {}}}

cerebras_pytorch registers a persistent buffer ``<parameter>_mask`` for every weight that its sparsity algorithm was applied
to, multiplies the weight by it before every forward, and takes a mask that the checkpoint holds for the initial one. The
state of a dynamic algorithm (SET, RigL, GMP) is its step; ``Static`` has none and ignores it. With several groups of weights
the state is a list, one entry a group. Loading is strict: the sparsity config must name the weights that have masks here.

Two namings:

    hf         of the transformers model itself, for a model of its class that cerebras_pytorch runs
    modelzoo   of Cerebras' Model Zoo (Llama only): transformer_decoder.layers.N.self_attn.proj_q_dense_layer.weight and so
               on under "model.", with the rows of q and k interleaved: row i and row i + d/2 of a head of d rows, which
               rotary embedding pairs, are neighbours there

Sources: the code of cerebras_pytorch 2.10.0 (sparse/, storage/load.py) and of the Model Zoo (release 2.9 and 2.10,
checkpoint_converters/llama.py, trainer/callbacks/model.py and sparsity.py).
"""

import os
import re
from pathlib import Path

import torch

from hf_sparse.config import CONFIG_KEY
from hf_sparse.export import Exporter
from hf_sparse.export.source import Source
from hf_sparse.targets import find_targets

__all__ = ["CEREBRAS", "modelzoo_state_dict"]

_MODELZOO = {  # name in transformers -> name in the Model Zoo, one of them or both for the final norm
    r"model\.embed_tokens\.(.*)": [r"embedding_layer.word_embeddings.\1"],
    r"model\.norm\.(.*)": [r"transformer_decoder.norm.\1", r"ln_f.\1"],
    r"lm_head\.(.*)": [r"lm_head.\1"],
}
_MODELZOO_LAYER = {
    "self_attn.q_proj": "self_attn.proj_q_dense_layer",
    "self_attn.k_proj": "self_attn.proj_k_dense_layer",
    "self_attn.v_proj": "self_attn.proj_v_dense_layer",
    "self_attn.o_proj": "self_attn.proj_output_dense_layer",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm3",
    "mlp.up_proj": "ffn.ffn.0.linear_layer",
    "mlp.gate_proj": "ffn.ffn.0.linear_layer_for_glu",
    "mlp.down_proj": "ffn.ffn.1.linear_layer",
}


def modelzoo_state_dict(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """A Llama's state dict (or masks of it) under the names of the Model Zoo, q and k interleaved.

    Raises:
        ValueError: a name is none of a Llama's.
    """
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    converted = {}
    for name, tensor in state.items():
        for head_count, projection in ((heads, "q_proj"), (groups, "k_proj")):
            if f".self_attn.{projection}." in name:
                tensor = _interleave(tensor, head_count)
        converted |= dict.fromkeys((f"model.{new}" for new in _modelzoo_names(name)), tensor)
    return converted


def _modelzoo_names(name: str) -> list[str]:
    for pattern, new in _MODELZOO.items():
        if found := re.fullmatch(pattern, name):
            return [found.expand(each) for each in new]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
    if not found or found[2] not in _MODELZOO_LAYER:
        raise ValueError(f"{name} has no place in the Model Zoo's Llama; export with names=hf")
    return [f"transformer_decoder.layers.{found[1]}.{_MODELZOO_LAYER[found[2]]}.{found[3]}"]


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows ``(first half, second half)`` of every head as ``(row 0, row d/2, row 1, ...)``; for weights and biases."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def check_cerebras(source: Source, *, names: str = "hf", step: int = 0, groups: int = 1) -> None:
    if names not in ("hf", "modelzoo"):
        raise ValueError(f"names is hf or modelzoo, got {names!r}")
    if step < 0 or groups < 1:
        raise ValueError(f"step is at least 0 and groups at least 1, got {step} and {groups}")
    if not source.sparse():
        raise ValueError("no weight of this model has a zero; there is nothing sparse to export")
    if names == "modelzoo":
        if source.config.get("model_type") != "llama":
            raise ValueError(
                f"names=modelzoo knows Llama, not {source.config.get('model_type')}: export with names=hf, or convert the "
                "dense directory with the Model Zoo's own converter and train with `init_method: from_zeros`"
            )
        for name in source.names:
            _modelzoo_names(name)


def write_cerebras(source: Source, output: Path, *, names: str = "hf", step: int = 0, groups: int = 1) -> dict:
    model_state, masks = _states(source, names)
    sparsity = {"step": torch.tensor(step, dtype=torch.int64), "sparsity": {}}
    state = sparsity if groups == 1 else [dict(sparsity) for _ in range(groups)]
    torch.save({"model": model_state | masks, "sparsity": state}, output)
    kinds = sorted({re.sub(r"^.*\.\d+\.", "*.", name.removesuffix("_mask")) for name in masks})
    notes = [f"the sparsity config must name the weights with masks: param_filter: [{', '.join(map(repr, kinds))}]"]
    if names == "hf":
        notes.append("names are those of transformers; for a model of the Model Zoo export with names=modelzoo")
    return {"tensors": len(masks), "notes": notes}


def _states(source: Source, names: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's state dict, zeros in place, and ``{name + "_mask": bool}`` of every target with zeros."""
    model = source.model()
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    targets = find_targets(model, (source.config.get(CONFIG_KEY) or {}).get("targets"))
    masks = {name: state[name] != 0 for name in targets}
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    if names == "modelzoo":
        state, masks = modelzoo_state_dict(state, source.config), modelzoo_state_dict(masks, source.config)
    return state, {f"{name}_mask": mask for name, mask in masks.items()}


def verify_cerebras(source: Source, output: Path, *, names: str = "hf", **_: object) -> str:
    loaded = _load(output)
    state, masks = _states(source, names)
    expected = state | masks
    if set(loaded["model"]) != set(expected):
        raise RuntimeError(f"{output.name} does not hold the tensors of the model")
    for name, tensor in expected.items():
        if not torch.equal(loaded["model"][name], tensor):
            raise RuntimeError(f"{name} read back from {output.name} is not the model's")
    return (
        f"read back by torch.load, as cerebras_pytorch does: {len(state)} tensors and {len(masks)} masks equal the model's "
        "(cerebras_pytorch itself needs torch 2.4)"
    )


def _load(path: str | os.PathLike) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a zip file or a pickle that is damaged raises
        raise RuntimeError(f"{path} cannot be read back: {error}") from None


CEREBRAS = Exporter(
    what="A checkpoint of dense weights with zeros and a boolean mask beside each sparse one, for cerebras_pytorch.",
    zeros="cerebras_pytorch trains with these masks on CPU, GPU and Cerebras systems; on a Cerebras system sparse weights are "
    "held and multiplied as CSR, anywhere else they are dense with zeros and no faster.",
    checked="2026-11-23, cerebras_pytorch 2.10.0 on CPU and the Model Zoo of 2026-03-11: masks taken as the initial ones, "
    "the Model Zoo's Llama gives the logits of transformers'",
    options={
        "names": "hf (default) or modelzoo (Llama)",
        "step": "the sparsity algorithm's step to start at; default 0",
        "groups": "how many groups of weights the sparsity config has; default 1",
    },
    write=write_cerebras,
    check=check_cerebras,
    verify=verify_cerebras,
)
