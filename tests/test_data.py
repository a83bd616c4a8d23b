"""Text to token ids: every source form, contiguous segments, and every way a source can be wrong."""

import copy
import json
import os

import pytest
import torch

from hf_sparse.data import check_source, load_segments, load_tokens

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40
MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def jsonl(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain_bytes(tokenizer, text: str) -> list[int]:
    """The tokenizer's ids without this package's help."""
    return tokenizer.backend_tokenizer.encode(text).ids


def test_a_text_file_is_one_run_of_tokens_cut_from_the_start(text_file, tiny_tokenizer):
    whole = plain_bytes(tiny_tokenizer, TEXT)
    assert load_tokens(text_file, tiny_tokenizer).tolist() == whole
    text = load_segments(text_file, tiny_tokenizer, samples=3, sequence_length=16)
    assert text.ids.dtype == torch.long and text.ids.tolist() == [whole[i : i + 16] for i in (0, 16, 32)]
    assert text.description == {"source": "text.txt", "samples": 3, "sequence_length": 16, "shuffle": None}


def test_all_segments_can_be_taken_and_the_remainder_is_dropped(text_file, tiny_tokenizer):
    whole = plain_bytes(tiny_tokenizer, TEXT)
    length = 7
    count = len(whole) // length
    assert len(whole) % length
    text = load_segments(text_file, tiny_tokenizer, count, length)
    assert text.ids.flatten().tolist() == whole[: count * length]


def test_shuffle_chooses_segments_of_the_same_grid_and_is_seeded(text_file, tiny_tokenizer):
    def take(seed):
        return load_segments(text_file, tiny_tokenizer, 5, 16, shuffle=seed).ids.tolist()

    whole = plain_bytes(tiny_tokenizer, TEXT)
    grid = [whole[i : i + 16] for i in range(0, len(whole) - 15, 16)]
    assert all(segment in grid for segment in take(0))
    assert take(0) == take(0) and take(0) != take(1)
    every = load_segments(text_file, tiny_tokenizer, len(grid), 16, shuffle=3).ids.tolist()
    assert sorted(every) == sorted(grid) and every != grid, "each segment once"


def test_a_text_longer_than_the_model_is_read_whole_without_a_warning(text_file, tiny_tokenizer, caplog, capsys):
    assert tiny_tokenizer.model_max_length == 512
    assert len(load_tokens(text_file, tiny_tokenizer)) > 512
    assert tiny_tokenizer.model_max_length == 512
    assert "longer than" not in caplog.text + "".join(capsys.readouterr())


def test_rows_of_plain_text_are_joined_by_the_end_of_text_token(tmp_path, tiny_tokenizer):
    source = jsonl(tmp_path / "rows.jsonl", {"text": "one"}, {"text": "two", "id": 4})
    end = tiny_tokenizer.eos_token_id
    wanted = [*plain_bytes(tiny_tokenizer, "one"), end, *plain_bytes(tiny_tokenizer, "two"), end]
    assert load_tokens(source, tiny_tokenizer).tolist() == wanted


def test_prompts_and_completions_are_joined(tmp_path, tiny_tokenizer):
    source = jsonl(tmp_path / "rows.jsonl", {"prompt": "2+2=", "completion": "4"})
    assert load_tokens(source, tiny_tokenizer).tolist()[:-1] == plain_bytes(tiny_tokenizer, "2+2=4")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": MESSAGES[:1], "completion": "Hello."},
        {"prompt": "Hi?", "completion": MESSAGES[1:]},
    ],
)
def test_messages_go_through_the_chat_template(tmp_path, tiny_tokenizer, row):
    tokens = load_tokens(jsonl(tmp_path / "rows.jsonl", row), tiny_tokenizer).tolist()
    wanted = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert tiny_tokenizer.decode(tokens[:-1]) == wanted and tokens[-1] == tiny_tokenizer.eos_token_id
    assert tokens[0] == 1, "the template's markers are single tokens"


def test_rows_are_read_only_as_far_as_needed(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n" + "broken\n")
    assert load_segments(str(path), tiny_tokenizer, 2, 16).ids.shape == (2, 16)
    with pytest.raises(ValueError, match="line 2"):
        load_segments(str(path), tiny_tokenizer, 2, 16, shuffle=0)  # choosing among all needs all


def test_blank_lines_are_skipped(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"text": "a"}\n\n')
    assert len(load_tokens(str(path), tiny_tokenizer)) == 2


def test_a_tokenizer_without_an_end_token_joins_with_nothing(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    source = jsonl(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    assert load_tokens(source, tokenizer).tolist() == plain_bytes(tiny_tokenizer, "a") + plain_bytes(
        tiny_tokenizer, "b"
    )


def test_too_short_says_how_much_there_is(text_file, tiny_tokenizer):
    total = len(plain_bytes(tiny_tokenizer, TEXT))
    with pytest.raises(
        ValueError, match=rf"text.txt has {total} tokens, enough for {total // 64} segments of 64, but 99 were"
    ):
        load_segments(text_file, tiny_tokenizer, 99, 64)
    with pytest.raises(ValueError, match=rf"lower --samples to {total // 64}, or --sequence-length to {total // 99}"):
        load_segments(text_file, tiny_tokenizer, 99, 64)
    with pytest.raises(ValueError, match=rf"has only {total} tokens, fewer than one segment of 100000"):
        load_segments(text_file, tiny_tokenizer, 1, 100_000)
    lower = load_segments(text_file, tiny_tokenizer, 99, total // 99)  # the advice works
    assert lower.ids.shape == (99, total // 99)


@pytest.mark.parametrize("samples,length", [(0, 16), (4, 0), (-1, 16)])
def test_sizes_must_be_positive(text_file, tiny_tokenizer, samples, length):
    with pytest.raises(ValueError, match=f"at least 1, got {samples} and {length}"):
        load_segments(text_file, tiny_tokenizer, samples, length)


@pytest.mark.parametrize(
    "source", ["missing.txt", "./missing", "a/b/missing", "~/missing", "missing.jsonl", "missing.json"]
)
def test_a_missing_file(source):
    with pytest.raises(FileNotFoundError, match=f"no such file: {source}"):
        check_source(source)


def test_a_hub_id_is_not_taken_for_a_file():
    check_source("wikitext")
    check_source("Salesforce/wikitext")


def test_what_is_no_file_and_no_dataset(tiny_tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="'no-such-dataset' is neither a file here nor a dataset that can be loaded"):
        load_tokens("no-such-dataset", tiny_tokenizer)


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "bad.txt is empty"),
        (b" \n\t\n", "bad.txt holds only white space"),
        (b"PK\x03\x04\x00\x00binary", "bad.txt is a binary file; text is expected as UTF-8"),
        ("Größe".encode("latin-1") * 9, "bad.txt is not UTF-8 text"),
    ],
)
def test_unreadable_text(tmp_path, tiny_tokenizer, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokens(str(path), tiny_tokenizer)


def test_a_directory(tmp_path):
    with pytest.raises(ValueError, match="is a directory; give a text file, a .jsonl file or a Hub dataset id"):
        check_source(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root reads everything")
def test_no_permission(text_file):
    os.chmod(text_file, 0)
    with pytest.raises(ValueError, match="cannot be read: permission denied"):
        check_source(text_file)


def test_no_permission_is_said_in_words(text_file, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="text.txt cannot be read: permission denied"):
        check_source(text_file)


@pytest.mark.parametrize(
    "second,message",
    [
        ("{broken", "rows.jsonl, line 2: not a JSON object a line"),
        (
            "[1]",
            'rows.jsonl, line 2: a row is an object with "text", "prompt" with "completion", or "messages", got list',
        ),
        ('{"content": "x", "id": 1}', "line 2: a row has .* this one has 'content', 'id'"),
        ("{}", "line 2: a row has .* this one has nothing"),
        ('{"text": 5}', "line 2: a row has .* this one has 'text'"),
        ('{"prompt": "x"}', "line 2: a row has .* this one has 'prompt'"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, tiny_tokenizer, second, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + second + "\n")
    with pytest.raises(ValueError, match=message):
        load_tokens(str(path), tiny_tokenizer)


def test_json_lines_that_are_not_utf8(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + '{"text": "Größe"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not UTF-8 text"):
        load_tokens(str(path), tiny_tokenizer)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert load_tokens(str(path), tiny_tokenizer).tolist()[:-1] == plain_bytes(tiny_tokenizer, "a")


def test_a_chat_template_that_writes_its_own_bos_does_not_get_a_second_one(tmp_path, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.chat_template = "<|endoftext|>{{ messages[0]['content'] }}"
    rows = {"messages": MESSAGES[:1]}, {"text": "Hi?"}
    chat, plain = (load_tokens(jsonl(tmp_path / "r.jsonl", row), tokenizer).tolist() for row in rows)
    assert chat == plain and chat.count(0) == 1


def test_messages_the_template_refuses_are_named_by_line(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    source = jsonl(tmp_path / "rows.jsonl", {"text": "a"}, {"messages": MESSAGES})
    with pytest.raises(
        ValueError, match="line 2: the chat template does not take these messages: roles must alternate"
    ):
        load_tokens(source, tokenizer)


def test_messages_without_a_chat_template(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    source = jsonl(tmp_path / "rows.jsonl", {"messages": MESSAGES})
    with pytest.raises(
        ValueError, match="line 1: chat messages need a tokenizer with a chat template, and this model's has none"
    ):
        load_tokens(source, tokenizer)


def test_a_shuffled_dataset_is_not_read_to_its_end(tiny_tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": f"line {number} of a text without an end\n"}

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stream)
    chosen = [load_segments("owner/endless", tiny_tokenizer, 2, 16, shuffle=seed).ids for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert len(read) < 50_000
