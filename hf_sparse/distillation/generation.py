"""Responses to many chats, as fast as the machine at hand gives them, one result at a time.

    for index, response in respond(model, tokenizer, chats, max_new_tokens=512): ...

    generate      transformers' generate on batches of about equal length, left padding, the longest first   (any model)
    continuous    transformers' generate_batch: a sequence that ends makes room for the next at once         (CUDA)
    server        an OpenAI-compatible server (vLLM, transformers serve), many requests in flight            (a URL as model)

Batches are made by tokens, not by rows: prompt and response of all rows, padded, stay below ``tokens_per_batch``. Results come
in the order in which they are ready, each with its index, so that a caller can write them down at once.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

__all__ = ["BACKENDS", "Response", "chat_ids", "choose_backend", "respond"]

BACKENDS = ("generate", "continuous", "server")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Response:
    """``text`` without what the chat's own beginning of it says; ``tokens`` generated; ``finished``: it came to its own end."""

    text: str
    tokens: int
    finished: bool


def choose_backend(model) -> str:
    """``server`` for a URL, else ``generate``.

    Not ``continuous`` on CUDA: for SmolLM2-135M on an H200 it had not ended when ``generate`` on large batches was long done
    (examples/results/rewriting_speed.json). Where responses differ much in length and the model is large it may win.
    """
    return "server" if isinstance(model, str) else "generate"


def respond(
    model,
    tokenizer,
    chats: Sequence[Messages],
    *,
    backend: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tokens_per_batch: int = 16384,
    server_model: str | None = None,
    requests_in_flight: int = 32,
) -> Iterator[tuple[int, Response]]:
    """Yields ``(index, Response)`` for every chat, in the order in which they are ready.

    Args:
        model: a transformers model, or the address of an OpenAI-compatible server (``http://host:8000/v1``).
        tokenizer: of the model; None for a server.
        chats: lists of turns; a last turn by the assistant is the beginning of the response.
        backend: a name of :data:`BACKENDS`; default: :func:`choose_backend`.
        temperature: 0 is greedy.
        server_model: the name the server knows its model by; default: the first it lists.

    Raises:
        ValueError: an unknown backend, or a chat with which there is no room for a response.
    """
    backend = backend or choose_backend(model)
    if backend not in BACKENDS or (backend == "server") != isinstance(model, str):
        raise ValueError(
            f"unknown backend {backend!r} for {type(model).__name__}; known are {', '.join(BACKENDS)} (for a URL)"
        )
    sampling = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if backend == "server":
        yield from _from_server(model, chats, server_model, requests_in_flight, seed, **sampling)
        return
    prompts = [chat_ids(tokenizer, chat) for chat in chats]
    _check_room(model, prompts, max_new_tokens)
    function = _continuous if backend == "continuous" else _batches
    yield from function(model, tokenizer, prompts, _settings(model, tokenizer, **sampling), seed, tokens_per_batch)


def chat_ids(tokenizer, chat: Messages) -> list[int]:
    """The token ids of a chat up to where the response begins, or goes on; plain text if the tokenizer has no template."""
    begun = chat[-1]["role"] == "assistant"
    if getattr(tokenizer, "chat_template", None) is None:
        text = "\n\n".join(turn["content"] for turn in chat)
        return tokenizer(text if begun else text + "\n\n")["input_ids"]
    end = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **end)["input_ids"]


def _check_room(model, prompts: list[list[int]], max_new_tokens: int) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if isinstance(positions, int) and longest + max_new_tokens > positions:
        raise ValueError(
            f"the model has {positions} positions; the longest prompt has {longest} tokens, which leaves no room for "
            f"{max_new_tokens} new ones. Lower max_new_tokens, or leave out rows that long"
        )


def _settings(model, tokenizer, max_new_tokens: int, temperature: float, top_p: float):
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [*ends, tokenizer.eos_token_id]
    padding = tokenizer.pad_token_id
    choose = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=padding if padding is not None else (ends[0] if ends else 0),
        **choose,
    )


def _response(tokenizer, ids: list[int], ends: list[int] | None) -> Response:
    stop = next((place for place, token in enumerate(ids) if token in (ends or ())), None)
    own = ids if stop is None else ids[:stop]
    text = tokenizer.decode(own, skip_special_tokens=True)
    return Response(text, len(own) + (stop is not None), stop is not None)


@torch.no_grad()
def _batches(model, tokenizer, prompts, settings, seed: int, tokens_per_batch: int) -> Iterator[tuple[int, Response]]:
    """transformers' generate, the longest prompts first: what does not fit into memory shows at once."""
    training = model.training
    model.eval()
    if settings.do_sample:
        torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    try:
        while order:
            width = len(prompts[order[0]])
            rows = max(1, tokens_per_batch // (width + settings.max_new_tokens))
            batch, order = order[:rows], order[rows:]
            ids = torch.full((len(batch), width), settings.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):  # generate continues what is on the right
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
            for index, new in zip(batch, output[:, width:].tolist(), strict=True):
                yield index, _response(tokenizer, new, settings.eos_token_id)
    finally:
        model.train(training)


def _continuous(
    model, tokenizer, prompts, settings, seed: int, tokens_per_batch: int
) -> Iterator[tuple[int, Response]]:
    """transformers' continuous batching, in parts, so that what is done is given out before the last is."""
    training = model.training
    model.eval()
    if settings.do_sample:
        torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    part = max(64, 64 * tokens_per_batch // (len(prompts[order[0]]) + settings.max_new_tokens)) if order else 1
    try:
        for start in range(0, len(order), part):
            batch = order[start : start + part]
            outputs = model.generate_batch(inputs=[prompts[index] for index in batch], generation_config=settings)
            # requests are named in the order they were given: req_0, req_1, ...
            names = sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))
            if len(names) != len(batch):
                raise RuntimeError(f"generate_batch answered {len(names)} of {len(batch)} requests")
            for index, name in zip(batch, names, strict=True):
                yield index, _response(tokenizer, list(outputs[name].generated_tokens), settings.eos_token_id)
    finally:
        model.train(training)


# ------------------------------------------------------------------------------------------------------------ a server


def _from_server(url, chats, name, requests_in_flight, seed, max_new_tokens, temperature, top_p):
    url = url.rstrip("/")
    name = name or _call(f"{url}/models")["data"][0]["id"]

    def ask(index: int) -> tuple[int, Response]:
        chat = chats[index]
        content = {
            "model": name,
            "messages": chat,
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed + index,
        }
        if chat[-1]["role"] == "assistant":  # vLLM's words for a response that has begun
            content |= {"add_generation_prompt": False, "continue_final_message": True}
        answer = _call(f"{url}/chat/completions", content)
        choice = answer["choices"][0]
        tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
        return index, Response(choice["message"]["content"] or "", tokens, choice["finish_reason"] == "stop")

    with ThreadPoolExecutor(requests_in_flight) as pool:
        waiting = [pool.submit(ask, index) for index in range(len(chats))]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            for one in waiting:
                one.cancel()


def _call(url: str, content: dict | None = None, tries: int = 5) -> dict:
    """One request; a busy or restarting server is asked again, a little later each time."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                said = error.read().decode(errors="replace")[:500]
                raise ValueError(f"{url} refused the request ({error.code}): {said}") from error
            last: Exception = error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            last = error
        if attempt < tries - 1:
            time.sleep(min(30, 2**attempt))
    raise ConnectionError(f"{url} gave no answer in {tries} tries: {last}") from last
