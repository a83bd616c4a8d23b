"""The Trainer on several processes; run by test_distributed.py as ``_trainer.py KIND FOLDER``.

    alone    one process
    ddp      two processes on CPUs, each with half of every batch
    full     two processes under FSDP2, checkpoints of one file (FULL_STATE_DICT, the Trainer's default)
    sharded  the same, every process writing its shard (SHARDED_STATE_DICT)

Every kind trains without interruption, then resumes from the checkpoint in the middle with a new model and compares; it
leaves masks, weights and logs in FOLDER, where the test compares kinds. Models are float64 (see ``_sparse_loop.py``).

accelerate shards on accelerators only, and takes a CPU for a machine where FSDP2 cannot run. The collectives that FSDP2 needs
are there (gloo), so on a machine without accelerators it is told to have found one; all else is what runs on GPUs.
"""

import os
import sys
from pathlib import Path

from _launch import launch, tiny_model

KIND, FOLDER = sys.argv[1], Path(sys.argv[2])
STEPS = 6
METHODS = {
    "static": dict(method="static", sparsity=0.6),
    "rigl": dict(method="rigl", sparsity=0.6, schedule={"every": 2, "end": 1.0}),
    "top-kast": dict(method="top-kast", sparsity=0.6, schedule={"every": 2}),
}
FAMILY = {"rigl": "gpt2"}  # transposed weights, tied head; the others train a llama


def build(method: str):
    if FAMILY.get(method) == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 36, "n_head": 3, "n_positions": 32}
        return tiny_model("gpt2", **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double()
    return tiny_model("llama", hidden_size=32, intermediate_size=45).double()  # an odd number of rows


def pretend_to_have_an_accelerator():
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def trainer_for(method: str, folder: Path):
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_sparse.callbacks import SparsityCallback
    from hf_sparse.config import SparsityConfig

    rows = torch.randint(3, 320, (48, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = dict(output_dir=str(folder), max_steps=STEPS, save_steps=STEPS // 2, logging_steps=2, report_to=[])
    arguments |= dict(learning_rate=3e-3, gradient_accumulation_steps=2, max_grad_norm=0.5, disable_tqdm=True)
    arguments |= dict(per_device_train_batch_size=4 if KIND == "alone" else 2)
    if KIND in ("full", "sharded"):
        layer = "GPT2Block" if FAMILY.get(method) == "gpt2" else "LlamaDecoderLayer"
        config = {"version": 2, "transformer_layer_cls_to_wrap": [layer]}
        config |= {"state_dict_type": "SHARDED_STATE_DICT"} if KIND == "sharded" else {}  # full: what the Trainer takes
        arguments |= dict(fsdp=True, fsdp_config=config)
    else:
        arguments |= dict(use_cpu=True, **(dict(ddp_backend="gloo") if KIND == "ddp" else {}))
    model = build(method)
    callback = SparsityCallback(SparsityConfig(**METHODS[method]))
    return Trainer(model, TrainingArguments(**arguments), train_dataset=data, callbacks=[callback])


def state(trainer) -> dict:
    from hf_sparse.masks import Masks
    from hf_sparse.training.sharding import unwrapped, whole

    model = unwrapped(trainer.model)
    return {
        "masks": {name: whole(mask).cpu().clone() for name, mask in Masks.attached(model).items()},
        "weights": {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters()},
        "log": [{k: v for k, v in line.items() if "second" not in k} for line in trainer.state.log_history],
    }


def check_kind(trainer) -> None:
    """That the kind is what its name says."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    wrapped = trainer.model_wrapped
    assert isinstance(wrapped, DistributedDataParallel) == (KIND == "ddp"), type(wrapped)
    assert isinstance(wrapped, FSDPModule) == (KIND in ("full", "sharded")), type(wrapped)
    assert trainer.args.world_size == (1 if KIND == "alone" else 2)
    if KIND == "sharded":
        checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{STEPS // 2}" / "pytorch_model_fsdp_0"
        assert len(list(checkpoint.glob("*.distcp"))) == 2


def main():
    import torch

    if KIND in ("full", "sharded"):
        pretend_to_have_an_accelerator()
    for method in METHODS:
        folder = FOLDER / f"{KIND}-{method}"
        first = trainer_for(method, folder)
        first.train()
        there = state(first)
        check_kind(first)
        if KIND == "sharded":  # or the Trainer's save_model writes nothing
            first.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        first.save_model(str(folder / "final"))
        resumed = trainer_for(method, folder)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
        again = state(resumed)
        for what in ("masks", "weights"):
            assert there[what].keys() == again[what].keys() and there[what]
            for name, tensor in there[what].items():
                assert torch.equal(tensor, again[what][name]), f"{method}: {what} of {name} differ after resuming"
        densities = [line["density"] for line in there["log"] if "density" in line]
        assert densities == [line["density"] for line in again["log"] if "density" in line] and len(densities) == 3
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(there, FOLDER / f"{KIND}-{method}.pt")
        print(method, "done", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main() if KIND == "alone" else launch(main)
