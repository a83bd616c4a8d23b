"""Merging experts: against identities, SciPy, sums by hand, and the released code of the papers."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers

from hf_sparse.pruning.expert_alignment import align_expert, assign
from hf_sparse.pruning.expert_grouping import (
    ExpertStatistics,
    average_linkage,
    cluster_by_outputs,
    dominant_experts,
    nearest_dominant,
)
from hf_sparse.pruning.expert_merging import merge_experts
from hf_sparse.pruning.expert_scores import score_experts

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def qwen3(**more):
    made = {"moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return transformers.Qwen3MoeConfig(**COMMON | made | more)


def mixtral(**more):
    return transformers.MixtralConfig(**COMMON | {"num_local_experts": 6, "num_experts_per_tok": 2} | more)


def gpt_oss(**more):
    made = {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 3}
    return transformers.GptOssConfig(**COMMON | made | more)


def llama4(**more):
    made = {
        "intermediate_size_mlp": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    }
    return transformers.Llama4TextConfig(**COMMON | made | more)


def deepseek(**more):
    made = {
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
    }
    return transformers.DeepseekV3Config(**{k: v for k, v in COMMON.items() if k != "head_dim"} | made | more)


FAMILIES = {"qwen3": qwen3, "mixtral": mixtral, "gpt_oss": gpt_oss, "llama4": llama4, "deepseek": deepseek}


def build(family, seed=0, **more):
    config = FAMILIES[family](**more)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # biases and routers too: nothing that a wrong index could hide behind
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def tokens(samples=6, length=20, seed=1):
    return torch.randint(64, (samples, length), generator=torch.Generator().manual_seed(seed))


def blocks(model):
    """``{block name: experts module}``, by attribute, not by the code under test."""
    return {name.rpartition(".")[0]: module for name, module in model.named_modules() if name.endswith(".experts")}


@torch.no_grad()
def logits(model, ids=None):
    return model(tokens(2, 16, seed=9) if ids is None else ids).logits


def permute_by_hand(experts, target, source, order):
    """``target`` becomes ``source`` with its hidden units in another order, per layout, each written out."""
    own = dict(experts.named_parameters())
    up, down = own["gate_up_proj"].data, own["down_proj"].data
    if "gate_up_proj_bias" in own:  # gpt_oss: [H, 2I], even columns gate, odd ones up
        up[target, :, 0::2], up[target, :, 1::2] = up[source, :, 0::2][:, order], up[source, :, 1::2][:, order]
        down[target] = down[source][order]
        bias = own["gate_up_proj_bias"].data
        bias[target, 0::2], bias[target, 1::2] = bias[source, 0::2][order], bias[source, 1::2][order]
        own["down_proj_bias"].data[target] = own["down_proj_bias"].data[source]
    elif up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]:  # Llama 4: [H, 2I], gate first
        size = down.shape[1]
        up[target, :, :size], up[target, :, size:] = up[source, :, :size][:, order], up[source, :, size:][:, order]
        down[target] = down[source][order]
    else:  # [2I, H], gate first
        size = down.shape[2]
        up[target, :size], up[target, size:] = up[source, :size][order], up[source, size:][order]
        down[target] = down[source][:, order]


def units(experts):
    down = experts.down_proj
    transposed = getattr(experts, "is_transposed", True)
    return down.shape[1] if transposed else down.shape[2]


# ------------------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("method", ["m-smoe", "hc-smoe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equal_experts_changes_nothing(family, method):
    model = build(family)
    for experts in blocks(model).values():
        for parameter in experts.parameters():
            parameter.data[1:] = parameter.data[:1]
    before, router = logits(model), [p.clone() for n, p in model.named_parameters() if "experts" not in n]
    report = merge_experts(model, tokens(), 0.5, method=method)
    assert (logits(model) - before).abs().max() < 1e-6
    assert report.sparsity == pytest.approx(0.5) and report.parameters_before == report.parameters_after
    left = [p for n, p in model.named_parameters() if "experts" not in n]
    assert all(torch.equal(a, b) for a, b in zip(router, left, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_recovers_permuted_copies(family):
    """Experts that are one another in another order: m-smoe loses nothing; averaged as they are, they would be lost."""
    model = build(family)
    generator = torch.Generator().manual_seed(3)
    for experts in blocks(model).values():
        for target in range(1, experts.num_experts):
            permute_by_hand(experts, target, 0, torch.randperm(units(experts), generator=generator))
    before = logits(model)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    merge_experts(model, tokens(), 0.75, method="m-smoe", allocation="uniform")
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()
    model.load_state_dict(saved)
    merge_experts(model, tokens(), 0.5, method="hc-smoe")
    assert (logits(model) - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_aligning_an_expert_keeps_what_it_computes(family):
    model = build(family)
    before = logits(model)
    for experts in blocks(model).values():
        order = align_expert(experts, 1, 0)
        assert sorted(order.tolist()) == list(range(units(experts))) != order.tolist()
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


def test_sparsity_zero_changes_nothing():
    model = build("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = merge_experts(model, tokens(), 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(groups == 8 for groups in report.distinct.values())


# --------------------------------------------------------------------------------------------------- against other code


def test_assignment_against_all_permutations_and_scipy():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 6):
        for cost in (
            generator.normal(size=(size, size)),
            generator.integers(0, 3, (size, size)),
            np.ones((size, size)),
        ):
            best = min(sum(cost[i, p[i]] for i in range(size)) for p in itertools.permutations(range(size)))
            found = assign(cost)
            assert sorted(found) == list(range(size)) and cost[np.arange(size), found].sum() == pytest.approx(best)
    with pytest.raises(ValueError, match=r"square matrix.*\(2, 3\)"):
        assign(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="finite"):
        assign(np.full((2, 2), np.nan))
    scipy = pytest.importorskip("scipy.optimize")
    for size in (40, 150):
        cost = -(generator.normal(size=(size, 30)) @ generator.normal(size=(30, size)))
        assert (assign(cost) == scipy.linear_sum_assignment(cost)[1]).all()


def test_average_linkage_by_hand():
    # on a line at 0, 1, 4, 6, 20: {0, 1} at 1; {4, 6} at 2; their mean distance (4 + 6 + 3 + 5) / 4 = 4.5
    points = torch.tensor([4.0, 0.0, 20.0, 6.0, 1.0])
    distances = (points - points.unsqueeze(1)).abs()
    assert average_linkage(distances, 5) == [[0], [1], [2], [3], [4]]
    assert average_linkage(distances, 4) == [[0], [1, 4], [2], [3]]
    assert average_linkage(distances, 3) == [[0, 3], [1, 4], [2]]
    assert average_linkage(distances, 2) == [[0, 1, 3, 4], [2]]
    assert average_linkage(distances, 1) == [[0, 1, 2, 3, 4]]


def test_average_linkage_against_scipy():
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    generator = torch.Generator().manual_seed(0)
    for size in (5, 16, 40):
        points = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        tree = hierarchy.linkage(points.numpy(), method="average")
        for count in (1, 2, size // 2, size - 1):
            labels = hierarchy.fcluster(tree, count, criterion="maxclust")
            expected = sorted(np.flatnonzero(labels == label).tolist() for label in set(labels))
            assert average_linkage(torch.cdist(points, points), count) == expected


# What the released code gave for these inputs (torch 2.13, SciPy 1.17, on a CPU): `hierarchical_clustering` of
# wazenmai/HC-SMoE bd77eba (hcsmoe/merging/clustering.py) and of CerebrasResearch/reap 1970473 (src/reap/cluster.py), which
# agree; `mc_smoe_clustering` of the latter with cosine distances of the logits and 3 x 4 clusters; `WeightMatchingPermuter` of
# its src/reap/permute.py. On 30, 20 and 20 random inputs of up to 32 experts theirs and ours were equal as well.


def test_clusters_of_the_released_code():
    i, j = torch.arange(12.0)[:, None], torch.arange(5.0)
    points = torch.sin(1.7 * i * i + 2.3 * j * (i + 1))
    recorded = {
        8: [[0, 6], [1, 8], [2, 7, 10], [3], [4], [5], [9], [11]],
        5: [[0, 6, 11], [1, 8], [2, 4, 7, 10], [3], [5, 9]],
        3: [[0, 6, 11], [1, 2, 4, 7, 8, 10], [3, 5, 9]],
    }
    counts = torch.arange(12.0)
    for count, expected in recorded.items():
        assert average_linkage(torch.cdist(points, points), count) == expected
        groups = cluster_by_outputs(points, counts, count)
        assert sorted(sorted(group) for group in groups) == expected and all(g[0] == max(g) for g in groups)


def test_dominant_groups_of_the_released_code():
    i, j = torch.arange(40.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
    count = {
        0: [14, 14, 11, 9, 9, 4, 6, 13],
        1: [14, 15, 9, 8, 9, 5, 10, 10],
        2: [11, 8, 7, 8, 11, 13, 13, 9],
    }
    logits_, statistics = {}, {}
    for layer, expected in count.items():
        x = torch.sin(0.37 * (layer + 1) * i * (j + 1) + j * j) + 0.1 * layer * torch.cos(j + 0.5 * layer)
        logits_[layer] = x.T @ x
        statistics[layer] = ExpertStatistics(torch.tensor(expected, dtype=torch.float64), logits_[layer])
    mixtures = dict.fromkeys(count)  # nothing of them is looked at
    dominant = dominant_experts(mixtures, statistics, dict.fromkeys(count, 4), "global", dict.fromkeys(count, 1))
    found = {n: sorted(sorted(g) for g in nearest_dominant(logits_[n], dominant[n])) for n in count}
    assert found == {
        0: [[0], [1], [2, 3, 4, 6], [5, 7]],
        1: [[0], [1], [2, 3, 4, 7], [5, 6]],
        2: [[0, 1, 7], [2, 6], [3, 4], [5]],
    }


def test_order_of_the_released_code():
    i, j = torch.arange(7.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)

    def made(factor):  # [2 experts, 7 units, 4]
        return torch.stack([torch.sin(factor * (e + 1) * (i + 1) * (j + 2) + e * i * i) for e in range(2)]).float()

    experts = torch.nn.Module()
    experts.is_transposed, experts.is_concatenated = False, True
    experts.gate_up_proj = torch.nn.Parameter(torch.cat([made(0.9), made(1.3)], dim=1))
    experts.down_proj = torch.nn.Parameter(made(2.1).transpose(1, 2).contiguous())
    assert align_expert(experts, 1, 0).tolist() == [2, 0, 5, 1, 6, 4, 3]


# ------------------------------------------------------------------------------------------------------- on whole models


@torch.no_grad()
def brute_force(model, ids, mask=None):
    """Per Qwen3 block: router logits [T, E] and every expert's outputs [E, T, H], from a plain forward's hidden states."""
    seen, result = {}, {}
    found = {name: model.get_submodule(name) for name in blocks(model)}
    handles = [
        block.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))
        for name, block in found.items()
    ]
    model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    for name, block in found.items():
        x = seen[name].reshape(-1, seen[name].shape[-1])
        x = x if mask is None else x[mask.flatten().bool()]
        outputs = []
        for up, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
            gate, value = (x @ up.T).chunk(2, dim=-1)
            outputs.append(torch.nn.functional.silu(gate) * value @ down.T)
        result[name] = x @ block.gate.weight.T, torch.stack(outputs)
    return result


@pytest.mark.parametrize("padded", [False, True])
def test_hc_smoe_groups_and_weights_by_hand(padded):
    model, ids = build("qwen3"), tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, 11:] = 0
    expected = brute_force(model, ids, mask)
    counts = {
        n: s["count"] for n, s in score_experts(model, [{"input_ids": ids, "attention_mask": mask}]).statistics.items()
    }
    before = {name: (e.gate_up_proj.clone(), e.down_proj.clone()) for name, e in blocks(model).items()}
    report = merge_experts(model, [{"input_ids": ids, "attention_mask": mask}], 0.5, method="hc-smoe")
    assert report.tokens == int(mask.sum()) and set(report.distinct.values()) == {4}
    for name, experts in blocks(model).items():
        means = expected[name][1].double().mean(1)
        groups = report.groups[name]
        assert sorted(sorted(group) for group in groups) == average_linkage(torch.cdist(means, means), 4)
        assert any(len(group) > 1 for group in groups)
        for group in groups:
            assert counts[name][group[0]] == counts[name][group].max()
            weights = counts[name][group].float()
            for old, new in zip(before[name], (experts.gate_up_proj, experts.down_proj), strict=True):
                average = sum(old[e] * w for e, w in zip(group, weights, strict=True)) / weights.sum()
                for expert in group:
                    assert torch.equal(new[expert], new[group[0]])
                    assert torch.allclose(new[expert], average if len(group) > 1 else old[expert], atol=1e-6)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_m_smoe_groups_by_hand(allocation):
    model, ids = build("qwen3", seed=5), tokens(12)
    expected = brute_force(model, ids)
    report = merge_experts(model, ids, 0.6, method="m-smoe", allocation=allocation)
    count = 8 - 4  # floor(0.6 * 8) lose their weights
    frequency = {n: torch.bincount(x.topk(2).indices.flatten(), minlength=8) for n, (x, _) in expected.items()}
    if allocation == "global":
        assert sum(report.distinct.values()) == count * 3 and len(set(report.distinct.values())) > 1
        dominant = {(name, group[0]) for name, groups in report.groups.items() for group in groups}
        least = min(int(frequency[n][e]) for n, e in dominant if int(frequency[n].argmax()) != e)
        others = {(n, e) for n in frequency for e in range(8)} - dominant
        assert all(int(frequency[n][e]) <= least for n, e in others)
    for name, (logits_, _) in expected.items():
        groups = report.groups[name]
        heads = [group[0] for group in groups]
        if allocation == "uniform":
            assert len(groups) == count
            assert min(frequency[name][heads]) >= max(frequency[name][e] for e in set(range(8)) - set(heads))
        for group in groups:
            for expert in group[1:]:
                cosines = torch.nn.functional.cosine_similarity(logits_[:, expert, None], logits_[:, heads], dim=0)
                assert heads[int(cosines.argmax())] == group[0]


def test_keep_gives_a_group_the_sum_of_its_gates():
    model, ids = build("qwen3"), tokens()
    report = merge_experts(model, ids, 0.5, method="hc-smoe")
    name, block = next((n, model.get_submodule(n)) for n in blocks(model))
    x = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        gates = (x[0] @ block.gate.weight.T).softmax(-1)
        top = gates.topk(2)
        gates = torch.zeros_like(gates).scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
        expected = torch.zeros(30, 16)
        for group in report.groups[name]:
            gate, value = (x[0] @ block.experts.gate_up_proj[group[0]].T).chunk(2, dim=-1)
            out = torch.nn.functional.silu(gate) * value @ block.experts.down_proj[group[0]].T
            expected += gates[:, group].sum(1, keepdim=True) * out
        output = block(x)
    assert torch.allclose((output[0] if isinstance(output, tuple) else output).view(30, 16), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("router", ["keep", "dominant"])
def test_saved_and_loaded_with_stock_classes(family, router, tmp_path):
    model = build(family)
    weights = {name: model.get_submodule(name) for name in blocks(model)}
    rows = {
        n: next(
            p
            for k, p in b.named_parameters()
            if "experts" not in k and p.dim() == 2 and k.endswith("weight") and p.shape[0] in (4, 6, 8)
        ).clone()
        for n, b in weights.items()
    }
    report = merge_experts(model, tokens(), 0.5, method="m-smoe", allocation="uniform", router=router)
    if router == "dominant":
        assert report.parameters_after < report.parameters_before
        for name, experts in blocks(model).items():
            kept = sorted(group[0] for group in report.groups[name])
            assert experts.num_experts == len(kept) == len(experts.down_proj)
            block = model.get_submodule(name)
            row = next(
                p
                for k, p in block.named_parameters()
                if "experts" not in k and p.dim() == 2 and p.shape == rows[name][kept].shape
            )
            assert torch.equal(row, rows[name][kept])
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(model))
    record = json.loads((tmp_path / "config.json").read_text())["hf_sparse_experts"]["merged"]
    assert record["groups"] == report.groups and record["router"] == router


def test_dominant_router_with_uneven_layers_reloads(tmp_path):
    import hf_sparse  # noqa: F401  registers the loader of uneven layers

    pytest.importorskip("hf_sparse.integrations.uneven_experts")
    model = build("qwen3", seed=5)
    report = merge_experts(model, tokens(12), 0.5, router="dominant")
    assert len(set(report.distinct.values())) > 1
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded), logits(model))


def test_a_group_without_tokens_is_averaged_equally():
    model = build("mixtral")
    for name in blocks(model):  # experts 3 to 5 far below the others, and alike: no token is sent there
        block = model.get_submodule(name)
        block.gate.weight.data[3:] = 1e-3 * block.gate.weight.data[3]
        for parameter in block.experts.parameters():
            parameter.data[4:] = parameter.data[3] + 1e-4 * torch.randn(parameter.data[4:].shape)
    before = {name: e.down_proj.clone() for name, e in blocks(model).items()}
    counts = {n: s["count"] for n, s in score_experts(model, tokens(1, 2)).statistics.items()}
    report = merge_experts(model, tokens(1, 2), 0.34, method="hc-smoe")  # 2 of 6: the three alike become one
    checked = 0
    for name, experts in blocks(model).items():
        if [3, 4, 5] in [sorted(g) for g in report.groups[name]] and counts[name][3:].sum() == 0:
            assert torch.allclose(experts.down_proj[3], before[name][3:].mean(0), atol=1e-6)
            checked += 1
    assert checked and "averaged equally" in report.notes[0]


def test_half_precision_and_training_mode_survive():
    model = build("qwen3", moe_intermediate_size=16).to(torch.bfloat16).train()  # rows of 16 bytes
    model.model.layers[0].eval()
    merge_experts(model, tokens(), 0.5, storage="cpu")
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert bool(logits(model).isfinite().all())


def test_report_is_saved(tmp_path):
    model = build("qwen3")
    report = merge_experts(model, tokens(), 0.5, method="hc-smoe")
    report.save(tmp_path / "merged.json")
    content = json.loads((tmp_path / "merged.json").read_text())
    assert (
        content["groups"] == report.groups and content["sparsity"] == 0.5 and set(content["distinct"].values()) == {4}
    )


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\); got 1.0"),
        (
            {"sparsity": 0.5, "method": "zipit"},
            "unknown method of merging experts 'zipit'; known are m-smoe and hc-smoe",
        ),
        ({"sparsity": 0.5, "router": "sum"}, "unknown router 'sum'; known are keep and dominant"),
        ({"sparsity": 0.5, "allocation": "owl"}, "unknown allocation"),
        ({"sparsity": 0.5, "method": "hc-smoe", "allocation": "global"}, "hc-smoe clusters layer by layer"),
        ({"sparsity": 0.9, "router": "dominant"}, "at least 2 experts"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, message):
    model = build("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        merge_experts(model, tokens(), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_uneven_groups_of_a_group_limited_router():
    model = build("deepseek")
    for name in blocks(model):
        model.get_submodule(name).gate.e_score_correction_bias[:4] += 10.0  # all tokens go to the first group
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"2 groups of equal size.*router='keep' keeps all rows"):
        merge_experts(model, tokens(), 0.5, allocation="uniform", router="dominant")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert merge_experts(model, tokens(), 0.5, allocation="uniform").sparsity == 0.5


def test_bad_models_and_data():
    dense = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    with pytest.raises(ValueError, match="no mixture of experts"):
        merge_experts(dense, tokens(), 0.5)
    model = build("qwen3")
    with pytest.raises(ValueError, match="no calibration data"):
        merge_experts(model, [], 0.5)
    ids = tokens(2, 8)
    with pytest.raises(ValueError, match="all tokens are padding"):
        merge_experts(model, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, 0.5)
    with pytest.raises(ValueError, match="64 rows"):
        merge_experts(model, ids + 64, 0.5)
    next(iter(blocks(model).values())).down_proj.data[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="down_proj holds values that are NaN"):
        merge_experts(model, tokens(), 0.5)
