"""The helpers of examples/spdf.py: text to tokens, E2E, beam search, BLEU, and what is still to be done."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXCERPT = EXAMPLES / "data" / "e2e_excerpt"


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    sys.path.insert(0, str(EXAMPLES))  # as for `python examples/spdf.py`
    yield
    sys.path.remove(str(EXAMPLES))


def words(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# -- E2E -------------------------------------------------------------------------------------------------------------

# What the challenge's baseline wrote about the first ten meanings of the development set (its repository's example input).
BASELINE = """\
Alimentum is located in the city centre. It is not family-friendly.
Alimentum is a non family-friendly restaurant near Burger King in the city centre.
Alimentum is a family-friendly restaurant in the city centre.
Alimentum is a family-friendly restaurant in the city centre near Burger King.
Alimentum is located in the city centre. It is not family-friendly.
Alimentum is near Burger King in the riverside area. It is not family-friendly.
In the riverside area there is a family friendly place called Alimentum.
Alimentum is a family friendly restaurant in the riverside area near Burger King.
Aromi is a kid friendly coffee shop serving chinese food in the riverside area with a customer rating of 1 out of 5.
Aromi is a kid friendly coffee shop serving chinese food in the riverside area with a customer rating of 3 out of 5."""


def test_rows_of_one_meaning_are_grouped_as_the_official_script_groups_them():
    from _e2e import grouped, read_pairs

    sizes = [len(references) for _, references in grouped(read_pairs(EXCERPT, "development"))]
    assert sizes == [6, 6, 6, 6, 9, 11, 37, 39, 10, 7]  # as in its example input, devel-conc.txt
    again = [("a", "1"), ("b", "2"), ("a", "3")]
    assert grouped(again) == [("a", ["1"]), ("b", ["2"]), ("a", ["3"])]  # consecutive only


def test_bleu_is_the_official_scripts():
    """Numbers of e2e-metrics' BLEUScore, run on these very inputs."""
    pytest.importorskip("sacrebleu")
    from _e2e import bleu, grouped, read_pairs

    references = [references for _, references in grouped(read_pairs(EXCERPT, "development"))]
    assert bleu(BASELINE.split("\n"), references) == pytest.approx(72.02928494322162, abs=1e-9)
    test = [references for _, references in grouped(read_pairs(EXCERPT, "test")) if len(references) > 1]
    human = bleu([first for first, *_ in test], [rest for _, *rest in test])
    assert human == pytest.approx(45.249024951309397, abs=1e-9)
    with pytest.raises(ValueError, match="10 outputs, but references for 9"):
        bleu(BASELINE.split("\n"), references[:9])


def test_meanings_are_written_as_in_the_lora_papers_data():
    from _e2e import grouped, linearise, read_pairs

    first = grouped(read_pairs(EXCERPT, "test"))[0][0]
    assert linearise(first) == "name : Blue Spice | Type : coffee shop | area : city centre"  # line 1 of its test.txt
    longer = "name[The Vaults], priceRange[more than £30], familyFriendly[yes], near[Café Adriatic]"
    assert (
        linearise(longer) == "name : The Vaults | price : more than £30 | family friendly : yes | near : Café Adriatic"
    )
    with pytest.raises(ValueError, match="slot"):
        linearise("Blue Spice, a coffee shop")


def test_reading_says_what_is_missing(tmp_path):
    from _e2e import read_pairs

    with pytest.raises(FileNotFoundError, match=r"devset\.csv"):
        read_pairs(tmp_path, "development")
    (tmp_path / "devset.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="mr and ref"):
        read_pairs(tmp_path, "development")


def test_padding_on_the_right_changes_no_loss(tiny_model, tiny_tokenizer):
    from _e2e import FinetuneExamples, linearise, read_pairs

    (meaning, reference), *_ = pairs = read_pairs(EXCERPT, "train")[:3]
    row = FinetuneExamples(pairs, tiny_tokenizer, 256)[0]
    end = tiny_tokenizer.eos_token_id
    prompt, target = words(tiny_tokenizer, linearise(meaning)), words(tiny_tokenizer, " " + reference)
    assert row["labels"][row["labels"] != -100].tolist() == [*target, end]
    assert int(row["labels"][len(prompt) + 1]) == target[0]  # the separator predicts the first word

    model = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.tensor([[*prompt, end, *target, end]])
    labels = torch.tensor([[*[-100] * (len(prompt) + 1), *target, end]])
    alone = model(input_ids=ids, labels=labels).loss
    padded = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
    torch.testing.assert_close(padded, alone)


def test_examples_that_do_not_fit_are_counted(tiny_tokenizer):
    from _e2e import FinetuneExamples, read_pairs

    pairs = read_pairs(EXCERPT, "train")
    whole = FinetuneExamples(pairs, tiny_tokenizer, 512)
    assert (len(whole), whole.left_out) == (60, 0)
    narrow = FinetuneExamples(pairs, tiny_tokenizer, 150)
    assert len(narrow) + narrow.left_out == 60 and 0 < narrow.left_out < 60
    with pytest.raises(ValueError, match="all 60 examples are longer than 4"):
        FinetuneExamples(pairs, tiny_tokenizer, 4)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_repeated_ngram_is_transformers_without_the_prompt(n):
    from _e2e import NoRepeatNgram
    from transformers import NoRepeatNGramLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    for length in (1, n - 1, n, 40):
        ids = torch.randint(0, 4, (64, length), generator=generator)
        scores = torch.randn(64, 7, generator=generator)
        theirs = NoRepeatNGramLogitsProcessor(n)(ids, scores.clone())
        assert torch.equal(NoRepeatNgram(n, 0)(ids, scores), theirs)
        prompt = torch.randint(0, 4, (64, 9), generator=generator)
        assert torch.equal(NoRepeatNgram(n, 9)(torch.cat([prompt, ids], 1), scores), theirs)
    assert theirs.isinf().any()


def test_generation_does_not_depend_on_the_batch(tiny_model, tiny_tokenizer):
    from _e2e import generate, grouped, read_pairs

    meanings = [meaning for meaning, _ in grouped(read_pairs(EXCERPT, "development"))]
    assert len({len(words(tiny_tokenizer, meaning)) for meaning in meanings}) > 1  # so batches are padded
    model = tiny_model("gpt2", tie_word_embeddings=False, initializer_range=0.5)  # tied, it would only repeat <end>
    options = dict(beams=2, length_penalty=0.9, no_repeat=4, new_tokens=6)
    alone = generate(model, tiny_tokenizer, meanings, **options, batch=1)
    assert generate(model, tiny_tokenizer, meanings, **options, batch=4) == alone
    assert len(set(alone)) > 1


# -- text ------------------------------------------------------------------------------------------------------------


def test_every_character_is_in_one_of_the_token_files(tmp_path, calibration_file, evaluation_file):
    import numpy as np
    from _text import load_text, prepare_text

    facts = prepare_text([calibration_file, evaluation_file], tmp_path / "data", vocabulary=400, held_out=0.1)
    tokenizer, train, validation, saved = load_text(tmp_path / "data", 128)
    assert saved == facts and facts["dtype"] == "uint16" and len(tokenizer) == facts["vocabulary"] == 400
    passages = []
    for windows, name in ((train, "train"), (validation, "validation")):
        ids = np.array(windows.ids)
        assert len(ids) == facts["tokens"][name] and len(windows) == len(ids) // 128
        assert torch.equal(windows[1]["input_ids"], torch.from_numpy(ids[128:256].astype(np.int64)))
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        assert ends[-1] == len(ids) - 1
        passages += [tokenizer.decode(part[part != tokenizer.eos_token_id]) for part in np.split(ids, ends + 1)[:-1]]
    text = calibration_file.read_text(encoding="utf-8") + evaluation_file.read_text(encoding="utf-8")
    letters = "".join(text.split())  # the white space between paragraphs is made uniform
    passages = ["".join(passage.split()) for passage in passages]
    assert sorted("".join(passages)) == sorted(letters)
    assert all(passage in letters for passage in passages) and len(passages) == len(set(passages)) > 10
    with pytest.raises(IndexError):
        train[len(train)]


def test_text_errors_come_before_work(tmp_path, calibration_file):
    from _text import load_text, prepare_text

    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        prepare_text([calibration_file, tmp_path / "nothing.txt"], tmp_path / "data")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 10)
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare_text([tmp_path / "latin.txt"], tmp_path / "data")
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(ValueError, match="1 passages"):
        prepare_text([tmp_path / "short.txt"], tmp_path / "data")
    with pytest.raises(ValueError, match="more than 257"):
        prepare_text([calibration_file], tmp_path / "data", vocabulary=100)
    with pytest.raises(FileNotFoundError, match="--stage data"):
        load_text(tmp_path / "data", 128)
    assert not (tmp_path / "data").exists()


# -- what is left to do, and what came out -----------------------------------------------------------------------------


def test_finished_work_is_not_done_again(tmp_path):
    from spdf import result_path, work

    arguments = argparse.Namespace(output=tmp_path, variant=["dense", "static75"], seeds=[0])
    stages = ("pretrain", "finetune", "score")
    everything = [
        *[("dense", None, None), ("dense", "dense", 0)],
        *[("static75", None, None), ("static75", "dense", 0), ("static75", "sparse", 0)],
    ]
    assert list(work(arguments, stages)) == everything
    (tmp_path / "dense" / "model").mkdir(parents=True)
    (tmp_path / "dense" / "pretrain.json").write_text("{}")
    assert list(work(arguments, stages)) == everything[1:]
    (tmp_path / "dense" / "model").rmdir()  # the result came back from another machine, the model did not
    assert list(work(arguments, stages)) == everything
    result_path(tmp_path / "dense", "dense", 0).write_text("{}")
    assert list(work(arguments, stages)) == everything[2:]
    assert list(work(arguments, ("score",))) == []


def test_results_of_two_recipes_do_not_mix(tmp_path):
    from spdf import check_protocol

    names = [
        "steps",
        "every",
        "batch",
        "length",
        "seed",
        "epochs",
        "finetune_batch",
        "finetune_rate",
        "width",
        "validation",
    ]
    arguments = argparse.Namespace(output=tmp_path, **dict.fromkeys(names, 1))
    check_protocol(arguments)
    check_protocol(arguments)
    arguments.steps = 2
    with pytest.raises(SystemExit, match=r"steps \(1 -> 2\)"):
        check_protocol(arguments)


def test_the_report_finds_the_papers_own_direction():
    from _spdf_report import PAPER, directions

    runs = {variant: {"dense": {"0": {"bleu": mean}}} for variant, (mean, _) in PAPER["bleu"].items()}
    runs["static75"]["sparse"] = {"0": {"bleu": PAPER["bleu"]["static75"][0] - 0.7}}  # 1.48 - 0.78, its ablation
    result = {"pretrain": {"dense": {"loss": 3.0}, "static50": {"loss": 3.2}}, "finetune": runs}
    assert len(directions(result)) == 4 and all(directions(result).values())
    result["pretrain"]["dense"]["loss"] = 3.3
    assert directions(result)["pre-training loss: dense <= static50"] is False


def test_words_about_other_meanings_are_refused(tmp_path):
    from _e2e import read_pairs
    from _spdf_report import assemble

    with pytest.raises(FileNotFoundError, match="no stage has finished"):
        assemble(tmp_path, [])
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "finetune-dense-0.jsonl").write_text('{"mr": "name[X]", "output": "x"}\n')
    (tmp_path / "dense" / "finetune-dense-0.json").write_text("{}")
    with pytest.raises(ValueError, match="not about the meanings"):
        assemble(tmp_path, read_pairs(EXCERPT, "test"))
