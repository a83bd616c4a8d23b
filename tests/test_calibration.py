"""Calibration against brute force: what hooks on the model's own, undisturbed forward see of every weight's input."""

import numpy
import pytest
import torch
from torch import nn

from hf_sparse.calibration import check_followable, collect, mean_gradients
from hf_sparse.capture import as_batches, capture, find_decoder_layers
from hf_sparse.targets import find_targets

CPU = torch.device("cpu")
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi",
    "gpt_neox",
    "gpt2",
    "opt",
    "qwen3_moe",
    "mixtral",
]
LENGTH = 40  # longer than the sliding windows of 32, so that kinds of layers differ


def build(tiny_model, family: str):
    if family not in ("gpt_oss", "lfm2"):
        return tiny_model(family)
    from transformers import AutoModelForCausalLM, GptOssConfig, Lfm2Config

    if family == "lfm2":  # layers of convolutions between layers of attention
        config = Lfm2Config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    attention = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=16)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)
    config = GptOssConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, **attention, **experts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():  # random biases, or forgetting them would not show
            if name.endswith("_bias"):
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokens(samples=3, length=LENGTH, seed=0) -> torch.Tensor:
    return torch.randint(3, 320, (samples, length), generator=torch.Generator().manual_seed(seed))


def calibrate(model, batches, needs="hessian", **options):
    """All layers in turn, none pruned: ``({name: statistics}, final hidden states per batch, captured)``."""
    targets = find_targets(model)
    name, layers = find_decoder_layers(model)
    captured = capture(model, name, layers, batches, CPU, CPU)
    found = {}
    for index, layer in enumerate(layers):
        mine = {n: t for n, t in targets.items() if n.startswith(f"{name}.{index}.")}
        found.update(collect(captured, index, layer, mine, needs, **options))
        captured.advance(index, layer)
    return found, captured.hidden, captured


def swiglu_of_gpt_oss(gate_up, experts):
    gate, up = gate_up[0::2].clip(max=experts.limit), gate_up[1::2].clip(-experts.limit, experts.limit)
    return (up + 1) * gate / (1 + numpy.exp(-experts.alpha * gate))


def silu_gate(gate_up, experts):
    gate, up = numpy.split(gate_up, 2)
    return gate / (1 + numpy.exp(-gate)) * up


@torch.no_grad()
def brute_force(model, batches) -> tuple[dict, list[torch.Tensor]]:
    """``({target name: [rows] or {expert: [rows]}} without padding, the last layer's outputs)`` of the stock forward."""
    rows, current, handles, final = {}, {}, [], []
    targets = find_targets(model)

    def keep_rows(x):
        x = x.reshape(-1, x.shape[-1]).double().numpy()
        return x if "mask" not in current else x[current["mask"]]

    def on_linear(target):
        def hook(module, args):
            rows.setdefault(target.name, []).extend(keep_rows(args[0]))

        return hook

    def on_experts(first, second):
        gate = swiglu_of_gpt_oss if first.layout == "transposed" else silu_gate

        def hook(module, args):
            """One token and one expert at a time, in NumPy."""
            hidden, index = keep_rows(args[0]), keep_rows(args[1]).astype(int)
            weight = first.matrix(model.get_parameter(first.name)).double().numpy()
            bias = getattr(module, "gate_up_proj_bias", None)
            for x, chosen in zip(hidden, index, strict=True):
                for expert in chosen:
                    up = weight[expert] @ x + (0 if bias is None else bias[expert].double().numpy())
                    rows.setdefault(first.name, {}).setdefault(expert, []).append(x)
                    rows.setdefault(second.name, {}).setdefault(expert, []).append(gate(up, module))

        return hook

    for target in targets.values():
        module = model.get_submodule(target.module)
        if not target.is_experts:
            handles.append(module.register_forward_pre_hook(on_linear(target)))
        elif "gate_up" in target.name:
            second = targets[target.name.replace("gate_up", "down")]
            handles.append(module.register_forward_pre_hook(on_experts(target, second)))
    _, layers = find_decoder_layers(model)
    take = lambda module, args, output: final.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handles.append(layers[-1].register_forward_hook(take))
    for batch in batches:
        current.clear()
        if "attention_mask" in batch:
            current["mask"] = batch["attention_mask"].bool().flatten().numpy()
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return rows, final


def assert_sees(statistics, rows, what="hessian"):
    """One Statistics against the list of input rows that brute force collected."""
    assert statistics.tokens == len(rows)
    if not rows:
        return
    x = numpy.stack(rows)
    scale = numpy.square(x).sum(0).max()
    numpy.testing.assert_allclose(statistics.sum_squares.numpy(), numpy.square(x).sum(0), rtol=1e-4, atol=1e-5 * scale)
    if what == "hessian":
        numpy.testing.assert_allclose(statistics.hessian.numpy(), x.T @ x, rtol=1e-4, atol=1e-5 * scale)
    else:
        assert statistics.hessian is None


def compare(found, rows, what="hessian"):
    assert set(found) == set(rows)
    for name, statistics in found.items():
        if isinstance(statistics, list):
            for expert, one in enumerate(statistics):
                assert_sees(one, rows[name].get(expert, []), what)
        else:
            assert_sees(statistics, rows[name], what)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "lfm2"])
def test_statistics_are_those_of_the_models_own_forward(tiny_model, family):
    model = build(tiny_model, family)
    batches = as_batches(tokens(), tokens_per_step=2 * LENGTH)
    assert [len(b["input_ids"]) for b in batches] == [2, 1]
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows, final = brute_force(model, batches)
    found, hidden, _ = calibrate(model, batches)
    compare(found, rows)
    for mine, wanted in zip(hidden, final, strict=True):  # the unpruned chain ends where the model's own layers end
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_on_either_side(tiny_model, family, side):
    model = build(tiny_model, family)
    ids, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    for row, padding in enumerate((0, 7, 30)):
        mask[row, slice(0, padding) if side == "left" else slice(LENGTH - padding, None)] = 0
    ids[mask == 0] = 0
    parts = [slice(0, 2), slice(1, 3)]  # two batches of one shape and different padding
    rows = [{"input_ids": ids[part], "attention_mask": mask[part], "labels": ids[part]} for part in parts]
    batches = as_batches(rows, tokens_per_step=2048)
    assert len(batches) == 2 and set(batches[0]) == {"input_ids", "attention_mask"}
    rows, final = brute_force(model, batches)
    found, hidden, _ = calibrate(model, batches)
    compare(found, rows)
    seen = [one.tokens for one in found.values() if not isinstance(one, list)]
    assert set(seen) == {int(mask[:2].sum() + mask[1:].sum())}
    for part, mine, wanted in zip(parts, hidden, final, strict=True):
        kept = mask[part].bool()
        torch.testing.assert_close(mine[kept], wanted[kept], rtol=1e-4, atol=1e-5)


def test_inputs_without_hessians(tiny_model):
    model = tiny_model("qwen3_moe")
    batches = as_batches(tokens(), 2048)
    rows, _ = brute_force(model, batches)
    found, _, _ = calibrate(model, batches, needs="inputs")
    compare(found, rows, what="inputs")


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_each_kind_of_layer_gets_its_own_mask_and_rotation(tiny_model, family):
    model = build(tiny_model, family)
    _, _, captured = calibrate(model, as_batches(tokens(), 2048), needs="inputs")
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    for other in range(1, len(kinds)):
        first, second = captured.calls[0][0].kwargs, captured.calls[other][0].kwargs
        masks = [(m is None) or m.tolist() for m in (first["attention_mask"], second["attention_mask"])]  # None: causal
        assert (masks[0] == masks[1]) == (kinds[0] == kinds[other])
        if family == "gemma3_text":
            cos = first["position_embeddings"][0], second["position_embeddings"][0]
            assert torch.equal(*cos) == (kinds[0] == kinds[other])


def test_equal_arguments_are_stored_once(tiny_model):
    _, _, captured = calibrate(tiny_model("llama"), as_batches(tokens(6), 2 * LENGTH), needs="inputs")
    cos = {id(call.kwargs["position_embeddings"][0]) for calls in captured.calls for call in calls}
    assert len(captured.hidden) == 3 and len(cos) == 1


@pytest.mark.parametrize(
    "family,shared,others",
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}], {"o_proj", "down_proj"}),
        ("opt", [{"q_proj", "k_proj", "v_proj"}], {"out_proj", "fc1", "fc2"}),
        ("phi", [{"q_proj", "k_proj", "v_proj", "fc1"}], {"dense", "fc2"}),  # parallel: one norm feeds both halves
        ("qwen3_moe", [{"q_proj", "k_proj", "v_proj"}], {"o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_weights_with_one_input_share_one_object(tiny_model, family, shared, others):
    found, _, _ = calibrate(tiny_model(family), as_batches(tokens(), 64))
    for layer in (0, 1):
        groups = {}
        for name, one in found.items():
            if f".{layer}." in name:
                kind = name.removesuffix(".weight").rpartition(".")[2]
                groups.setdefault(id(one), set()).add(kind)
        assert sorted(groups.values(), key=sorted) == sorted([*shared, *({kind} for kind in others)], key=sorted)


def test_grouping_into_batches_does_not_matter(tiny_model):
    model = tiny_model("qwen3_moe")
    ids = tokens(5)
    found = [
        calibrate(model, as_batches(form, step))[0]
        for form, step in [
            (ids, 1),
            (ids, 10**6),
            (list(ids), 2 * LENGTH),
            ([{"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}, {"input_ids": ids[2:]}], 3 * LENGTH),
            ([row.tolist() for row in ids], 2048),
        ]
    ]
    for other in found[1:]:
        for name, one in found[0].items():
            pairs = zip(one, other[name], strict=True) if isinstance(one, list) else [(one, other[name])]
            for a, b in pairs:
                assert a.tokens == b.tokens
                torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-4, atol=1e-4)


def test_as_batches_groups_equal_lengths_and_keeps_every_token():
    batches = as_batches(
        [torch.arange(4), torch.arange(6), torch.arange(4) + 10, {"input_ids": torch.ones(2, 4).long()}], 8
    )
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 4), (2, 4), (1, 6)]
    assert batches[0]["input_ids"].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    from transformers import BatchEncoding

    encoding = BatchEncoding({"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]})
    (batch,) = as_batches(encoding, 8)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    "empty", [[], torch.zeros(0, 5, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), iter(())]
)
def test_no_data_is_an_error(empty):
    with pytest.raises(ValueError, match="there is no calibration data: the batches are empty"):
        as_batches(empty, 8)


@pytest.mark.parametrize(
    "bad,name", [(torch.rand(2, 4), "Tensor"), (["a text"], "str"), ([{"text": "a"}], "dict"), ([1.5], "float")]
)
def test_what_is_not_token_ids_is_an_error(bad, name):
    with pytest.raises(ValueError, match=f"calibration data is token ids or dicts with input_ids, got {name}"):
        as_batches(bad, 8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_the_model_is_left_as_it_was(tiny_model, family):
    model = build(tiny_model, family)
    ids = tokens(1)
    with torch.no_grad():
        wanted = model(ids).logits
    calibrate(model, as_batches(ids, 8))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not module._forward_pre_hooks and not module._forward_hooks, name


def test_the_model_is_left_as_it_was_after_an_error(tiny_llama):
    targets = find_targets(tiny_llama)
    name, layers = find_decoder_layers(tiny_llama)
    with pytest.raises(IndexError):  # a token that is not in the vocabulary
        capture(tiny_llama, name, layers, [{"input_ids": torch.tensor([[99999]])}], CPU, CPU)
    assert not any("forward" in vars(layer) for layer in layers)
    captured = capture(tiny_llama, name, layers, as_batches(tokens(1), 8), CPU, CPU)
    captured.hidden[0][0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"the input of model.layers.0.self_attn.q_proj.weight is not finite"):
        collect(captured, 0, layers[0], {n: t for n, t in targets.items() if ".layers.0." in n}, "hessian")
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_outputs_are_handed_over_batch_by_batch(tiny_llama):
    seen = []
    batches = as_batches(tokens(2), 8)
    _, hidden, _ = calibrate(tiny_llama, batches, on_output=lambda batch, output: seen.append((batch, output)))
    assert [batch for batch, _ in seen] == [0, 1] * 2  # for every layer
    assert torch.equal(seen[-1][1], hidden[1])


def test_an_expert_without_tokens_has_empty_statistics(tiny_model):
    model = tiny_model("qwen3_moe")
    found, _, _ = calibrate(model, as_batches(tokens(1, 1), 8))
    experts = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert sorted(one.tokens for one in experts) == [0, 0, 1, 1]
    assert all((one.hessian is None) == (one.tokens == 0) for one in experts)


def test_decoder_layers_are_found_by_their_number(tiny_model):
    for family, name in (("llama", "model.layers"), ("gpt2", "transformer.h"), ("opt", "model.decoder.layers")):
        model = tiny_model(family)
        assert find_decoder_layers(model)[0] == name
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(
        ValueError, match=r"cannot find the decoder layers of LlamaForCausalLM.*num_hidden_layers=5.*model.layers \(2\)"
    ):
        find_decoder_layers(model)
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="num_hidden_layers=None, .* Lists of modules seen: none"):
        find_decoder_layers(plain)


class _Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.before, self.inner = nn.Linear(2, 2), inner

    def forward(self, hidden):
        return hidden


def test_a_convolution_cannot_be_calibrated():
    model = nn.ModuleDict({"layers": nn.ModuleList([_Block(nn.Conv1d(2, 2, 3))])})
    with pytest.raises(
        ValueError, match=r"layers.0.inner.weight is a convolution; .*ignore=\['layers.0.inner.weight'\]"
    ):
        check_followable(model, find_targets(model))


def test_an_unknown_expert_layout_cannot_be_calibrated():
    inner = nn.Module()
    inner.num_experts, inner.hidden_size = 2, 8
    inner.gate_up_proj, inner.down_proj = nn.Parameter(torch.zeros(2, 24, 8)), nn.Parameter(torch.zeros(2, 8, 12))
    model = nn.ModuleDict({"layers": nn.ModuleList([_Block(inner)])})
    with pytest.raises(
        ValueError, match=r"gate_up_proj, down_proj\) is a fused expert layout .*ignore=\['re:\.\*inner'\]"
    ):
        check_followable(model, find_targets(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mean_gradients(tiny_model, family):
    model = build(tiny_model, family)
    name = next(n for n in find_targets(model) if n.endswith(("up_proj.weight", "c_fc.weight")))
    model.get_parameter(name).requires_grad_(False)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    batches = [{"input_ids": tokens(2, 12, seed=1)}, {"input_ids": ids, "attention_mask": mask}]
    given = mean_gradients(model, batches, [name], CPU)
    assert list(given) == [name] and not model.get_parameter(name).requires_grad
    assert all(p.grad is None for p in model.parameters())
    model.get_parameter(name).requires_grad_(True)
    wanted = torch.zeros_like(model.get_parameter(name))
    for batch in batches:
        logits = model(**batch).logits[:, :-1]
        labels = batch["input_ids"][:, 1:]
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].bool()
        loss = nn.functional.cross_entropy(logits[real], labels[real])
        wanted += torch.autograd.grad(loss, model.get_parameter(name))[0].abs() / 2
    torch.testing.assert_close(given[name], wanted, rtol=1e-4, atol=1e-7)


def test_rows_of_a_dataset_with_padding():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "labels": [5, 6, 7]}, {"input_ids": [1, 2]}]
    batches = as_batches(rows, 100)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(1, 3), (1, 2)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 0]] and "labels" not in batches[0]


def test_a_model_that_works_between_its_layers_is_refused(tiny_model):
    """Recorders see what a layer is given; an addition between two layers would be lost without a word."""
    model = tiny_model("llama")

    class Between(torch.nn.ModuleList):
        def __getitem__(self, index):
            if not isinstance(index, slice):
                return super().__getitem__(index)
            return [self._modules["0"], lambda hidden, **_: hidden + 1, self._modules["1"]]

    model.model.layers = Between(model.model.layers)
    name, layers = find_decoder_layers(model)
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="did not pass its hidden states unchanged"):
        capture(model, name, layers, as_batches(torch.ones(1, 8, dtype=torch.long), 8), device, device)
    assert all("forward" not in vars(layer) for layer in layers)
