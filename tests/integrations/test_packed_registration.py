"""What happens with and without hf_sparse installed, and in which order things are imported: in fresh processes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_sparse.formats import save_packed

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
NO_PACKAGE = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_sparse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
"""


def run(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A Llama and a Mixtral: packed directories with the state they must load to."""
    root = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(torch.rand(parameter.shape) > 0.6)
        save_packed(model, root / name)
        torch.save(model.state_dict(), root / f"{name}.pt")
    return root


LOADS = """
import sys, torch
{first}
{second}
from transformers import {kind}
for name in ("llama", "mixtral"):
    model = {kind}.from_pretrained(sys.argv[1] + "/" + name{kwargs})
    state = torch.load(sys.argv[1] + "/" + name + ".pt")
    print(type(model).__name__, all(torch.equal(t, state[n]) for n, t in model.state_dict().items()))
"""


@pytest.mark.parametrize(
    "order",
    [
        ("import hf_sparse", "import transformers"),
        ("import transformers", "import hf_sparse"),
        pytest.param(("import transformers.quantizers", "import hf_sparse"), marks=pytest.mark.slow),
        pytest.param(
            ("from transformers import AutoConfig; AutoConfig.register", "import hf_sparse"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("from transformers import AutoModelForCausalLM; AutoModelForCausalLM.register", "import hf_sparse"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["hf_sparse first", "transformers first", "quantizers first", "AutoConfig first", "AutoModel first"],
)
def test_import_orders(packed, order):
    out = run(LOADS.format(first=order[0], second=order[1], kind="AutoModelForCausalLM", kwargs=""), packed)
    assert out == ["LlamaForCausalLM True", "MixtralForCausalLM True"]


def test_remote_code_needs_no_package(packed):
    out = run(
        NO_PACKAGE + LOADS.format(first="", second="", kind="AutoModelForCausalLM", kwargs=", trust_remote_code=True"),
        packed,
    )
    assert out == ["LlamaForCausalLM True", "MixtralForCausalLM True"]


@pytest.mark.slow
def test_remote_code_beside_the_package(packed):
    for first in ("import hf_sparse", ""):
        out = run(
            LOADS.format(first=first, second="", kind="AutoModelForCausalLM", kwargs=", trust_remote_code=True")
            + "import hf_sparse\nAutoModelForCausalLM.from_pretrained(sys.argv[1] + '/llama')\nprint('both')",
            packed,
        )
        assert out[-3:] == ["LlamaForCausalLM True", "MixtralForCausalLM True", "both"]


def test_without_package_and_trust_it_fails(packed):
    """Never a model with random weights: the Auto classes refuse, and a stock class meets shapes that do not fit."""
    out = run(
        NO_PACKAGE
        + """
import transformers
from transformers import AutoModel, AutoModelForCausalLM
for name, stock in (("llama", "LlamaForCausalLM"), ("mixtral", "MixtralForCausalLM"), ("llama", "LlamaModel")):
    for kind in (AutoModel, AutoModelForCausalLM, getattr(transformers, stock)):
        for kwargs in ({}, {"trust_remote_code": False}):
            try:
                kind.from_pretrained(sys.argv[1] + "/" + name, **kwargs)
                print("loaded", kind)
            except (ValueError, RuntimeError) as error:
                print(type(error).__name__)
""",
        packed,
    )
    errors = [line.split()[-1] for line in out if line.split()[-1:] and "Error" in line]
    assert errors == ["ValueError"] * 4 + ["RuntimeError"] * 2 + (["ValueError"] * 4 + ["RuntimeError"] * 2) * 2
    assert not any("loaded" in line for line in out)


def test_import_is_light():
    out = run(
        """
        import sys
        import hf_sparse
        print([m for m in ("torch", "transformers", "numpy", "safetensors") if m in sys.modules])
        print(sum(type(f).__name__ == "_AfterImport" for f in sys.meta_path))
        hf_sparse.integrations.register()
        print(sum(type(f).__name__ == "_AfterImport" for f in sys.meta_path))
        import transformers
        print("transformers.quantizers" in sys.modules)
        import transformers.quantizers
        import transformers.models.auto.modeling_auto
        print(sys.meta_path[0].waiting)  # lm-eval was not loaded
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        print(AUTO_QUANTIZER_MAPPING["hf_sparse"].__module__)
        print(type(sys.modules["transformers.quantizers.auto"].__loader__).__name__)
        hf_sparse.integrations.register()
        """
    )
    assert out == [
        "[]",
        "1",
        "1",
        "False",
        "{'lm_eval.models'}",
        "hf_sparse.integrations.quantizer",
        "SourceFileLoader",
    ]


@pytest.mark.slow
def test_an_unknown_transformers_still_imports():
    out = run(
        """
        import sys, warnings
        import hf_sparse.integrations as integrations
        def broken():
            raise ImportError("no such hook")
        integrations._AFTER["transformers.quantizers.auto"] = broken
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import transformers.quantizers
        print(any("no such hook" in str(w.message) for w in caught))
        """
    )
    assert out == ["True"]


def test_dense_checkpoints_are_untouched(tmp_path):
    """Registering changes nothing for other models."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
