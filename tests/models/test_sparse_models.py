"""Sparse Llama, GPT-2 and ResNet against transformers' own classes: loading, saving, generating, training."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

import hf_sparse  # noqa: F401  (registers the models)
from hf_sparse.callbacks.sparsity import SparsityCallback
from hf_sparse.config import CONFIG_KEY, SparsityConfig
from hf_sparse.formats import save_packed
from hf_sparse.models.ift import dense_by_default, sparse_ift
from hf_sparse.models.layers import SparseParallel
from hf_sparse.models.paper_flops import paper_flops
from hf_sparse.models.ranks import parallel_branches
from hf_sparse.models.sparse_gpt2 import SparseGPT2Config, SparseGPT2ForCausalLM, SparseGPT2Model
from hf_sparse.models.sparse_llama import SparseLlamaConfig, SparseLlamaForCausalLM, SparseLlamaModel
from hf_sparse.models.sparse_resnet import SparseResNetConfig, SparseResNetForImageClassification, SparseResNetModel
from hf_sparse.targets import find_targets

ROOT = Path(__file__).resolve().parents[2]
TOKENS = dict(vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=0)
GPT2 = dict(n_embd=32, n_head=2, n_layer=2, n_positions=64, **TOKENS)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    **TOKENS,
)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4)
KINDS = {  # sparse config, sparse model, its sizes; dense config, dense model; what AutoModel gives
    "gpt2": (SparseGPT2Config, SparseGPT2ForCausalLM, GPT2, GPT2Config, GPT2LMHeadModel, SparseGPT2Model),
    "llama": (SparseLlamaConfig, SparseLlamaForCausalLM, LLAMA, LlamaConfig, LlamaForCausalLM, SparseLlamaModel),
    "resnet": (
        SparseResNetConfig,
        SparseResNetForImageClassification,
        RESNET,
        ResNetConfig,
        ResNetForImageClassification,
        SparseResNetModel,
    ),
}
FAMILIES = ("wide", "parallel", "factorized", "doped")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(kind, **fields):
    config, model, sizes, *_ = KINDS[kind]
    torch.manual_seed(0)
    return model(config(**sizes | fields))


def fed(model, length=12):
    generator = torch.Generator().manual_seed(5)
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(2, 96, (2, length), generator=generator)}
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------------------------------- dense parents


@each_kind
def test_without_sparsity_it_is_the_dense_parent(kind, tmp_path, capfd):
    *_, config, parent, _ = KINDS[kind]
    torch.manual_seed(0)
    dense = parent(config(**KINDS[kind][2]))
    for fields in ({}, {"family": "factorized"}, {"family": "wide"}, {"sparsity": 0.5}):
        assert same_state(build(kind, **fields), dense)  # the same seed, the same first weights
    dense.eval().save_pretrained(tmp_path)
    loaded = KINDS[kind][1].from_pretrained(tmp_path).eval()
    assert type(loaded.config) is KINDS[kind][0] and same_state(loaded, dense)
    assert (
        loaded.config.model_type == KINDS[kind][0].model_type and "You are using a model" not in capfd.readouterr().err
    )
    assert torch.equal(loaded(**fed(dense)).logits, dense(**fed(dense)).logits)
    assert loaded.config.sparsity_config() is None


@each_kind
def test_a_dense_checkpoint_read_with_a_family(kind, tmp_path):
    """What it was trained as decides the sizes, whether the family comes with the constructor or with from_pretrained."""
    *_, config, parent, _ = KINDS[kind]
    parent(config(**KINDS[kind][2])).save_pretrained(tmp_path)
    read = KINDS[kind][0].from_pretrained(tmp_path, family="wide", sparsity=0.75)
    made = KINDS[kind][0](**KINDS[kind][2], family="wide", sparsity=0.75)
    assert read.dense_sizes == made.dense_sizes and read.dense_sizes
    for name in read.dense_sizes:
        assert getattr(read, name) == getattr(made, name) != read.dense_sizes[name]
    read.save_pretrained(tmp_path / "wide")
    assert KINDS[kind][0].from_pretrained(tmp_path / "wide").to_dict() == read.to_dict()  # not widened twice
    other = KINDS[kind][0].from_pretrained(tmp_path / "wide", sparsity=0.5)
    assert other.dense_sizes == made.dense_sizes and all(getattr(other, n) < getattr(made, n) for n in made.dense_sizes)
    dense = made.dense_config()
    assert all(getattr(dense, name) == value for name, value in KINDS[kind][2].items())
    if kind != "resnet":
        rounded = KINDS[kind][0].from_pretrained(tmp_path / "wide", sparsity=0.5, head_multiple=8)
        assert rounded.hidden_size // rounded.num_attention_heads % 8 == 0 and rounded.dense_sizes == made.dense_sizes
        assert rounded.sparsity_config().sparsity > 0.5  # wider than needed, so sparser: the layers cost what they did
    late = KINDS[kind][0](**KINDS[kind][2])
    late.family, late.sparsity = "wide", 0.75
    with pytest.raises(ValueError, match="give them together"):
        KINDS[kind][1](late)


# ---------------------------------------------------------------------------------------------------- families and loading


@each_kind
@each_family
def test_what_is_replaced_is_what_sparse_ift_replaces(kind, family):
    fields = {"family": family, "sparsity": 0.5, "branch_activation": "norm", "method": "set", "seed": 3}
    model = build(kind, **fields)
    dense = build(kind)
    names = set(find_targets(dense, None, dense_by_default(dense, None)))
    report = sparse_ift(dense, family, 0.5, branch_activation="norm", method="set", seed=3)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    assert model.config.sparsity_config() == report.config
    assert set(report.layers) == {n.removesuffix(".weight") for n in names} or family == "wide"
    if kind == "llama":
        with pytest.raises(ValueError, match="constant-fan-in"):
            build(kind, **fields | {"pattern": "constant-fan-in"}).config.sparsity_config()
    by_model = build(kind, **fields | {"budget": "model"}).config.sparsity_config()
    assert by_model.sparsity == sparse_ift(build(kind), family, 0.5, budget="model", branch_activation="norm").sparsity


@each_kind
@each_family
def test_save_and_load(kind, family, tmp_path):
    model = build(kind, family=family, sparsity=0.5).eval()
    model.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if kind == "resnet" else AutoModelForCausalLM
    for loaded in (KINDS[kind][1].from_pretrained(tmp_path), auto.from_pretrained(tmp_path)):
        assert type(loaded) is type(model) and same_state(loaded, model)
        assert torch.equal(loaded.eval()(**fed(model)).logits, model(**fed(model)).logits)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is KINDS[kind][5] and not info["missing_keys"]
    state = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    assert all(torch.equal(t, state[prefix + n]) for n, t in base.state_dict().items())
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is KINDS[kind][0] and config.family == family
    with torch.device("meta"):
        empty = auto.from_config(config)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(p.is_meta for p in empty.parameters())


def test_missing_weights_start_as_the_class_starts_them(tmp_path):
    """A dense checkpoint read into a family: new layers get their own initialisation, not what was in memory."""
    dense = GPT2LMHeadModel(GPT2Config(**GPT2))
    dense.save_pretrained(tmp_path)
    model = SparseGPT2ForCausalLM.from_pretrained(tmp_path, family="factorized", sparsity=0.5)
    assert torch.equal(model.transformer.wte.weight, dense.transformer.wte.weight)
    check_gpt2_initialisation(model, "factorized")


def check_gpt2_initialisation(model, family):
    small = 0.02 / (2 * model.config.n_layer) ** 0.5
    found = set()
    for name, parameter in model.transformer.h.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any() or "ln" in name
        elif "ln" not in name:
            writes = "c_proj" in name and not name.endswith(".u.weight")
            found.add(writes)
            assert parameter.std().item() == pytest.approx(small if writes else 0.02, rel=0.15), name
    assert found == {True, False}


@each_family
def test_gpt2_residual_initialisation(family):
    model = build("gpt2", family=family, sparsity=0.75)
    check_gpt2_initialisation(model, family)


def test_tied_embeddings(tmp_path):
    for kind, tied in (("gpt2", True), ("llama", True), ("llama", False)):
        model = build(kind, family="doped", sparsity=0.5, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / f"{kind}{tied}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}{tied}")
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
        assert same_state(loaded, model)


def test_packed_checkpoints(tmp_path):
    model = build("gpt2", family="parallel", sparsity=0.5)
    with torch.no_grad():
        for module in model.modules():
            for branch in module.branches if isinstance(module, SparseParallel) else ():
                branch.weight.mul_(torch.rand_like(branch.weight) > 0.5)
    save_packed(model, tmp_path / "packed")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


def test_errors():
    for fields, message in (
        ({"family": "widest"}, "family is None or one of"),
        ({"sparsity": 1.5}, r"lies in \[0, 1\)"),
        ({"family": "parallel", "sparsity": 0.6}, "whole number of branches"),
        ({"family": "doped", "sparse_u_only": True}, "factorized"),
        ({"family": "wide", "budget": "all"}, "budget is"),
        ({"sparsity": 0.5, "budget": "model"}, "of a family"),
        ({"sparsity": 0.5, "head_multiple": 8}, "wide family"),
        ({"sparsity": 0.5, "family": "wide", "head_multiple": 0}, "whole number"),
        ({"branch_activation": "relu"}, "branch_activation"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseGPT2Config(**GPT2 | fields)
    with pytest.raises(ValueError, match="stem"):
        SparseResNetConfig(stem="mnist")
    with pytest.raises(ValueError, match="unknown method"):
        SparseGPT2Config(**GPT2, sparsity=0.5, method="rigle").sparsity_config()
    assert parallel_branches(0.75) == 4


# ------------------------------------------------------------------------------------------- what transformers does with them


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@each_family
def test_generate_checkpoint_and_compile(kind, family):
    model = build(kind, family=family, sparsity=0.5).eval()
    inputs = fed(model)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)
    gradients = []
    for on in (False, True):
        each = copy.deepcopy(model)
        if on:
            each.gradient_checkpointing_enable()
        each.train()
        torch.manual_seed(0)
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters()})
    assert all(torch.allclose(gradients[0][n], g, atol=1e-6) for n, g in gradients[1].items())
    assert all(g is not None for g in gradients[1].values())


def test_resnet_compiles():
    model = build("resnet", family="factorized", sparsity=0.5).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**fed(model)).logits, model(**fed(model)).logits, atol=1e-5)


def test_the_papers_cifar_resnet18():
    """Parameters and FLOPs of the released network for CIFAR-100: 11,220,132, and a budget of 1,115,226,800."""
    model = SparseResNetForImageClassification(
        SparseResNetConfig(stem="cifar", num_labels=100, zero_init_residual=True)
    )
    assert sum(p.numel() for p in model.parameters()) == 11_220_132
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 4]
    assert shapes[:3] == [(64, 3, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3)] and shapes.count((512, 512, 3, 3)) == 3
    assert len(shapes) == 20 and (128, 64, 1, 1) in shapes
    assert paper_flops(model, {"pixel_values": (1, 3, 32, 32)}) == 1_115_226_800
    assert model.resnet(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 512, 4, 4)
    blocks = [m for m in model.modules() if type(m).__name__ == "ResNetBasicLayer"]
    assert len(blocks) == 8 and not any(block.layer[1].normalization.weight.any() for block in blocks)
    for sparsity, width in ((0.5, 90), (0.75, 128), (0.9, 202)):
        config = SparseResNetConfig(stem="cifar", family="wide", sparsity=sparsity)
        assert config.hidden_sizes == [width, 2 * width, 4 * width, 8 * width] and config.embedding_size == width
    assert SparseResNetConfig(stem="cifar", family="wide", sparsity=0.75).sparsity_config().ignore == [
        "resnet.embedder.embedder.convolution.weight"
    ]


ELSEWHERE = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_sparse":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
root = sys.argv[1]
for name in sys.argv[2:]:
    auto = AutoModelForImageClassification if name.startswith("resnet") else AutoModelForCausalLM
    try:
        auto.from_pretrained(f"{root}/{name}", trust_remote_code=False)
        print("loaded without being allowed to")
    except ValueError:
        pass
    model = auto.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
    inputs, logits = torch.load(f"{root}/{name}.pt")
    assert torch.equal(model(**inputs).logits, logits)
    model.save_pretrained(f"{root}/again/{name}")
    again = auto.from_pretrained(f"{root}/again/{name}", trust_remote_code=True).eval()
    assert torch.equal(again(**inputs).logits, logits)
    AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    fresh = auto.from_config(model.config, trust_remote_code=True)
    if name == "gpt2-wide":
        print(round(fresh.transformer.h[0].attn.c_proj.weight.std().item(), 3))
    print(type(model).__module__.split(".")[0], type(model).__name__)
    try:
        model.config.sparsity_config()
    except ModuleNotFoundError as error:
        print(error)
assert not [name for name in sys.modules if name.split(".")[0] == "hf_sparse"]
"""


def test_loading_where_hf_sparse_is_missing(tmp_path):
    """With the code that save_pretrained put beside the weights, and again after saving from there."""
    names = []
    for kind, family in (("gpt2", "wide"), ("llama", "doped"), ("resnet", "parallel")):
        names.append(f"{kind}-{family}")
        model = build(kind, family=family, sparsity=0.5).eval()
        model.save_pretrained(tmp_path / names[-1])
        with torch.no_grad():
            torch.save((fed(model), model(**fed(model)).logits), tmp_path / f"{names[-1]}.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path), *names],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    missing = "sparse training needs hf_sparse: pip install hf-sparse"
    assert [line for line in done.stdout.splitlines() if line.strip()] == [
        "0.01",  # 0.02 / sqrt(2 * 2 layers)
        "transformers_modules SparseGPT2ForCausalLM",
        missing,
        "transformers_modules SparseLlamaForCausalLM",
        missing,
        "transformers_modules SparseResNetForImageClassification",
        missing,
    ]


def test_registering_loads_no_modeling_code():
    program = (
        "import sys, hf_sparse\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.for_model('sparse_gpt2', family='wide', sparsity=0.75)\n"
        "assert config.n_embd == 1536 and 'transformers.modeling_utils' not in sys.modules\n"
        "import transformers.generation, transformers.models.llama.modeling_llama\n"
        "assert 'hf_sparse.models.sparse_llama' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "import torch\n"
        "with torch.device('meta'):\n"
        "    print(type(AutoModelForCausalLM.from_config(config)).__name__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "SparseGPT2ForCausalLM"


# --------------------------------------------------------------------------------------------------------------- training


def trained(model, folder, callback, steps=12):
    torch.manual_seed(0)
    text = torch.randint(2, 10, (16, 16))
    text[:, 1::2] = text[:, ::2]  # something to learn
    data = [{"input_ids": row, "labels": row} for row in text]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    return [entry["density"] for entry in trainer.state.log_history if "density" in entry]


@pytest.mark.parametrize(
    ("method", "family"),
    [("static", "parallel"), ("set", "factorized"), ("rigl", "wide"), ("granet", "doped"), ("rigl", None)],
)
def test_training_asks_the_config(method, family, tmp_path):
    schedule = {} if method == "static" else {"every": 2}
    model = build("gpt2", family=family, sparsity=0.5, method=method, schedule=schedule, seed=4)
    asked = model.config.sparsity_config()
    assert (asked.method, asked.seed, asked.sparsity) == (method, 4, 0.5)
    densities = trained(model, tmp_path, SparsityCallback())
    assert densities[-1] == pytest.approx(0.5, abs=0.02)
    masked = find_targets(model, asked.targets, asked.ignore)
    zeros = sum((model.get_parameter(name) == 0).sum().item() for name in masked)
    assert zeros / sum(target.numel for target in masked.values()) == pytest.approx(0.5, abs=0.02)
    others = [n for n in find_targets(model) if n not in masked]
    assert not any((model.get_parameter(name) == 0).any() for name in others)  # U and V of the doped family are dense
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_state(again, model)
    kept = SparsityConfig.from_model_config(again.config)
    assert kept.method == method and again.config.method == method
    before = {name: again.get_parameter(name) == 0 for name in masked}
    trained_on = SparsityCallback()  # a model that was trained sparse: its zeros stay
    trainer = Trainer(again, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), callbacks=[trained_on])
    assert trained_on.config is None and trainer.callback_handler
    assert all(torch.equal(again.get_parameter(name) == 0, zero) for name, zero in before.items())


def test_a_training_resumes(tmp_path):
    def trainer(steps):
        torch.manual_seed(0)
        rows = torch.randint(2, 96, (16, 8))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = build(
            "gpt2",
            family="doped",
            sparsity=0.5,
            method="rigl",
            schedule={"every": 1},
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        return Trainer(model, arguments, train_dataset=data, callbacks=[SparsityCallback()])

    whole = trainer(6)
    whole.train()
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_state(whole.model, resumed.model)
    assert getattr(resumed.model.config, CONFIG_KEY)["method"] == "rigl"
