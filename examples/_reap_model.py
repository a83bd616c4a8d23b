"""A small mixture of experts trained on several domains: tokens, model, training, and what is measured of it.

The data is a folder with ``train_<domain>.txt`` and ``valid_<domain>.txt``. One byte-level BPE is trained on all domains alike
and kept beside them with the token ids (``tokens-<vocabulary>.npz``, ``tokenizer-<vocabulary>.json``).

The model is a stock Qwen3-MoE. Weights are bfloat16 on an accelerator, with float32 copies that AdamW works on; a
load-balancing loss over the batch, in which all domains are mixed, keeps experts in use and leaves them free to specialise.
"""

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

WINDOW = 512


def domains_of(folder: Path) -> list[str]:
    """The domains of a data folder; an error that says what was looked for if there are none, or one is empty."""
    names = sorted(file.stem.removeprefix("train_") for file in folder.glob("train_*.txt"))
    cached = sorted(folder.glob("tokens-*.npz"))
    if not names and cached:
        names = sorted({key.partition("_")[2] for key in np.load(cached[0]).files if key.startswith("train_")})
    if not names:
        raise SystemExit(
            f"{folder} has no train_<domain>.txt; it should have train_ and valid_ files of two domains or more"
        )
    for name in names:
        for part in ("train", "valid"):
            file = folder / f"{part}_{name}.txt"
            if not cached and (not file.is_file() or not file.read_text(encoding="utf-8").strip()):
                raise SystemExit(f"{file} is missing or empty")
    return names


def load_tokens(folder: Path, domains: list[str], vocabulary: int):
    """``(tokenizer, {domain: train ids}, {domain: held-out ids})``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    kept, model = folder / f"tokens-{vocabulary}.npz", folder / f"tokenizer-{vocabulary}.json"
    if not (kept.is_file() and model.is_file()):
        texts = {
            f"{p}_{d}": (folder / f"{p}_{d}.txt").read_text(encoding="utf-8")
            for d in domains
            for p in ("train", "valid")
        }
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        parts = [texts[f"train_{d}"][:3_000_000] for d in domains]
        tokenizer.train_from_iterator(
            (part[i : i + 10_000] for part in parts for i in range(0, len(part), 10_000)), trainer
        )
        ids = {}
        for name, text in texts.items():
            pieces = tokenizer.encode_batch([text[i : i + 100_000] for i in range(0, len(text), 100_000)])
            ids[name] = np.concatenate([np.array(piece.ids, dtype=np.uint16) for piece in pieces])
        tokenizer.save(str(model))
        np.savez(kept, **ids)
    ids = np.load(kept)
    of = {
        part: {d: torch.from_numpy(ids[f"{part}_{d}"].astype(np.int64)) for d in domains} for part in ("train", "valid")
    }
    return Tokenizer.from_file(str(model)), of["train"], of["valid"]


def build(
    vocabulary: int,
    hidden: int,
    layers: int,
    experts: int,
    top_k: int,
    intermediate: int,
    balance: float,
    device,
    seed: int,
):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128), head_dim=64, num_experts=experts, num_experts_per_tok=top_k,
        moe_intermediate_size=intermediate, intermediate_size=4 * intermediate, norm_topk_prob=True, decoder_sparse_step=1,
        tie_word_embeddings=True, max_position_embeddings=2 * WINDOW, output_router_logits=True, router_aux_loss_coef=balance,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def windows(ids: torch.Tensor, count: int, generator) -> torch.Tensor:
    """``[count, WINDOW]`` token ids from random places."""
    starts = torch.randint(0, len(ids) - WINDOW, (count,), generator=generator)
    return ids[starts.unsqueeze(1) + torch.arange(WINDOW)]


def train(model, data: dict, minutes: float, steps: int | None, batch: int, rate: float, device, say) -> dict:
    """Trains for ``steps``, or for as many as fit into ``minutes`` by the time of the first twenty."""
    generator = torch.Generator().manual_seed(1)
    share = torch.tensor([len(ids) for ids in data.values()]).double().sqrt()  # small domains are seen more often
    streams = list(data.values())
    master = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [m for m in master if m.dim() > 1], "weight_decay": 0.1},
        {"params": [m for m in master if m.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    parameters = list(model.parameters())
    model.train()
    total, begun, losses, warmup = steps or 10**9, time.perf_counter(), [], 50
    step = 0
    while step < total:
        picks = torch.multinomial(share, batch, True, generator=generator).tolist()
        ids = torch.cat([windows(streams[i], n, generator) for i, n in sorted(Counter(picks).items())]).to(
            device, non_blocking=True
        )
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        with torch.no_grad():
            for copy, parameter in zip(master, parameters, strict=True):
                copy.grad = parameter.grad.float()
                parameter.grad = None
            torch.nn.utils.clip_grad_norm_(master, 1.0, foreach=True)
            progress = step / total if total < 10**9 else 0.0
            factor = min(1.0, (step + 1) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            torch._foreach_copy_(parameters, master)
        step += 1
        losses.append(output.loss.detach())
        if step == 20 and steps is None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            # the first steps also compile kernels, so the rest is measured once more at 40
            begun_at = time.perf_counter()
        if step == 40 and steps is None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            each = (time.perf_counter() - begun_at) / 20
            total = max(60, step + int((60 * minutes - (time.perf_counter() - begun)) / each))
            say(f"{each:.3f} s a step: {total} steps in {minutes:g} minutes")
        if step % max(1, min(total, 10**6) // 20) == 0 and total < 10**9:
            say(f"step {step}/{total} loss {float(torch.stack(losses[-50:]).float().mean()):.3f}")
    model.eval()
    seconds = time.perf_counter() - begun
    return {
        "steps": total,
        "tokens": total * batch * WINDOW,
        "seconds": seconds,
        "loss": float(torch.stack(losses[-50:]).float().mean()),
    }


@torch.no_grad()
def nll(model, ids: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """By sequence: mean negative log-likelihood of the tokens from ``start`` on; greedy next tokens ``[length - 1]``."""
    values, best = [], []
    for part in ids.split(16):
        logits = model(input_ids=part, use_cache=False, output_router_logits=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        values.append(loss[:, max(0, start - 1) :].mean(1))
        best.append(logits.argmax(-1))
    return torch.cat(values), torch.cat(best)


@torch.no_grad()
def continue_greedily(model, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """``[n, prompt + new]``."""
    return model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, output_router_logits=False,
    )  # fmt: skip


def repetition(sequences: torch.Tensor) -> float:
    """The share of 4-grams that occurred before in the same sequence."""
    shares = []
    for row in sequences.tolist():
        grams = [tuple(row[i : i + 4]) for i in range(len(row) - 3)]
        shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares)


class Examination:
    """Held-out text of every domain, prompts from it, and what the dense model makes of them."""

    def __init__(self, dense, held: dict, count: int, prompts: int, new: int, device):
        generator = torch.Generator().manual_seed(2)
        self.text = {name: windows(ids, count, generator).to(device) for name, ids in held.items()}
        self.prompt = torch.cat([windows(ids, prompts, generator)[:, :64] for ids in held.values()]).to(device)
        self.dense, self.new = dense, new
        self.path = continue_greedily(dense, self.prompt, new)

    def of(self, model) -> dict:
        """Perplexity by domain, and of generation: agreement with the dense model along its own greedy path, the perplexity
        that the dense model gives to what this model writes, and how much of it repeats."""
        perplexity = {name: math.exp(float(nll(model, ids)[0].mean())) for name, ids in self.text.items()}
        start = self.prompt.shape[1]
        agreed = nll(model, self.path)[1][:, start - 1 :] == self.path[:, start:]
        written = continue_greedily(model, self.prompt, self.new)
        return {
            "perplexity": perplexity,
            "mean_perplexity": math.exp(sum(map(math.log, perplexity.values())) / len(perplexity)),
            "agreement": float(agreed.float().mean()),
            "written_perplexity": math.exp(float(nll(self.dense, written, start)[0].mean())),
            "repetition": repetition(written[:, start:]),
        }
