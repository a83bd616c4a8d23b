"""Responses in batches against ``generate`` one by one, and the wire format of an OpenAI-compatible server."""

import pytest
import torch

from hf_sparse.distillation.generation import chat_ids, respond

CHATS = [
    [{"role": "user", "content": text}]
    for text in (
        "Hi",
        "What is the capital of France, and why?",
        "Count to ten. " * 8,
        "One",
        "Two words",
        "The end of it all.",
    )
]


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_batches_are_what_generate_gives_one_by_one(tiny_llama, tiny_tokenizer, tokens_per_batch):
    ends = tiny_tokenizer.eos_token_id
    seen = dict(respond(tiny_llama, tiny_tokenizer, CHATS, max_new_tokens=12, tokens_per_batch=tokens_per_batch))
    assert sorted(seen) == list(range(len(CHATS)))
    for index, chat in enumerate(CHATS):
        ids = torch.tensor([chat_ids(tiny_tokenizer, chat)])
        new = tiny_llama.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        own = new.tolist()[: new.tolist().index(ends)] if ends in new else new.tolist()
        assert seen[index].text == tiny_tokenizer.decode(own, skip_special_tokens=True)
        assert seen[index].finished is (ends in new) and seen[index].tokens == len(own) + (ends in new)


def test_a_response_that_ends_is_finished(tiny_llama, tiny_tokenizer):
    tiny_llama.lm_head.weight = torch.nn.Parameter(
        tiny_llama.lm_head.weight.detach().clone()
    )  # apart from the embedding
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    # all logits equal: the first token wins, which is no end; then the end wins
    assert not dict(respond(tiny_llama, tiny_tokenizer, CHATS[:1], max_new_tokens=3))[0].finished
    tiny_llama.generation_config.eos_token_id = 0
    (answer,) = dict(respond(tiny_llama, tiny_tokenizer, CHATS[:1], max_new_tokens=3)).values()
    assert answer.finished and answer.text == "" and answer.tokens == 1


def test_a_response_that_was_begun_goes_on(tiny_tokenizer):
    begun = [*CHATS[0], {"role": "assistant", "content": "Well,"}]
    text = tiny_tokenizer.decode(chat_ids(tiny_tokenizer, begun))
    assert text.endswith("Well,") and tiny_tokenizer.eos_token not in text[-6:]


def test_errors(tiny_llama, tiny_tokenizer):
    with pytest.raises(ValueError, match="known are generate, continuous, server"):
        list(respond(tiny_llama, tiny_tokenizer, CHATS, backend="fast"))
    with pytest.raises(ValueError, match="known are"):
        list(respond(tiny_llama, tiny_tokenizer, CHATS, backend="server"))
    with pytest.raises(ValueError, match="leaves no room for 5000 new ones"):
        list(respond(tiny_llama, tiny_tokenizer, CHATS, max_new_tokens=5000))


def test_a_server_is_asked_for_chat_completions(server, said):
    begun = [*CHATS[1], {"role": "assistant", "content": "Well,"}]

    def answer(content, number):
        return said(content["messages"][0]["content"].upper(), "length" if "Two" in str(content) else "stop")

    with server(answer) as (url, seen):
        result = dict(respond(url, None, [*CHATS, begun], max_new_tokens=9, temperature=0.5, top_p=0.9, seed=3))
    assert result[0].text == "HI" and result[0].finished and result[0].tokens == 7
    assert not result[4].finished  # "length"
    by_text = {content["messages"][0]["content"]: content for content in seen if len(content["messages"]) == 1}
    asked = by_text["Hi"]
    assert asked == {
        "model": "served", "messages": CHATS[0], "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3,
    }  # fmt: skip
    (last,) = [content for content in seen if len(content["messages"]) == 2]
    assert last["continue_final_message"] is True and last["add_generation_prompt"] is False


def test_a_busy_server_is_asked_again_and_a_refusal_is_told(server, said, monkeypatch):
    monkeypatch.setattr("hf_sparse.distillation.generation.time.sleep", lambda seconds: None)

    def busy(content, number):
        return (503, {"error": "loading"}) if number < 3 else said("now")

    with server(busy) as (url, seen):
        assert dict(respond(url, None, CHATS[:1]))[0].text == "now" and len(seen) == 3
    with server(lambda content, number: (400, {"error": "max_tokens is too large"})) as (url, seen):
        with pytest.raises(ValueError, match=r"refused the request \(400\).*max_tokens is too large"):
            list(respond(url, None, CHATS[:1]))
        assert len(seen) == 1
    with pytest.raises(ConnectionError, match="gave no answer in 5 tries"):
        list(respond(url, None, CHATS[:1]))
