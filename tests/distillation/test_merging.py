"""Merging against the formula by hand, geometry, and models that load what was written."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_sparse.distillation.merging import lerp, merge_checkpoints, merge_tensors, slerp


def vector(*values):
    return torch.tensor(values)


def test_slerp_turns_on_the_circle():
    a, b = vector(1.0, 0.0), vector(0.0, 1.0)
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = vector(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))
        torch.testing.assert_close(slerp(a, b, t), expected, atol=1e-6, rtol=0)
    # the ends are not normalised: halfway between 3 a and b at a right angle is (3 a + b) / sqrt 2
    torch.testing.assert_close(slerp(3 * a, b, 0.5), vector(3.0, 1.0) / math.sqrt(2))
    # a matrix is one vector: rows do not turn on their own
    both = slerp(torch.stack([a, b]), torch.stack([b, a]), 0.5)
    torch.testing.assert_close(both, torch.full((2, 2), 1 / math.sqrt(2)))


def test_slerp_of_nearly_parallel_vectors_is_lerp():
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for near in (a + 1e-3, -a + 1e-3, 2 * a, torch.zeros(1000)):
        torch.testing.assert_close(slerp(a, near, 0.3), 0.7 * a + 0.3 * near)
    # on both sides of the border the two formulas agree
    side = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    side -= a * (side @ a) / (a @ a)
    side *= a.norm() / side.norm()
    for cosine in (0.99949, 0.99951):
        b = cosine * a + math.sqrt(1 - cosine**2) * side
        torch.testing.assert_close(slerp(a, b, 0.5), (a + b) / 2, atol=1e-3, rtol=1e-3)


def test_more_than_two_and_weights():
    a, b, c = vector(1.0, 0.0, 0.0), vector(0.0, 1.0, 0.0), vector(0.0, 0.0, 1.0)
    torch.testing.assert_close(lerp([a, b, c], [0.5, 0.25, 0.25]), vector(0.5, 0.25, 0.25))
    merged, turned = merge_tensors([a, b, c], [1 / 3] * 3, "slerp")
    torch.testing.assert_close(merged, slerp(slerp(a, b, 0.5), c, 1 / 3))
    assert turned
    torch.testing.assert_close(merge_tensors([a, b], [1.0, 0.0], "slerp")[0], a)


def test_task_vectors_turn_where_weights_do_not():
    base = 100 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    one, two = torch.zeros(500), torch.zeros(500)
    one[0], two[1] = 1.0, 1.0  # task vectors at a right angle
    siblings = [base + one, base + two]
    assert not merge_tensors(siblings, [0.5, 0.5], "slerp")[1]
    merged, turned = merge_tensors(siblings, [0.5, 0.5], "task-slerp", base)
    assert turned
    torch.testing.assert_close(merged - base, (one + two) / math.sqrt(2), atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["lerp", "slerp", "task-slerp"])
def test_zeros_of_all_stay_zero(method):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 64, generator=generator)
    mask = torch.rand(64, 64, generator=generator) < 0.5
    siblings = [(base + torch.randn(64, 64, generator=generator)) * mask for _ in range(2)]
    merged, _ = merge_tensors(siblings, [0.3, 0.7], method, base if method == "task-slerp" else None)
    assert torch.equal(merged != 0, mask)


CONFIG = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    """A parent and two fine-tuned copies with one mask, saved; the second in several shards and bfloat16's own files."""
    root = tmp_path_factory.mktemp("siblings")
    torch.manual_seed(0)
    parent = LlamaForCausalLM(LlamaConfig(**CONFIG))
    parent.save_pretrained(root / "parent")
    models = []
    masks = {n: torch.rand_like(p) < 0.5 for n, p in parent.named_parameters() if "proj" in n}
    for number in range(2):
        model = copy.deepcopy(parent)
        for name, parameter in model.named_parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
            if name in masks:
                parameter.data.mul_(masks[name])
        options = {"max_shard_size": "40KB"} if number else {}
        model.save_pretrained(root / f"child{number}", **options)
        models.append(model)
    return root, parent, models


@pytest.mark.parametrize("method", ["lerp", "slerp", "task-slerp"])
def test_directories(siblings, method, tmp_path):
    root, parent, models = siblings
    folders = [root / "child1", root / "child0"]  # the first is the one in shards
    options = {"base": root / "parent"} if method == "task-slerp" else {}
    report = merge_checkpoints(folders, tmp_path / "out", method=method, weights=[3, 1], **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    origin = dict(parent.named_parameters())
    zeros = 0
    for name, value in loaded.named_parameters():
        pair = [model.get_parameter(name) for model in models[::-1]]
        if method == "lerp":
            expected = 0.75 * pair[0] + 0.25 * pair[1]
        elif method == "slerp":
            expected = slerp(*pair, 0.25)
        else:
            expected = origin[name] + slerp(*(p - origin[name] for p in pair), 0.25)
        expected = torch.where((pair[0] == 0) & (pair[1] == 0), 0.0, expected)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
        zeros += int((value == 0).sum())
    assert report.zeros == zeros > 0.4 * sum(p.numel() for n, p in loaded.named_parameters() if "proj" in n)
    assert report.tensors == len(list(loaded.named_parameters()))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list((root / "child1").glob("*.safetensors"))) > 1


def test_a_model_merged_with_itself_is_itself(siblings, tmp_path):
    root, _, _ = siblings
    merge_checkpoints([root / "child0", root / "child0"], tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", root / "child0"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_errors_come_before_anything_is_written(siblings, tmp_path):
    root, _, _ = siblings
    two, out = [root / "child0", root / "child1"], tmp_path / "out"
    for match, models, options in (
        ("unknown method", two, {"method": "sleep"}),
        ("two models or more", two[:1], {}),
        ("give base", two, {"method": "task-slerp"}),
        ("base is for task-slerp", two, {"base": root / "parent"}),
        ("weights are 2 numbers", two, {"weights": [1, 2, 3]}),
        ("weights are 2 numbers", two, {"weights": [0, 0]}),
        ("weights are 2 numbers", two, {"weights": [1, -1]}),
    ):
        with pytest.raises(ValueError, match=match):
            merge_checkpoints(models, out, **options)
    with pytest.raises(ValueError, match="the source itself"):
        merge_checkpoints(two, two[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        merge_checkpoints([two[0], tmp_path / "empty"], out)
    other = LlamaForCausalLM(LlamaConfig(**CONFIG | {"vocab_size": 128}))
    other.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"\[64, 32\].*\[128, 32\].*vocabularies"):
        merge_checkpoints([two[0], tmp_path / "wider"], out)
    LlamaForCausalLM(LlamaConfig(**CONFIG | {"num_hidden_layers": 3})).save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match="no copies of one model"):
        merge_checkpoints([two[0], tmp_path / "deeper"], out)
    LlamaForCausalLM(LlamaConfig(**CONFIG | {"rms_norm_eps": 1e-3})).save_pretrained(tmp_path / "eps")
    with pytest.raises(ValueError, match="rms_norm_eps"):
        merge_checkpoints([two[0], tmp_path / "eps"], out)
    assert not out.exists()


def test_tables_of_integers_are_copied_if_equal(siblings, tmp_path):
    root, _, _ = siblings
    folders = []
    for number, table in enumerate(([1, 2], [1, 2], [1, 3])):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"w": torch.ones(2) * number, "table": torch.tensor(table)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        folders.append(folder)
    report = merge_checkpoints(folders[:2], tmp_path / "out", method="lerp")
    assert report.copied == 1
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["table"].tolist() == [1, 2] and merged["w"].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="table holds .* that differ"):
        merge_checkpoints(folders[1:], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("t", "row", "total", "norm"),
    [
        (0.1, [-1.598105, 0.804284, -0.302369, 1.659679, 0.553025, -0.553629], 3.880433, 5.272881),
        (0.5, [-1.705164, 0.557862, 0.505234, 0.715748, 0.663119, 0.610491], 6.599617, 5.109804),
        (0.8, [-1.47998, 0.268744, 1.032448, -0.13575, 0.627954, 1.391658], 7.492408, 4.973884),
    ],
)
def test_slerp_is_mergekits(t, row, total, norm):
    """What ``slerp`` of github.com/arcee-ai/mergekit (a6e4028, mergekit/merge_methods/slerp.py) gave for these matrices."""
    i = torch.arange(24, dtype=torch.float64)
    a, b = ((i * 7) % 11 / 3 - 1.5).reshape(4, 6), ((i * 5) % 13 / 4 - 1.2).reshape(4, 6)
    result = slerp(a, b, t)
    torch.testing.assert_close(result[0], torch.tensor(row), atol=2e-6, rtol=0)
    assert float(result.sum()) == pytest.approx(total, abs=1e-5) and float(result.norm()) == pytest.approx(
        norm, abs=1e-5
    )
