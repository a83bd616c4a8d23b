"""Masks: found from zeros, applied exactly, counted, by name and in the stored layout."""

import pytest
import torch

from hf_sparse.masks import Masks
from hf_sparse.patterns import parse
from hf_sparse.targets import find_targets


def test_masks_from_zeros_are_in_the_stored_layout(tiny_model):
    model = tiny_model("gpt2")
    targets = find_targets(model)
    name = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5:9] = 0.0
    masks = Masks.from_zeros(model, targets)
    assert set(masks) == set(targets) and all(m.dtype == torch.bool for m in masks.values())
    assert masks[name].shape == (64, 256) and int((~masks[name]).sum()) == 4 and not masks[name][3, 5:9].any()


def test_apply_zeroes_exactly_the_masked_weights_in_place(tiny_model):
    model = tiny_model("qwen3_moe")
    targets = find_targets(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = Masks()
    for name, target in targets.items():
        stored = model.get_parameter(name)
        masks[name] = target.stored(parse("row").mask(target.matrix(stored.detach()).abs(), 0.5), stored)
    pointers = {name: model.get_parameter(name).data_ptr() for name in masks}
    masks.apply(model)
    for name, parameter in model.named_parameters():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(parameter, expected)
    assert {name: model.get_parameter(name).data_ptr() for name in masks} == pointers
    assert masks.density() == 0.5
    again = Masks.from_zeros(model, targets)
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    masks.apply(model)  # twice is once
    assert all(torch.equal(Masks.from_zeros(model, targets)[name], masks[name]) for name in masks)


def test_infinite_and_negative_weights_become_plus_zero():
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, float("inf"), float("nan")]]))
    Masks(weight=torch.tensor([[False, False, False]])).apply(model)
    assert model.weight.tolist() == [[0.0, 0.0, 0.0]] and not torch.signbit(model.weight).any()


def test_density_counts_weights_not_tensors():
    masks = Masks(a=torch.tensor([True]), b=torch.tensor([[True, False, False], [False, False, False]]))
    assert masks.density() == 2 / 7
    assert Masks().density() == 1.0


def test_a_mask_of_another_shape_is_refused_by_name():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"the mask of weight has shape \(3, 2\), the parameter \(2, 3\)"):
        Masks(weight=torch.ones(3, 2, dtype=torch.bool)).apply(model)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(AttributeError):
        Masks(nothing=torch.ones(1, dtype=torch.bool)).apply(torch.nn.Linear(1, 1))


def test_gradients_still_flow_to_the_parameter_after_apply():
    model = torch.nn.Linear(2, 1, bias=False)
    Masks(weight=torch.tensor([[True, False]])).apply(model)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]  # dense: nothing is hidden from autograd


def test_attached_masks_are_checkpointed_until_they_are_kept_out(tiny_model):
    model = tiny_model("llama")
    targets = find_targets(model)
    plain = set(model.state_dict())
    masks = Masks({name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in targets})
    masks.attach(model)
    assert set(model.state_dict()) == plain | {f"{name}_mask" for name in targets}
    found = Masks.attached(model)
    assert set(found) == set(targets) and all(torch.equal(found[name], masks[name]) for name in targets)
    Masks.keep_out_of_checkpoints(model)
    assert set(model.state_dict()) == plain and len(Masks.attached(model)) == len(targets)
    taken = Masks.detach(model)
    assert set(taken) == set(targets) and not Masks.attached(model)
    assert not any(name.endswith("_mask") for name, _ in model.named_buffers())


def test_a_taken_name_and_a_wrong_shape_change_nothing():
    model = torch.nn.Linear(3, 2)
    model.weight_mask = "mine"
    with pytest.raises(ValueError, match="Linear already has an attribute 'weight_mask'"):
        Masks(weight=torch.ones(2, 3, dtype=torch.bool)).attach(model)
    with pytest.raises(ValueError, match=r"mask of bias has shape \(3,\), the parameter \(2,\)"):
        Masks(bias=torch.ones(3, dtype=torch.bool)).attach(model)
    assert not Masks.attached(model) and model.weight_mask == "mine"
