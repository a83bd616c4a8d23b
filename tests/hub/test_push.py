"""Pushing to a Hub that runs here: what arrives, what it costs when the line breaks, and what comes back in a fresh process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("server.py"))
server = importlib.util.module_from_spec(_spec)
sys.modules["hub_server"] = server
_spec.loader.exec_module(server)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub():
    hub = server.LocalHub().start()
    yield hub
    hub.stop()


def client(
    hub, program: str, *arguments, token: str | None = server.TOKEN, package: bool = True, home: Path | None = None
):
    """Runs a program in a fresh process against the local Hub; returns it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if token:
        environment["HF_TOKEN"] = token
    if package:
        environment["PYTHONPATH"] = str(ROOT)
    else:  # a developer's checkout may be installed; a user's machine has none
        program = "import sys; sys.modules['hf_sparse'] = None\n" + program
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd=home)


PUSH = """
import sys
from hf_sparse.hub_cards.push import push
options = {"packed": "packed" in sys.argv[3:], "private": True if "private" in sys.argv[3:] else None}
try:
    print(push(sys.argv[1], sys.argv[2], **options))
except Exception as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(3)
"""
LOAD = """
import sys
if "import" in sys.argv: import hf_sparse
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code="remote" in sys.argv)
print(sum(float(p.double().abs().sum()) for p in model.parameters()), sum(int((p == 0).sum()) for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def pruned(tiny_model_dir, calibration_file, tmp_path_factory) -> Path:
    from hf_sparse.cli import main

    out = tmp_path_factory.mktemp("models") / "pruned"
    words = ["prune", tiny_model_dir, "--saliency", "wanda", "--calibration", calibration_file, "--samples", 4]
    assert main([*map(str, words), "--sequence-length", "32", "--output", str(out), "--json"]) == 0
    return out


def numbers(directory: Path) -> tuple[float, int]:
    from transformers import AutoModelForCausalLM

    parameters = list(AutoModelForCausalLM.from_pretrained(directory).parameters())
    return sum(float(p.double().abs().sum()) for p in parameters), sum(int((p == 0).sum()) for p in parameters)


def test_dense_goes_up_in_one_commit_and_comes_back(hub, pruned, tmp_path):
    done = client(hub, PUSH, pruned, "tester/pruned", home=tmp_path)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["tester/pruned"]
    assert len(repo.commits) == 1 and done.stdout.strip().startswith(f"{hub.url}/tester/pruned/commit/")
    assert set(repo.files) == {str(file.relative_to(pruned)) for file in pruned.rglob("*") if file.is_file()}
    for file, content in repo.files.items():
        if file != "README.md":
            assert content == (pruned / file).read_bytes(), file
    card = repo.files["README.md"].decode()
    assert 'from_pretrained("tester/pruned")' in card and "PATH_OR_REPO" not in card
    back = client(hub, LOAD, "tester/pruned", package=False, home=tmp_path / "b")  # a stock checkpoint
    assert back.returncode == 0, back.stderr
    assert tuple(map(float, back.stdout.split())) == pytest.approx(numbers(pruned))


def test_packed_is_smaller_and_says_when_the_package_is_missing(hub, pruned, tmp_path):
    assert client(hub, PUSH, pruned, "tester/packed", "packed", home=tmp_path).returncode == 0
    files = hub.repos["tester/packed"].files
    assert len(files["model.safetensors"]) < (pruned / "model.safetensors").stat().st_size
    assert "configuration_hf_sparse.py" in files and "sparsity_report.json" in files
    assert "import hf_sparse" in files["README.md"].decode()
    expected = numbers(pruned)
    for words, package in ((["import"], True), (["remote"], False)):
        back = client(hub, LOAD, "tester/packed", *words, package=package, home=tmp_path / words[0])
        assert back.returncode == 0, back.stderr
        assert tuple(map(float, back.stdout.split())) == pytest.approx(expected)
    neither = client(hub, LOAD, "tester/packed", package=False, home=tmp_path / "neither")
    assert neither.returncode != 0 and "trust_remote_code" in neither.stderr


def test_sharded_and_private(hub, tiny_model, tiny_tokenizer, tmp_path):
    model = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(model, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(model)
    done = client(hub, PUSH, model, "tester/secret", "private", home=tmp_path)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["tester/secret"]
    assert repo.private and sum(file.endswith(".safetensors") for file in repo.files) > 1
    assert client(hub, LOAD, "tester/secret", home=tmp_path / "a").returncode == 0
    stranger = client(hub, LOAD, "tester/secret", token=None, home=tmp_path / "b")
    assert stranger.returncode != 0 and "tester/secret" in stranger.stderr


def test_an_existing_repository_gets_one_commit_more_and_keeps_its_other_files(hub, pruned, tmp_path):
    hub.repos["tester/there"] = server.Repo(files={"notes.txt": b"mine", "config.json": b"{}"})
    for _ in range(2):
        assert client(hub, PUSH, pruned, "tester/there", home=tmp_path).returncode == 0
    repo = hub.repos["tester/there"]
    assert repo.files["notes.txt"] == b"mine" and repo.files["config.json"] == (pruned / "config.json").read_bytes()
    assert len(repo.commits) <= 2


def test_a_broken_line_leaves_nothing_half_and_the_same_call_goes_on(hub, tiny_model, tiny_tokenizer, tmp_path):
    model = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(model, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(model)
    shards = sorted(model.glob("*.safetensors"))
    hub.break_after = shards[0].stat().st_size + 1000
    broken = client(hub, PUSH, model, "tester/line", home=tmp_path)
    assert broken.returncode == 3 and "ConnectionError" in broken.stderr, broken.stderr
    assert "broke off; the same call goes on with what is missing" in broken.stderr
    assert server.TOKEN not in broken.stderr + broken.stdout
    assert not hub.repos["tester/line"].commits and not hub.repos["tester/line"].files  # nothing half
    arrived = set(hub.objects)
    assert arrived
    hub.break_after = None
    hub.requests.clear()
    done = client(hub, PUSH, model, "tester/line", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["tester/line"].commits) == 1
    assert {file.name for file in shards} <= set(hub.repos["tester/line"].files)
    sent = [path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "PUT"]
    assert sent and not arrived & set(sent)  # what had arrived was not sent again


def test_who_may_not_write_is_told_so_and_no_token_is_shown(hub, pruned, tmp_path):
    for token in (server.OTHER_TOKEN, None):
        done = client(hub, PUSH, pruned, "tester/refused", token=token, home=tmp_path)
        assert done.returncode == 3 and "tester/refused" not in hub.repos
        assert "PermissionError" in done.stderr and "hf auth login" in done.stderr, done.stderr
        for secret in (server.TOKEN, server.OTHER_TOKEN):
            assert secret not in done.stderr and secret not in done.stdout
    for program in (PUSH, LOAD):
        done = client(hub, program, pruned if program is PUSH else "tester/none", "tester/x", home=tmp_path)
        assert server.TOKEN not in done.stderr + done.stdout
    assert any(server.TOKEN in authorization for _, _, authorization in hub.requests)  # it was used


def test_what_is_wrong_is_said_before_anything_is_sent(hub, pruned, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "config.json").write_text("{}")
    (tmp_path / "shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    for directory, name, said in (
        (tmp_path / "none", "tester/x", "no such directory"),
        (tmp_path / "empty", "tester/x", "no config.json"),
        (tmp_path / "half", "tester/x", "no safetensors weights"),
        (tmp_path / "shard", "tester/x", "names files that are not there: model-00001"),
        (pruned, "tester/x/y", "is no repository id"),
        (pruned, "a name", "is no repository id"),
    ):
        done = client(hub, PUSH, directory, name, home=tmp_path)
        assert done.returncode == 3 and said in done.stderr, done.stderr
    assert not hub.requests


def test_stock_push_to_hub_keeps_working(hub, pruned, tmp_path):
    program = "import sys, hf_sparse\nfrom transformers import AutoModelForCausalLM\n"
    program += "AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub('tester/stock')"
    done = client(hub, program, pruned, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hf_sparse" in json.loads(hub.repos["tester/stock"].files["config.json"])


TRAIN = """
import sys, torch, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from hf_sparse import SparsityConfig
from hf_sparse.callbacks import CardCallback, SparsityCallback
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = list(range(3, 35))
rows = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids, "source": s} for s in ["model", "reference"] * 4])
arguments = TrainingArguments(
    sys.argv[2], max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[], logging_steps=1,
    disable_tqdm=True, push_to_hub=True, hub_model_id=sys.argv[3], save_strategy="no", bf16=False,
)
sparse = SparsityCallback(SparsityConfig(sparsity=0.5, method="rigl", schedule={"every": 2}))
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[sparse], processing_class=tokenizer)
if "card" in sys.argv: trainer.add_callback(CardCallback("counting", license="mit", trainer=trainer))
if "alone" in sys.argv: trainer.add_callback(CardCallback())
trainer.train()
trainer.push_to_hub()
"""


def test_a_trainer_that_pushes_publishes_a_true_card(hub, tiny_model_dir, tmp_path):
    done = client(hub, TRAIN, tiny_model_dir, tmp_path / "run", "tester/trained", "card", home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repos["tester/trained"].files
    card, report = files["README.md"].decode(), json.loads(files["training_report.json"])
    assert "trained with its zeros:\nRigL" in card and "- data: counting" in card and "license: mit" in card
    assert "This model is a fine-tuned version" not in card  # the stock card's words
    assert report["steps"] == 4 and report["density"] == pytest.approx(0.5, abs=0.01) and report["rows"] == 8
    assert report["self_distilled_rows"] == 4 and "50.0% carry a response" in card
    assert f"- loss at the end: {report['final_loss']:.4g}" in card and report["flops"] < report["flops_dense"]
    without = client(hub, TRAIN, tiny_model_dir, tmp_path / "stock", "tester/stock", home=tmp_path)
    assert (
        without.returncode == 0 and "generated automatically" in hub.repos["tester/stock"].files["README.md"].decode()
    )
    alone = client(hub, TRAIN, tiny_model_dir, tmp_path / "alone", "tester/alone", "alone", home=tmp_path)
    assert alone.returncode != 0 and "trainer.add_callback(CardCallback(trainer=trainer))" in alone.stderr


def test_the_command(hub, pruned, tmp_path):
    program = "import sys\nfrom hf_sparse.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = client(hub, program, "push", pruned, "tester/told", "--packed", "--private", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["url"].startswith(f"{hub.url}/tester/told/commit/") and hub.repos["tester/told"].private
    for words, said in (
        ([tmp_path / "none", "tester/x"], "no such directory"),
        ([pruned, "tester/x/y"], "is no repository id"),
    ):
        done = client(hub, program, "push", *words, home=tmp_path)
        assert done.returncode == 2 and said in done.stderr
    offline = client(
        hub, "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n" + program, "push", pruned, "tester/x", home=tmp_path
    )
    assert offline.returncode in (1, 2) and "tester/x" in offline.stderr and "Traceback" not in offline.stderr
