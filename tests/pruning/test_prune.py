"""The main loop: every family, exact sparsity, error propagation, resume, and errors before any weight is touched."""

import sys

import pytest
import torch

from hf_sparse import SparsityConfig, find_targets, prune
from hf_sparse.pruning.group import fewest_tokens
from hf_sparse.saliency import SALIENCIES


def tokens(samples=8, length=32, seed=0):
    return torch.randint(3, 320, (samples, length), generator=torch.Generator().manual_seed(seed))


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "sparsegpt"])
def test_every_family_reaches_exact_sparsity(any_tiny_model, saliency):
    before = copies(any_tiny_model)
    report = prune(any_tiny_model, SparsityConfig(sparsity=0.5, saliency=saliency), tokens())
    targets = find_targets(any_tiny_model)
    assert report.sparsity == 0.5 and report.conforms
    assert {p.name for p in report.parameters} == set(targets)
    for name, parameter in any_tiny_model.named_parameters():
        if name not in targets:  # embeddings, norms, biases, routers and head are as they were
            assert torch.equal(parameter, before[name]), name
        else:
            zeros = int((parameter == 0).sum())
            assert abs(zeros - parameter.numel() // 2) <= (parameter.shape[0] if parameter.dim() == 3 else 1), name
    assert any_tiny_model(tokens(1)).logits.isfinite().all()


@pytest.mark.parametrize("saliency", ["wanda", "sparsegpt", "alps"])
def test_two_four_in_every_family(any_tiny_model, saliency):
    report = prune(any_tiny_model, SparsityConfig(pattern="2:4", saliency=saliency), tokens())
    assert report.conforms and all(p.two_four for p in report.parameters) and report.sparsity == 0.5


def test_wanda_equals_its_formula_on_propagated_inputs(tiny_model):
    """Layer 1 is scored on what the pruned layer 0 produces, computed here with plain hooks on the finished model."""
    model, ids = tiny_model("llama"), tokens()
    dense = copies(model)
    prune(model, SparsityConfig(sparsity=0.5, saliency="wanda"), ids)
    seen = {}
    # the inputs of layer 1's q_proj do not depend on layer 1's own weights, so the pruned model shows what Wanda saw
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model(ids)
    hook.remove()
    name = "model.layers.1.self_attn.q_proj.weight"
    scores = dense[name].abs() * seen["x"].flatten(0, 1).norm(dim=0)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(1, scores.argsort(dim=1)[:, scores.shape[1] // 2 :], True)
    assert torch.equal(model.get_parameter(name) != 0, kept)
    assert torch.equal(model.get_parameter(name)[kept], dense[name][kept])  # a mask alone moves no weight


def test_reported_errors_are_output_errors(tiny_model):
    model, ids = tiny_model("llama"), tokens()
    dense = copies(model)
    report = prune(model, SparsityConfig(sparsity=0.6, saliency="sparsegpt"), ids)
    seen = {}
    hook = model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    # gate_proj was calibrated on the unpruned attention's output
    name = "model.layers.0.mlp.gate_proj.weight"
    pruned = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        for other, value in dense.items():
            model.get_parameter(other).copy_(value)
    model(ids)
    hook.remove()
    x = seen["x"].flatten(0, 1)
    expected = ((x @ (pruned - dense[name]).T).square().sum() / (x @ dense[name].T).square().sum()).item()
    entry = next(p for p in report.parameters if p.name == name)
    assert entry.error == pytest.approx(expected, rel=1e-3)
    assert set(report.layer_errors) == {0, 1} and all(0 < e < 1 for e in report.layer_errors.values())


def test_repair_lowers_every_error_and_keeps_the_mask(tiny_model):
    plain, repaired = tiny_model("llama"), tiny_model("llama")
    ids = tokens(32)
    reports = [
        prune(model, SparsityConfig(sparsity=0.5, saliency="obs", repair=fit), ids)
        for model, fit in ((plain, False), (repaired, True))
    ]
    first = [{p.name: p for p in report.parameters if p.layer == 0} for report in reports]
    for name, entry in first[0].items():
        assert first[1][name].error < entry.error
        assert torch.equal(plain.get_parameter(name) != 0, repaired.get_parameter(name) != 0)


def test_solvers_rank_as_published(tiny_model):
    """One-shot methods by layer error: magnitude > wanda > sparsegpt > alps (papers' order at 60%)."""
    errors = {}
    for saliency in ("magnitude", "wanda", "sparsegpt", "alps"):
        model = tiny_model("llama", seed=1)
        chosen = saliency
        if saliency in SALIENCIES:  # the same scores, with a Hessian beside them so that their error is known

            def chosen(weight, statistics, _score=SALIENCIES[saliency]):
                return _score(weight, statistics)

            chosen.needs = "hessian"
        report = prune(model, SparsityConfig(sparsity=0.6, saliency=chosen, pattern="row"), tokens(32))
        errors[saliency] = sum(p.error for p in report.parameters if p.layer == 0)
    assert errors["alps"] < errors["sparsegpt"] < errors["wanda"] <= errors["magnitude"]


def test_overrides_allocation_and_ignore(tiny_model):
    model = tiny_model("llama")
    config = SparsityConfig(
        sparsity=0.7,
        saliency="wanda",
        allocation="erk",
        overrides={"re:.*down_proj": 0.2, "o_proj": "2:4"},
        ignore=["v_proj"],
    )
    report = prune(model, config, tokens())
    by_kind = report.by_kind()
    assert "v_proj" not in by_kind and model.model.layers[0].self_attn.v_proj.weight.count_nonzero() == 64 * 32
    assert by_kind["down_proj"]["density"] == pytest.approx(0.8, abs=1e-3)
    assert by_kind["o_proj"]["density"] == 0.5 and by_kind["o_proj"]["two_four"]
    rest = [p for p in report.parameters if p.kind not in ("down_proj", "o_proj")]
    assert sum(round((1 - p.density) * p.numel) for p in rest) == round(0.7 * sum(p.numel for p in rest))
    assert len({round(p.density, 3) for p in rest}) > 1  # erk is not uniform


def test_owl_averages_to_the_target_and_varies_by_layer(tiny_model):
    model = tiny_model("llama", num_hidden_layers=4)
    with torch.no_grad():  # make one layer outlier-rich
        model.model.layers[2].mlp.gate_proj.weight[:, :2] *= 50
    config = SparsityConfig(sparsity=0.6, saliency="wanda", allocation="owl", allocation_options={"lam": 0.1})
    report = prune(model, config, tokens())
    by_layer = {i: [p.density for p in report.parameters if p.layer == i] for i in range(4)}
    assert sum(round((1 - p.density) * p.numel) for p in report.parameters) == round(
        0.6 * sum(p.numel for p in report.parameters)
    )
    assert min(by_layer[2]) > max(max(by_layer[i]) for i in (0, 1, 3))


def test_mix_of_n_m_keeps_the_average(tiny_model):
    model = tiny_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[:, :2] *= 50
    config = SparsityConfig(pattern="4:8", saliency="wanda", allocation="owl", allocation_options={"lam": 0.2})
    report = prune(model, config, tokens())
    assert len({p.pattern for p in report.parameters}) > 1 and all(p.pattern.endswith(":8") for p in report.parameters)
    assert report.conforms and report.sparsity == pytest.approx(0.5, abs=0.02)


def test_gradient_saliencies(tiny_model):
    model, ids = tiny_model("llama"), tokens(4)
    dense = copies(model)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = torch.zeros(dense[name].numel())
    for row in ids:  # a mean over samples, however they are batched
        model(input_ids=row[None], labels=row[None]).loss.backward()
        expected += (model.get_parameter(name).grad.abs() * dense[name].abs()).flatten()
        model.zero_grad(set_to_none=True)
    prune(model, SparsityConfig(sparsity=0.25, saliency="taylor"), ids)
    dropped = (model.get_parameter(name) == 0).flatten()
    assert expected[dropped].max() <= expected[~dropped].min() * (1 + 1e-4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_experts_with_few_tokens_fall_back_and_say_so(tiny_model):
    model = tiny_model("qwen3_moe")
    with torch.no_grad():  # nobody is routed to expert 3
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[0] = 100 * layer.mlp.gate.weight[0]
    dense = copies(model)
    report = prune(model, SparsityConfig(sparsity=0.5, saliency="sparsegpt"), tokens(1, 6))
    noted = [p for p in report.parameters if p.note]
    assert noted and all("magnitude" in p.note and "of 4 experts" in p.note for p in noted)
    name = next(p.name for p in noted)
    starved = [e for e in range(4) if torch.equal((w := model.get_parameter(name)[e])[w != 0], dense[name][e][w != 0])]
    assert starved  # magnitude moves no weight
    assert fewest_tokens(4096) == 128


def test_padding_does_not_count(tiny_model):
    ids = tokens(4, 24)
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(4, 24, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long)], dim=1)
    models = tiny_model("llama"), tiny_model("llama")
    prune(models[0], SparsityConfig(saliency="sparsegpt"), ids)
    prune(models[1], SparsityConfig(saliency="sparsegpt"), {"input_ids": padded, "attention_mask": mask})
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


def test_callable_saliency_and_config_record(tiny_model, tmp_path):
    def inverse_magnitude(weight, statistics):
        return -weight.abs()

    model = tiny_model("llama")
    dense = copies(model)
    prune(model, SparsityConfig(sparsity=0.1, saliency=inverse_magnitude), tokens())
    name = "model.layers.0.self_attn.k_proj.weight"
    dropped = model.get_parameter(name) == 0
    assert dense[name][dropped].abs().min() >= dense[name][~dropped].abs().max()
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hf_sparse["saliency"].endswith("inverse_magnitude")
    for (_, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class Interrupted(Exception):
    pass


def test_interrupted_run_continues_with_the_same_result(tiny_model, tmp_path, monkeypatch):
    ids, config = tokens(), SparsityConfig(sparsity=0.5, saliency="sparsegpt")
    whole = tiny_model("llama", num_hidden_layers=3)
    reference = prune(whole, config, ids)
    module = sys.modules["hf_sparse.pruning.prune"]
    collect, calls = module.collect, []

    def failing(captured, index, *rest):
        if index == 2 and not calls:
            calls.append(index)
            raise Interrupted
        return collect(captured, index, *rest)

    monkeypatch.setattr(module, "collect", failing)
    progress = tmp_path / "progress"
    with pytest.raises(Interrupted):
        prune(tiny_model("llama", num_hidden_layers=3), config, ids, resume_dir=progress)
    assert sorted(p.name for p in progress.iterdir()) == ["layer-00000", "layer-00001", "run.json"]

    with pytest.raises(ValueError, match="another run: its config differ"):
        other = SparsityConfig(sparsity=0.6, saliency="sparsegpt")
        prune(tiny_model("llama", num_hidden_layers=3), other, ids, resume_dir=progress)
    with pytest.raises(ValueError, match="calibration data"):
        prune(tiny_model("llama", num_hidden_layers=3), config, tokens(seed=9), resume_dir=progress)

    continued = tiny_model("llama", num_hidden_layers=3)
    report = prune(continued, config, ids, resume_dir=progress)
    for (name, a), b in zip(whole.named_parameters(), continued.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert report.layer_errors == pytest.approx(reference.layer_errors)
    assert [p.error for p in report.parameters] == pytest.approx([p.error for p in reference.parameters])


@pytest.mark.parametrize(
    ("config", "batches", "message"),
    [
        (dict(saliency="wanda"), None, "give calibration batches"),
        (dict(saliency="magnitude", repair=True), None, "and repair looks at data"),
        (dict(saliency="magnitude", targets=["q_prj"]), None, "near matches: .*q_proj"),
        (dict(saliency="magnitude", pattern="2:5"), None, "not a multiple of 5"),
        (dict(saliency="magnitude", pattern="24x24"), None, "whole 24x24 blocks"),
        (dict(saliency="magnitude", allocation="owl2"), None, "unknown allocation"),
        (dict(saliency="wanda", targets=["lm_head"]), "ids", "outside"),
        (dict(saliency="sparsegpt", pattern="channel"), "ids", "whole channels"),
        (dict(saliency="taylor", repair=True), "ids", "does not combine"),
        (dict(saliency="magnitude", allocation={"q_proj": 0.5}), None, "says nothing about"),
    ],
)
def test_errors_come_before_any_change(tiny_model, config, batches, message):
    model = tiny_model("llama")
    before = copies(model)
    with pytest.raises(ValueError, match=message):
        prune(model, SparsityConfig(**config), tokens() if batches else None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_nan_weights_are_named(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 values that are NaN"):
        prune(model, SparsityConfig(saliency="magnitude"))


def test_bfloat16_model_keeps_its_dtype(tiny_model):
    model = tiny_model("llama").to(torch.bfloat16)
    report = prune(model, SparsityConfig(saliency="sparsegpt"), tokens())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.sparsity == pytest.approx(0.5, abs=1e-4) and report.conforms


def test_training_mode_is_restored_and_hooks_are_gone(tiny_model):
    model = tiny_model("llama").train()
    prune(model, SparsityConfig(saliency="sparsegpt"), tokens())
    assert model.training
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in vars(module)


def test_gradients_of_a_tied_head_and_gradients_that_were_there(tiny_model):
    config, ids = SparsityConfig(saliency="taylor", targets=["lm_head", "up_proj"]), tokens(2)
    models = [tiny_model("llama", tie_word_embeddings=True) for _ in range(2)]
    stale = torch.full_like(models[0].lm_head.weight, 100.0)
    models[0].lm_head.weight.grad = stale
    for model in models:
        prune(model, config, ids)
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert models[0].lm_head.weight.grad is stale
    unused = torch.ones(320, dtype=torch.bool).index_fill(0, ids.unique(), False)
    zeros = (models[0].lm_head.weight == 0).float().mean(dim=1)
    assert zeros[~unused].mean() < zeros[unused].mean() < 1  # by its gradients, not by its index


def test_modules_keep_their_mode_and_their_own_forward(tiny_model):
    model, calls = tiny_model("llama").train(), []
    first, second = model.model.layers
    second.eval()
    stock = first.forward

    def forward(*arguments, **named):
        calls.append(1)
        return stock(*arguments, **named)

    first.forward = forward  # as accelerate's hooks do
    prune(model, SparsityConfig(saliency="wanda"), tokens())
    assert first.training and not second.training
    assert first.forward is forward and calls and "forward" not in vars(second)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (tokens() + 300, "token ids from 30. to 6.., but the model's embedding has 320 rows"),
        (tokens(2, 600), "the model has 512 positions; calibration sequences of 600"),
    ],
)
@pytest.mark.parametrize("name", ["wanda", "taylor"])
def test_tokens_the_model_cannot_take(tiny_model, ids, message, name):
    with pytest.raises(ValueError, match=message):
        prune(tiny_model("llama"), SparsityConfig(saliency=name), ids)


def test_quantized_and_unloaded_weights_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(128, 64, dtype=torch.int8), False)
    with pytest.raises(ValueError, match=r"up_proj.weight is stored as int8: a quantized model"):
        prune(model, SparsityConfig())
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="weights on the meta device"):
        prune(model, SparsityConfig())


def test_data_that_is_not_looked_at_is_not_reported(tiny_model):
    assert prune(tiny_model("llama"), SparsityConfig(), tokens()).calibration == {}


def test_a_dense_override_conforms(tiny_model):
    report = prune(tiny_model("llama"), SparsityConfig(pattern="2:4", overrides={"down_proj": 0.0}))
    assert report.conforms and report.by_kind()["down_proj"]["density"] == 1.0


def test_damp_reaches_obs(tiny_model):
    models = [tiny_model("llama") for _ in range(2)]
    for model, damp in zip(models, (0.01, 100.0), strict=True):
        prune(model, SparsityConfig(saliency="obs", damp=damp), tokens())
    assert not torch.equal(models[0].model.layers[0].mlp.up_proj.weight, models[1].model.layers[0].mlp.up_proj.weight)


def test_permute_looks_at_data_and_moves_dense_producers_too(tiny_model):
    config = SparsityConfig(pattern="2:4", permute=True, targets=["down_proj"])
    with pytest.raises(ValueError, match="and permute looks at data"):
        prune(tiny_model("llama"), config)
    model = tiny_model("llama")
    dense = copies(model)
    prune(model, config, tokens())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(name), dense[name])
    rows = [sorted(map(tuple, weight.tolist())) for weight in (model.get_parameter(name), dense[name])]
    assert rows[0] == rows[1]  # the same rows in another order
    with pytest.raises(ValueError, match="permute finds nothing to reorder"):
        prune(tiny_model("llama"), SparsityConfig(pattern="2:4", permute=True, targets=["q_proj"]), tokens())


def test_resume_in_another_dtype_is_another_run(tiny_model, tmp_path):
    config, ids = SparsityConfig(saliency="wanda"), tokens()
    model = tiny_model("llama").to(torch.bfloat16)
    prune(model, config, ids, resume_dir=tmp_path / "progress")
    with pytest.raises(ValueError, match="another run: its model"):
        same = tiny_model("llama").to(torch.bfloat16).float()
        prune(same, config, ids, resume_dir=tmp_path / "progress")
