"""The engine in a custom loop: what is zero stays zero, counts are exact, gradients are masked before anybody clips."""

import copy
import math

import pytest
import torch
from transformers.optimization import Adafactor

from hf_sparse import SparsityConfig, densify, prune, sparsify
from hf_sparse.masks import Masks
from hf_sparse.methods import METHODS
from hf_sparse.patterns import parse, pruned_count
from hf_sparse.saliency import noise
from hf_sparse.targets import find_targets

EVERY = 3
END = 9


def config(method: str, **fields) -> SparsityConfig:
    schedule = {} if method == "static" else {"every": EVERY, "end": END}
    if method == "granet":
        schedule["ramp_end"] = 6
    schedule |= fields.pop("schedule", {})
    sparsity = fields.pop("sparsity", None if method == "sr-ste" else 0.75)
    return SparsityConfig(method=method, sparsity=sparsity, schedule=schedule, **fields)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def batch(index: int, size: int = 4) -> torch.Tensor:
    return torch.randint(0, 64, (size, 12), generator=torch.Generator().manual_seed(index))


def train(model, optimizer, steps: int, watch=None, accumulate: int = 1) -> None:
    for index in range(steps):
        for micro in batch(index).chunk(accumulate):
            (model(input_ids=micro, labels=micro).loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(index + 1)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw fused": lambda model: adamw(model, fused=True),
    "adamw foreach": lambda model: adamw(model, foreach=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=1e-2, relative_step=False, beta1=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["static", "rigl", "gmp", "top-kast"])
def test_pruned_weights_are_exactly_zero_after_every_step(tiny_model, method, optimizer):
    model = tiny_model("llama")
    chosen = OPTIMIZERS[optimizer](model)
    training = sparsify(model, config(method), chosen)

    def watch(step):
        for weight in training.weights:
            pruned = model.get_parameter(weight.name).detach()[~weight.mask]
            assert torch.equal(pruned, torch.zeros_like(pruned)) and not torch.signbit(pruned).any()

    train(model, chosen, 10, watch)
    assert training.step == 10


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact_at_every_step(tiny_model, family, method):
    model = tiny_model(family)
    optimizer = adamw(model)
    training = sparsify(model, config(method), optimizer)
    initial = training.options.get("initial_sparsity")

    def watch(step):
        target = 0.75 if method != "sr-ste" else 0.5
        if initial is not None:
            end = training.timetable.ramp.end
            last = step if step == END else step // EVERY * EVERY
            last = min(last, END)
            target = 0.75 + (initial - 0.75) * (1 - min(1.0, last / end)) ** 3
        total = sum(weight.numel for weight in training.weights)
        zeros = sum(int((~weight.mask).sum()) for weight in training.weights)
        if method == "srigl":  # the fan-in of a layer is a whole number
            for weight in training.weights:
                for matrix in weight.target.matrix(weight.mask).reshape(-1, *weight.target.shape[-2:]):
                    fan_in = matrix.sum(dim=1)
                    assert fan_in[fan_in > 0].unique().numel() == 1
        elif method == "granet":
            assert abs(zeros - target * total) <= len(training.weights)  # each weight's share is rounded
        else:
            for weight in training.weights:
                share = weight.sparsity / training.config.sparsity * target
                assert int((~weight.mask).sum()) == pruned_count(share, weight.numel), weight.name
        assert sum(w.kept for w in training.weights) == total - zeros
        if method == "sr-ste":
            assert all(parse("2:4").check(w.target.matrix(w.values())) for w in training.weights)

    watch(0)
    train(model, optimizer, 10, watch)
    found = training.metrics()
    if METHODS[method].is_dynamic:
        assert found["mask_updates"] == 3


def test_the_first_masks_are_what_they_say(tiny_model):
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    training = sparsify(model, config("static", seed=5))
    for weight in training.weights:
        scores = noise(weight.parameter.shape, f"5/{weight.name}")
        assert torch.equal(weight.mask, parse("unstructured").mask(scores, 0.75))
        assert torch.equal(weight.parameter, dense.get_parameter(weight.name) * weight.mask)
    untouched = set(dict(model.named_parameters())) - {weight.name for weight in training.weights}
    assert untouched and all(torch.equal(model.get_parameter(n), dense.get_parameter(n)) for n in untouched)
    other = sparsify(copy.deepcopy(dense), config("static", saliency="magnitude", pattern="2:4", sparsity=None))
    for weight in other.weights:
        assert torch.equal(weight.mask, parse("2:4").mask(dense.get_parameter(weight.name).abs(), 0.5))


def test_without_a_config_the_zeros_stay(tiny_model):
    model = tiny_model("gpt2")
    prune(model, SparsityConfig(sparsity=0.6, overrides={"c_proj": 0.0}, provenance={"base_model": "x"}))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model)
    training = sparsify(model, None, optimizer)
    assert {w.target.kind for w in training.weights} == {"c_attn", "c_fc"}, "dense weights are not masked"
    assert training.config.sparsity == pytest.approx(0.6, abs=1e-4)
    assert training.config.provenance["base_model"] == "x"
    train(model, optimizer, 3)
    for weight in training.weights:
        assert torch.equal(weight.parameter != 0, before[weight.name] != 0)
    assert not torch.equal(model.transformer.h[0].mlp.c_proj.weight, before["transformer.h.0.mlp.c_proj.weight"])


def test_gradients_are_masked_before_clipping(tiny_model):
    """The norm that is clipped is that of the weights that train, on the step before an update too."""
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = sparsify(model, config("rigl"), optimizer)
    for index in range(7):
        tokens = batch(index)
        reference.load_state_dict({k: v for k, v in model.state_dict().items() if k in reference.state_dict()})
        reference.zero_grad()
        reference(input_ids=tokens, labels=tokens).loss.backward()
        masks = Masks.attached(model)
        squares = [(p.grad * masks.get(n, 1.0)).double().square().sum() for n, p in reference.named_parameters()]
        model(input_ids=tokens, labels=tokens).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        assert float(norm) == pytest.approx(float(sum(squares).sqrt()), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    assert training.metrics()["mask_updates"] == 2


@pytest.mark.parametrize("accumulate", [1, 4])
def test_rigl_grows_by_the_dense_gradient(tiny_model, accumulate):
    """The masks after an update, from first principles: a dense copy's gradient over the whole accumulated batch."""
    model = tiny_model("llama").double()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    training = sparsify(model, config("rigl", allocation="uniform"), optimizer)
    train(model, optimizer, EVERY - 1, accumulate=accumulate)
    before = {weight.name: weight.mask.clone() for weight in training.weights}
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if k in reference.state_dict()})
    tokens = batch(EVERY)
    for micro in tokens.chunk(accumulate):
        (reference(input_ids=micro, labels=micro).loss / accumulate).backward()
        (model(input_ids=micro, labels=micro).loss / accumulate).backward()
    norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), 1e-3
    )  # must not shrink the scores of some candidates only
    values = {weight.name: weight.parameter.detach().clone() for weight in training.weights}
    optimizer.step()
    alpha = 0.15 * (1 + math.cos(math.pi * EVERY / END))
    moved = 0
    for weight in training.weights:
        old, gradient = before[weight.name], reference.get_parameter(weight.name).grad
        stepped = values[weight.name] - 0.05 * 1e-3 / (norm + 1e-6) * gradient * old
        change = int(alpha * int(old.sum()))
        survivors = old.clone().flatten()
        survivors[torch.where(old, stepped.abs(), torch.inf).flatten().argsort()[:change]] = False
        steepest = torch.where(survivors, -torch.inf, gradient.abs().flatten()).argsort(descending=True)
        expected = survivors.clone()
        expected[steepest[:change]] = True
        assert torch.equal(weight.mask, expected.reshape(old.shape))
        torch.testing.assert_close(weight.values(), torch.where(weight.mask & old, stepped, 0.0))
        moved += int((weight.mask & ~old).sum())
    assert moved > 100


def test_a_grown_weight_starts_at_zero_with_zero_moments(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model)
    training = sparsify(model, config("set"), optimizer)
    train(model, optimizer, EVERY - 1)
    before = {weight.name: weight.mask.clone() for weight in training.weights}
    seen = 0
    train(model, optimizer, 1)
    for weight in training.weights:
        grown, gone = weight.mask & ~before[weight.name], before[weight.name] & ~weight.mask
        seen += int(grown.sum())
        state = optimizer.state[weight.parameter]
        for changed in (grown, gone):
            assert not weight.parameter[changed].any()
            assert not state["exp_avg"][changed].any() and not state["exp_avg_sq"][changed].any()
        stayed = weight.mask & before[weight.name]
        assert state["exp_avg_sq"][stayed].all()
    assert seen > 100
    train(model, optimizer, 1)
    assert all(weight.parameter[weight.mask & ~before[weight.name]].ne(0).any() for weight in training.weights)


def test_masks_do_not_depend_on_the_loops_random_state(tiny_model):
    masks = []
    for seed in (0, 99):
        model = tiny_model("llama")
        optimizer = adamw(model)
        training = sparsify(model, config("set"), optimizer)
        torch.manual_seed(seed)
        train(model, optimizer, 7)
        masks.append([weight.mask for weight in training.weights])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_ever_active_is_the_union(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model)
    training = sparsify(model, config("set"), optimizer)
    union = [weight.mask.clone() for weight in training.weights]

    def watch(step):
        for weight, ever in zip(training.weights, union, strict=True):
            ever |= weight.mask

    train(model, optimizer, 10, watch)
    found = training.metrics()
    total = sum(ever.numel() for ever in union)
    assert found["ever_active"] == sum(int(ever.sum()) for ever in union) / total > found["density"]


def test_global_pruning_ranks_all_weights_together(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(3.0)  # the first layer matters more
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = sparsify(model, config("gmp", schedule={"scope": "global"}), optimizer)
    dense = {weight.name: weight.parameter.detach().clone() for weight in training.weights}
    train(model, optimizer, END)
    everything = torch.cat([value.abs().flatten() for value in dense.values()])
    threshold = everything.sort().values[pruned_count(0.75, len(everything))]
    for weight in training.weights:
        assert torch.equal(weight.mask, dense[weight.name].abs() >= threshold)
    assert training.weights[0].kept > 1.5 * training.weights[-1].kept


def test_straight_through_equals_the_written_out_loop(tiny_model):
    """SR-STE as the paper writes it: forward with the masked weight, gradient and decay on the dense one."""
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = sparsify(model, config("sr-ste", schedule={"every": 1, "decay": 0.01}), optimizer)
    names = [weight.name for weight in training.weights]
    dense = {name: reference.get_parameter(name).detach().clone() for name in names}
    momentum = {}
    rest = {n: p for n, p in reference.named_parameters() if n not in dense}
    for index in range(4):
        tokens = batch(index)
        masks = {name: parse("2:4").mask(value.abs()) for name, value in dense.items()}
        with torch.no_grad():
            for name in names:
                reference.get_parameter(name).copy_(dense[name] * masks[name])
        reference.zero_grad()
        reference(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in reference.named_parameters():
            gradient = parameter.grad
            if name in dense:
                gradient = gradient + 0.01 * ~masks[name] * dense[name]
            momentum[name] = gradient.clone() if name not in momentum else 0.9 * momentum[name] + gradient
            value = dense[name] if name in dense else rest[name].data
            value -= 0.1 * momentum[name]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight in training.weights:
        torch.testing.assert_close(weight.companion("dense"), dense[weight.name])
        torch.testing.assert_close(weight.values(), dense[weight.name] * parse("2:4").mask(dense[weight.name].abs()))
    for name in rest:
        torch.testing.assert_close(model.get_parameter(name), rest[name])


def test_top_kast_leaves_what_has_no_gradient_unchanged(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model)
    training = sparsify(model, config("top-kast"), optimizer)
    before = [(w.companion("dense").clone(), w.companion("trained").clone()) for w in training.weights]
    train(model, optimizer, EVERY - 1)
    for weight, (dense, trained) in zip(training.weights, before, strict=True):
        assert int(trained.sum()) == weight.numel - pruned_count(0.5, weight.numel)
        assert not (weight.mask & ~trained).any(), "what the forward uses is trained"
        assert torch.equal(weight.companion("dense")[~trained], dense[~trained])
        assert bool((weight.companion("dense")[trained] != dense[trained]).all())


def test_a_step_the_scaler_skips_moves_nothing(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model)
    training = sparsify(model, config("rigl"), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(index, broken=False):
        loss = scaler.scale(model(input_ids=batch(index), labels=batch(index)).loss)
        loss.backward()
        if broken:
            model.lm_head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for index in range(EVERY - 1):
        step(index)
    before = copy.deepcopy(model.state_dict())
    step(EVERY - 1, broken=True)
    assert training.step == EVERY - 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(EVERY - 1)
    assert training.step == EVERY and training.metrics()["mask_updates"] == 1
    assert any(not torch.equal(w.mask, before[f"{w.name}_mask"]) for w in training.weights)


def test_gradients_that_are_not_finite_move_no_mask(tiny_model):
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = sparsify(model, config("rigl"), optimizer)
    train(model, optimizer, EVERY - 1)
    before = [weight.mask.clone() for weight in training.weights]
    model(input_ids=batch(5), labels=batch(5)).loss.backward()
    training.weights[0].gradient[0, 0] = torch.nan
    optimizer.step()
    assert training.step == EVERY
    assert all(torch.equal(weight.mask, old) for weight, old in zip(training.weights, before, strict=True))


def test_compiled_equals_eager_and_masks_do_not_recompile(tiny_model):
    losses = []
    for compiled in (False, True):
        model = tiny_model("llama")
        optimizer = adamw(model)
        training = sparsify(model, config("rigl", schedule={"every": 2}), optimizer)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        torch._dynamo.utils.counters.clear()
        graphs = []
        for index in range(8):
            loss = run(input_ids=batch(index), labels=batch(index)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if compiled:
            assert graphs[0] >= 1 and graphs[-1] == graphs[0], "a mask that moved compiled the model anew"
        assert training.metrics()["mask_updates"] == 4
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-5)


def test_finish_leaves_a_plain_model(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    plain = set(model.state_dict())
    for method in METHODS:
        optimizer = adamw(model)
        training = sparsify(model, config(method), optimizer)
        train(model, optimizer, 4)
        training.finish()
        assert set(model.state_dict()) == plain and not optimizer._optimizer_step_post_hooks
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        model.save_pretrained(tmp_path / method)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / method, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert SparsityConfig.from_model_config(loaded.config).method == method
        for name, target in find_targets(loaded).items():
            assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), target
        densify(model)


def test_densify_revives_at_exactly_zero(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model)
    training = sparsify(model, config("static"), optimizer)
    train(model, optimizer, 2)
    zeros = sum(weight.numel - weight.kept for weight in training.weights)
    masks = {weight.name: weight.mask.clone() for weight in training.weights}
    assert densify(model) == zeros
    assert not Masks.attached(model) and not hasattr(model.config, "hf_sparse")
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
    fresh = adamw(model)
    train(model, fresh, 1)
    for name, mask in masks.items():
        assert model.get_parameter(name)[~mask].ne(0).float().mean() > 0.9
    with pytest.raises(ValueError, match="carries no masks"):
        densify(model)


def test_densify_in_the_middle_stops_the_masking(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model)
    training = sparsify(model, config("rigl"), optimizer)
    train(model, optimizer, 4)
    mask, name = training.weights[0].mask.clone(), training.weights[0].name
    densify(model)
    train(model, optimizer, 3)
    assert model.get_parameter(name)[~mask].all() and training.is_over()
    assert not optimizer._optimizer_step_post_hooks


def test_a_training_goes_on_with_its_masks(tiny_model):
    """Sparse pre-training, then sparse fine-tuning: a grown weight that is still zero is not pruned for it."""
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first = sparsify(model, config("set"), optimizer)
    train(model, optimizer, EVERY)
    masks = [weight.mask.clone() for weight in first.weights]
    first.finish()
    second = sparsify(model, None, optimizer)
    assert all(torch.equal(w.mask, mask) for w, mask in zip(second.weights, masks, strict=True))
    assert any((weight.parameter[weight.mask] == 0).any() for weight in second.weights)
    second.finish()
    with pytest.raises(
        ValueError, match=r"already masked by another config \(they differ in .*method.*densify\(model\)"
    ):
        sparsify(model, config("rigl"))


BAD = {
    "no method": (SparsityConfig(), "the config has no training method; choose one of static"),
    "no zeros": (None, "has no zeros to keep: every target is dense"),
    "target": (config("static", targets=["q_prj"]), "'q_prj' matches no parameter of this model; near matches"),
    "pattern": (config("static", pattern="7x7"), "pattern 7x7 does not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_come_before_anything_changes(tiny_model, case):
    wrong, message = BAD[case]
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify(model, wrong)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_frozen_weights(tiny_model):
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"'rigl' trains the masked weights, but .* is frozen; use 'static' or 'gmp'"):
        sparsify(model, config("rigl"))
    assert not Masks.attached(model)
    sparsify(model, config("static"))


def test_optimizers_that_cannot_be_followed(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="object is no torch.optim.Optimizer"):
        sparsify(model, config("static"), object())
    with pytest.raises(ValueError, match="the optimizer does not hold model.layers.0"):
        sparsify(model, config("static"), torch.optim.SGD(model.lm_head.parameters(), lr=0.1))
    assert not Masks.attached(model) and all((parameter != 0).any() for parameter in model.parameters())


class EightBit(torch.optim.Optimizer):
    """An optimizer whose moments are codes."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["codes"] = torch.zeros(parameter.shape, dtype=torch.uint8)


def test_moments_that_cannot_be_reset_are_refused_at_the_first_step(tiny_model):
    model = tiny_model("llama")
    optimizer = EightBit(model.parameters())
    training = sparsify(model, config("static"), optimizer)
    train(model, optimizer, 2)
    training.finish()
    densify(model)
    sparsify(model, config("rigl"), optimizer)
    with pytest.raises(
        ValueError, match="EightBit keeps 'codes' of model.layers.0.* as torch.uint8 .*cannot be set to zero"
    ):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        ({"begin": 0.5, "end": 20}, 100, "'rigl' ends at step 20, before it begins at step 50"),
        ({"end": 0.75}, None, "end=0.75 is a share of training, but the number of steps is not known"),
        ({"end": 0.01, "every": 50}, 1000, "no mask would ever be updated: the schedule runs from step 0 to 10"),
    ],
)
def test_schedules_that_cannot_be(tiny_model, schedule, total, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        sparsify(model, SparsityConfig(method="rigl", schedule=schedule), adamw(model), total_steps=total)
    assert not Masks.attached(model) and model.model.layers[0].mlp.up_proj.weight.all()


def test_a_checkpoint_without_its_masks(tiny_model):
    model = tiny_model("llama")
    dense = copy.deepcopy(model.state_dict())
    training = sparsify(model, config("rigl"))
    model.load_state_dict(dense, strict=False)  # what a Trainer does on resume, from a checkpoint of somebody else
    with pytest.raises(ValueError, match="a checkpoint was loaded without the masks it was trained with"):
        training.start(adamw(model))
