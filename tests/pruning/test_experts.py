"""Scoring and pruning experts in every family: against plain products, and against the model whose routers never choose them.

The reference for a score routes with the model's own router and multiplies each (token, expert) pair by that expert's matrices
alone. The reference for a pruned model is the unpruned one with the dropped experts' router logits (or, where a bias or a
sigmoid chooses, their scores for choice) at minus infinity.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_sparse import ExpertScores, SparsityConfig, find_mixtures, prune, prune_experts, score_experts
from hf_sparse.pruning.experts import super_experts

BASE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8, vocab_size=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EIGHT = dict(num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=32)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
FAMILIES = {
    "qwen3_moe": dict(num_experts=8, norm_topk_prob=True, decoder_sparse_step=1, **EIGHT),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2, intermediate_size=16),
    "deepseek_v3": dict(n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1, **LATENT,
                        **EIGHT),
    "glm4_moe": dict(n_routed_experts=8, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1, **EIGHT),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16),
    "minimax_m2": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=16, intermediate_size=32, moe_layer_start_index=1,
                         moe_num_shared_experts=1),
    "granitemoe": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16),
    "llama4_text": dict(num_local_experts=8, num_experts_per_tok=1, intermediate_size=16, intermediate_size_mlp=32,
                        interleave_moe_layer_step=1),
    "qwen2_moe": dict(num_experts=8, shared_expert_intermediate_size=16, decoder_sparse_step=1, **EIGHT),
    "dots1": dict(n_routed_experts=8, n_group=2, topk_group=2, first_k_dense_replace=1, n_shared_experts=1, **EIGHT),
}  # fmt: skip
DATA = Path(__file__).resolve().parents[1] / "data"
HALF = [0, 2, 5, 7]  # two of each half, for routers with two groups


def build(family, **more):
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith("router.bias"):
                tensor.data.normal_(0, 0.3)  # a bias that changes who is chosen
            elif tensor.dim() > 1:
                tensor.data.mul_(6)
            elif name.endswith("_bias"):
                tensor.data.normal_(0, 0.1)
        for name, tensor in model.named_parameters():
            if name.endswith("proj_bias"):
                tensor.data.normal_(0, 0.1)
    return model


def ids(samples=4, length=12, seed=0):
    return torch.randint(3, 64, (samples, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- references


def one_expert(experts, index, x):
    """An expert's output for ``x [tokens, hidden]`` by plain products, from the layout its family documents."""
    up, down = experts.gate_up_proj[index], experts.down_proj[index]
    if type(experts).__name__ == "GptOssExperts":  # transposed, gate and up interleaved, biases, clamped swiglu
        both = x @ up + experts.gate_up_proj_bias[index]
        gate, linear = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return ((linear + 1) * gate * torch.sigmoid(gate * 1.702)) @ down + experts.down_proj_bias[index]
    if type(experts).__name__ == "Llama4TextExperts":  # transposed
        gate, linear = (x @ up).chunk(2, -1)
        return (F.silu(gate) * linear) @ down
    gate, linear = (x @ up.T).chunk(2, -1)
    return (F.silu(gate) * linear) @ down.T


def brute_force(model, batch):
    """``{block: {statistic: [experts]}}``, one (token, expert) pair after the other."""
    seen, handles = {}, []
    mixtures = find_mixtures(model)
    for name, mixture in mixtures.items():
        handles.append(
            model.get_submodule(mixture.router).register_forward_hook(
                lambda _, args, output, name=name: seen.setdefault(name, []).append((args[0].reshape(-1, 32), output))
            )
        )
    model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    result = {}
    for name, mixture in mixtures.items():
        experts = model.get_submodule(mixture.experts)
        sums = {
            key: torch.zeros(mixture.count, dtype=torch.float64) for key in ("count", "gate", "norm", "gated", "peak")
        }
        for x, output in seen[name]:
            for token in range(len(x)):
                if mixture.input_scaled:  # (scores with zeros, logits): the gate scales what goes in
                    chosen = [
                        (int(j), 1.0, x[token] * output[0][token, j]) for j in output[0][token].nonzero().flatten()
                    ]
                else:  # (logits, weights, indices)
                    chosen = [
                        (int(j), float(g), x[token]) for g, j in zip(output[1][token], output[2][token], strict=True)
                    ]
                for j, gate, value in chosen:
                    out = one_expert(experts, j, value[None])[0]
                    sums["count"][j] += 1
                    sums["gate"][j] += gate
                    sums["norm"][j] += float(out.norm())
                    sums["gated"][j] += gate * float(out.norm())
                    sums["peak"][j] = max(sums["peak"][j], float(out.abs().max()))
        result[name] = sums
    return result


def never_chosen(model, kept):
    """A copy whose routers cannot choose the experts that are not in ``kept``."""
    model = copy.deepcopy(model)
    for name, mixture in find_mixtures(model).items():
        router, block = model.get_submodule(mixture.router), model.get_submodule(name)
        dropped = [j for j in range(mixture.count) if j not in kept[name]]
        bias = [
            tensor
            for owner in (router, block, *router.children())
            for key, tensor in [*owner.named_buffers(recurse=False), *owner.named_parameters(recurse=False)]
            if key == "e_score_correction_bias"
        ]
        for tensor in bias:  # it chooses, on top of a probability that is then zero
            tensor.data[..., dropped] = -torch.inf
        if getattr(router, "bias", None) is not None:
            router.bias.data[dropped] = -torch.inf
        else:

            def forward(x, *args, router=router, original=router.forward, dropped=dropped, linear=F.linear):
                def masked(value, weight, *rest):
                    logits = linear(value, weight, *rest)
                    if weight.shape == router.weight.shape:
                        logits[..., dropped] = -torch.inf
                    return logits

                F.linear = torch.nn.functional.linear = masked
                try:
                    return original(x, *args)
                finally:
                    F.linear = torch.nn.functional.linear = linear

            router.forward = forward
    return model


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_products(family):
    model, batch = build(family), ids()
    scores, expected = score_experts(model, batch), brute_force(model, batch)
    assert scores.tokens == batch.numel()
    for name, statistics in expected.items():
        for key, values in statistics.items():
            torch.testing.assert_close(scores.statistics[name][key], values, rtol=2e-5, atol=1e-9, msg=f"{name} {key}")
        assert statistics["count"].sum() == batch.numel() * find_mixtures(model)[name].top_k
        count = statistics["count"].clamp_min(1)
        for saliency, value in (
            ("reap", statistics["gated"] / count),
            ("ean_mean", statistics["norm"] / count),
            ("ean_sum", statistics["norm"]),
            ("frequency", statistics["count"]),
            ("gate_sum", statistics["gate"]),
            ("gated_sum", statistics["gated"]),
        ):
            torch.testing.assert_close(scores.scores(saliency)[name], value, rtol=4e-5, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_one_that_never_chooses_the_dropped(family, tmp_path):
    model, batch = build(family), ids()
    kept = dict.fromkeys(find_mixtures(model), HALF)
    expected = never_chosen(model, kept)(batch).logits
    before = model(batch).logits
    report = prune_experts(model, None, keep=kept)
    logits = model(batch).logits
    assert logits.isfinite().all() and not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(logits, expected, atol=1e-6 * float(expected.abs().max().clamp_min(1)), rtol=1e-6)
    assert (
        report.uniform
        and report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(batch).logits, logits)
    generated = again.generate(batch[:, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= 8
    content = json.loads((tmp_path / "config.json").read_text())
    spellings = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    spelled = {key: content[key] for key in spellings if key in content}
    assert spelled and set(spelled.values()) == {4}
    aliases = {name for name in type(again.config).attribute_map if name in ("num_experts", "num_local_experts")}
    assert aliases <= set(spelled)
    assert content["hf_sparse_experts"]["kept"] == kept


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "hf_sparse" not in sys.modules
print(float(model(torch.arange(3, 15)[None]).logits.double().sum()))
"""


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_stock_transformers_loads_it_without_us(family, tmp_path):
    model = build(family)
    prune_experts(model, score_experts(model, ids()), 0.5)
    model.save_pretrained(tmp_path)
    here = float(model(torch.arange(3, 15)[None]).logits.double().sum())
    there = subprocess.run([sys.executable, "-c", STOCK, str(tmp_path)], capture_output=True, text=True)
    assert there.returncode == 0, there.stderr[-2000:]
    assert float(there.stdout) == pytest.approx(here, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "deepseek_v3"])
def test_neither_batches_nor_padding_nor_the_dispatch_change_a_score(family):
    model, batch = build(family), ids(6, 10)
    whole = score_experts(model, batch)
    mask = torch.ones(6, 14, dtype=torch.long)
    mask[:, :4] = 0
    left = torch.cat([torch.zeros(6, 4, dtype=torch.long), batch], 1)
    right = torch.cat([batch, torch.zeros(6, 4, dtype=torch.long)], 1)
    others = {
        "parts": score_experts(model, [batch[:1], {"input_ids": batch[1:4]}, batch[4:]]),
        "sum": score_experts(model, batch[:2]) + score_experts(model, batch[2:]),
        "right": score_experts(model, {"input_ids": right, "attention_mask": mask.flip(1)}),
        "left": score_experts(model, {"input_ids": left, "attention_mask": mask}),
        "offload": score_experts(model, batch, storage="cpu"),
    }
    if family != "llama4_text":
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            others[implementation] = score_experts(model, batch)
    for how, scores in others.items():
        assert scores.tokens == whole.tokens == 60, how
        for name, statistics in whole.statistics.items():
            for key, values in statistics.items():
                torch.testing.assert_close(
                    scores.statistics[name][key], values, rtol=1e-4, atol=1e-6, msg=f"{how} {name} {key}"
                )


def test_the_model_is_left_as_it_was():
    model = build("qwen3_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_experts(model, ids())
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_rankings_go_through_files(tmp_path):
    scores = score_experts(build("mixtral"), ids(), saliency="frequency")
    scores.save(tmp_path / "scores.jsonl")
    again = ExpertScores.load(tmp_path / "scores.jsonl")
    assert (again.saliency, again.tokens, again.top_k) == ("frequency", scores.tokens, scores.top_k)
    for name, statistics in scores.statistics.items():
        assert all(torch.equal(again.statistics[name][key], value) for key, value in statistics.items())
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    best = max((line for line in lines[1:] if line["layer"] == lines[1]["layer"]), key=lambda line: line["count"])
    assert best["rank"] == 0 and best["score"] == best["count"]
    broken = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "broken.jsonl").write_text("\n".join([*broken[:3], broken[4]]))
    with pytest.raises(ValueError, match="some are missing"):
        ExpertScores.load(tmp_path / "broken.jsonl")
    (tmp_path / "broken.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        ExpertScores.load(tmp_path / "broken.jsonl")


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    from hf_sparse.pruning import expert_scores

    model, batch, score = build("qwen3_moe"), ids(), expert_scores._score_layer
    whole = score_experts(model, batch)
    done = []

    def once(model, captured, index, *args, **options):
        if index == 1 and not done.append(index) and len(done) == 1:
            raise KeyboardInterrupt
        return score(model, captured, index, *args, **options)

    monkeypatch.setattr(expert_scores, "_score_layer", once)
    with pytest.raises(KeyboardInterrupt):
        score_experts(model, batch, resume_dir=tmp_path)
    calls = []
    monkeypatch.setattr(
        expert_scores,
        "_score_layer",
        lambda m, c, index, *a, **k: (calls.append(index), score(m, c, index, *a, **k))[1],
    )
    again = score_experts(model, batch, resume_dir=tmp_path)
    assert calls == [1]
    for name, statistics in whole.statistics.items():
        for key, value in statistics.items():
            torch.testing.assert_close(again.statistics[name][key], value, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="another run: its calibration data differ"):
        score_experts(model, ids(seed=1), resume_dir=tmp_path)


# ---------------------------------------------------------------------------------------------------- who stays, and errors


def test_uniform_and_global_counts():
    model = build("qwen3_moe")
    first, second = find_mixtures(model)
    values = {first: 2.0 ** torch.arange(8), second: 100 + torch.arange(8.0)}
    report = prune_experts(copy.deepcopy(model), values, 0.4)  # 3.2 experts: three go
    assert set(map(tuple, report.kept.values())) == {(3, 4, 5, 6, 7)}
    # in means of its layer: 4.02, 2.01, 1.004, 0.5 ... in the first, 0.97 to 1.03 in the second; eight of all stay
    report = prune_experts(copy.deepcopy(model), values, 0.5, allocation="global")
    assert report.kept == {first: [5, 6, 7], second: [3, 4, 5, 6, 7]} and not report.uniform
    # as many as the router needs stay, whatever the scores
    report = prune_experts(
        copy.deepcopy(model), {first: torch.arange(8) * 0.0, second: torch.ones(8)}, 0.5, allocation="global"
    )
    assert len(report.kept[first]) == 2 and len(report.kept[second]) == 6


def test_groups_lose_as_many_each():
    model = build("deepseek_v3")
    (name,) = find_mixtures(model)
    report = prune_experts(model, {name: torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])}, 0.5)
    assert report.kept[name] == [0, 1, 4, 5]
    assert model(ids()).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_different_counts_load_with_the_stock_call(family, tmp_path):
    model, batch = build(family, num_hidden_layers=3), ids()
    first = list(find_mixtures(model))[-2]
    fewer, more = (
        ([0, 1, 4, 5], [0, 2, 3, 5, 6, 7]) if family in ("deepseek_v3", "dots1") else ([0, 2, 5], [1, 2, 3, 6, 7])
    )
    kept = dict.fromkeys(find_mixtures(model), more) | {first: fewer}
    prune_experts(model, None, keep=kept)
    logits = model(batch).logits
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert torch.equal(again(batch).logits, logits)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")(batch).logits, logits)
    bare = AutoModel.from_pretrained(tmp_path / "once")
    assert [m.count for m in find_mixtures(bare).values()] == [len(indices) for indices in kept.values()]
    if family in ("qwen3_moe", "gpt_oss"):  # without us: an error, not random weights
        there = subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "once")], capture_output=True, text=True)
        assert there.returncode != 0 and "mismatch" in there.stderr.lower(), there.stderr[-1500:]
    # and back to one number for all
    prune_experts(again, score_experts(again, batch), keep=len(fewer))
    assert getattr(again.config, "quantization_config", None) is None
    assert again.config.hf_sparse_experts["kept"][first] == fewer
    again.save_pretrained(tmp_path / "even")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "even")(batch).logits, again(batch).logits)


def test_super_experts_stay_if_asked():
    model = build("qwen3_moe")
    scores = score_experts(model, ids())
    name = next(iter(scores.statistics))
    least = int(scores.scores()[name].argmin())
    scores.statistics[name]["peak"][least] = 1000.0
    assert super_experts(scores) == {name: [least]}
    assert least not in prune_experts(copy.deepcopy(model), scores, 0.5).kept[name]
    assert least in prune_experts(copy.deepcopy(model), scores, 0.5, keep_super=True).kept[name]


def test_experts_never_routed_to_go_first_and_are_told():
    model = build("qwen3_moe")
    scores = score_experts(model, ids(1, 2))
    assert scores.never_routed() >= 8
    for name, values in scores.scores().items():
        assert bool((values[scores.statistics[name]["count"] == 0] == 0).all())
    report = prune_experts(model, scores, 0.5)
    assert "sent no token" in report.notes[0]


def test_pruning_experts_and_then_weights():
    model, batch = build("qwen3_moe"), ids(8, 16)
    prune_experts(model, score_experts(model, batch), 0.5)
    report = prune(model, SparsityConfig(pattern="2:4", saliency="wanda"), batch)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert experts.shape[0] == 4 and report.sparsity == pytest.approx(0.5)
    assert bool(((experts.reshape(-1, 4) != 0).sum(1) <= 2).all()) and model(batch).logits.isfinite().all()
    assert model.config.hf_sparse_experts["saliency"] == "reap" and model.config.hf_sparse["pattern"] == "2:4"


def test_errors_come_before_any_change(tiny_llama):
    model = build("qwen3_moe")
    scores = score_experts(model, ids())
    names = list(find_mixtures(model))
    before = copy.deepcopy(model.state_dict())
    for match, arguments, options in (
        ("at least 2 experts", (scores, 0.9), {}),
        ("either sparsity", (scores,), {}),
        ("either sparsity", (scores, 0.5), {"keep": 4}),
        ("in \\[0, 1\\)", (scores, 1.0), {}),
        ("from 1 to 8", (scores,), {"keep": 9}),
        ("unknown allocation", (scores, 0.5), {"allocation": "even"}),
        ("give scores", (None, 0.5), {}),
        ("missing: " + names[1], ({names[0]: torch.ones(8)}, 0.5), {}),
        ("8 experts, but 7 scores", ({name: torch.ones(7) for name in names}, 0.5), {}),
        ("hold NaN", ({name: torch.full((8,), torch.nan) for name in names}, 0.5), {}),
        ("keep_super needs", ({name: torch.ones(8) for name in names}, 0.5), {"keep_super": True}),
        ("asked to keep", (None,), {"keep": {names[0]: [0, 1], names[1]: [0, 8]}}),
        ("at least 2 experts", (None,), {"keep": {names[0]: [0, 1], names[1]: [0]}}),
    ):
        with pytest.raises(ValueError, match=match):
            prune_experts(model, *arguments, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no mixture of experts"):
        score_experts(tiny_llama, ids())
    with pytest.raises(ValueError, match="did you mean 'reap'"):
        score_experts(model, ids(), "reaper")
    with pytest.raises(ValueError, match="looks at data"):
        score_experts(model, None)
    chance, again = (score_experts(model, None, "random", seed=1).scores() for _ in range(2))
    assert all(torch.equal(values, again[name]) for name, values in chance.items())
    with pytest.raises(ValueError, match="needs calibration data"):
        score_experts(model, None, "random").scores("reap")
    with pytest.raises(ValueError, match="as many experts of each"):
        groups = build("deepseek_v3")
        prune_experts(groups, None, keep={name: [0, 1, 2, 4] for name in find_mixtures(groups)})


def test_scores_are_those_of_the_released_code():
    """github.com/CerebrasResearch/reap, run on this very model (its weights are arithmetic, so any torch makes them)."""
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64
    )
    config = AutoConfig.for_model("qwen3_moe", **FAMILIES["qwen3_moe"], **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        values = ((i * 7919 + number * 104729) % 1009 / 1009 - 0.5) * (
            2.0 if "gate.weight" in name or "embed" in name else 0.6
        )
        parameter.data.copy_(values.view_as(parameter) if parameter.dim() > 1 else 1 + 0.1 * values)
    scores = score_experts(model, (torch.arange(48).view(4, 12) * 37) % 64)
    official = json.loads((DATA / "reap_official.json").read_text())["blocks"]
    assert set(official) == set(scores.statistics)
    for name, saliencies in official.items():
        assert len(saliencies) == 6
        for saliency, values in saliencies.items():
            expected = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(
                scores.scores(saliency)[name], expected, rtol=1e-5, atol=1e-7, msg=f"{name} {saliency}"
            )


PROCESS = """
import sys, torch
import torch.distributed as dist
from hf_sparse import score_experts
from transformers import AutoModelForCausalLM
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
scores = score_experts(model, ids[:1] if rank == 0 else ids[1:]).all_reduce()
scores.save(f"{folder}/{rank}.jsonl")
dist.destroy_process_group()
"""


def test_processes_add_what_each_saw(tmp_path):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    workers = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said.decode()[-2000:]
    whole, shares = score_experts(model, ids()), [ExpertScores.load(tmp_path / f"{rank}.jsonl") for rank in range(2)]
    for share in shares:
        assert share.tokens == whole.tokens == 48
        for name, statistics in whole.statistics.items():
            for key, values in statistics.items():
                torch.testing.assert_close(share.statistics[name][key], values, rtol=1e-5, atol=1e-9)
