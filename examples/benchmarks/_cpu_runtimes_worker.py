"""One runtime in a process of its own: it loads a model, then answers every line on its input with one timed generation.

    python _cpu_runtimes_worker.py onnxruntime-float32 FOLDER --prompt 32 --new 64 --threads 2

Only the standard library and numpy at the top: a runtime's environment need not have torch. Each ``load_...`` returns
``(generate, facts)``; ``generate(prompt, new)`` is greedy at batch 1 with a key-value cache and returns the new tokens, the
seconds of the prompt, and the seconds of each of the ``new - 1`` steps after it.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy

clock = time.perf_counter


def timed_steps(step, prompt: list[int], new: int) -> tuple[list[int], float, list[float]]:
    """``step(tokens, past) -> logits [vocabulary]``: first the whole prompt, then token by token."""
    begin = clock()
    tokens = [int(step(prompt, 0).argmax())]
    first, seconds = clock() - begin, []
    for past in range(len(prompt), len(prompt) + new - 1):
        begin = clock()
        tokens.append(int(step(tokens[-1:], past).argmax()))
        seconds.append(clock() - begin)
    return tokens, first, seconds


def load_torch(folder: Path, runtime: str, arguments):
    """Stock transformers: ``torch-bfloat16``, ``torch-float32-compiled``; with ``packed`` for ``torch``, our layers."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    kind, dtype, *compiled = runtime.split("-")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).eval()
    facts = {"weights": dtype}
    if kind == "packed":
        from hf_sparse import pack_for_inference

        facts["packed"] = str(pack_for_inference(model, arguments.packed_runtime))
    call = torch.compile(model, dynamic=False) if compiled else model

    def generate(prompt, new):
        if compiled:  # of fixed length, or every step would compile again
            cache = StaticCache(config=model.config, max_cache_len=arguments.prompt + arguments.new)
        else:
            cache = DynamicCache(config=model.config)

        def step(tokens, past):
            ids, positions = torch.tensor([tokens]), torch.arange(past, past + len(tokens))[None]
            forward = call if len(tokens) == 1 else model
            answer = forward(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return answer.logits[0, -1]

        return timed_steps(step, prompt, new)

    return generate, facts


def load_openvino(folder: Path, runtime: str, arguments):
    import openvino

    place = folder / runtime
    properties = json.loads((place / "openvino_properties.json").read_text())
    properties |= {"INFERENCE_NUM_THREADS": arguments.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(place / "openvino_model.xml", "CPU", properties)
    request = compiled.create_infer_request()

    def generate(prompt, new):
        request.reset_state()

        def step(tokens, past):
            feed = {
                "input_ids": numpy.array([tokens]),
                "attention_mask": numpy.ones((1, past + len(tokens)), numpy.int64),
                "position_ids": numpy.arange(past, past + len(tokens))[None],
                "beam_idx": numpy.zeros(1, numpy.int32),
            }
            return request.infer(feed, share_inputs=True, share_outputs=True)["logits"][0, -1]

        return timed_steps(step, prompt, new)

    hint = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    return generate, {"weights": runtime.partition("-")[2], "arithmetic": hint}


def load_onnxruntime(folder: Path, runtime: str, arguments):
    """The cache stays in the runtime's own tensors, from one call to the next."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"])
    taken = {entry.name: entry.shape for entry in session.get_inputs()}
    given = [entry.name for entry in session.get_outputs()]
    tensor = onnxruntime.OrtValue.ortvalue_from_numpy

    def generate(prompt, new):
        empty = {n: tensor(numpy.zeros((1, s[1], 0, s[3]), numpy.float32)) for n, s in taken.items() if "past" in n}
        state = dict(empty)

        def step(tokens, past):
            feed = {
                "input_ids": numpy.array([tokens]),
                "attention_mask": numpy.ones((1, past + len(tokens)), numpy.int64),
                "position_ids": numpy.arange(past, past + len(tokens))[None],
            }
            feed = {name: tensor(array) for name, array in feed.items() if name in taken} | state
            logits, *present = session.run_with_ort_values(given, feed)
            state.update(zip([n.replace("present", "past_key_values") for n in given[1:]], present, strict=True))
            return logits.numpy()[0, -1]

        return timed_steps(step, prompt, new)

    return generate, {"weights": "float32"}


def load_deepsparse(folder: Path, runtime: str, arguments):
    """DeepSparse takes fixed shapes: one token and a full-length cache, filled from the right, the rest masked.

    The prompt goes in token by token. Only the engine's own call is timed, not the copying of the cache in numpy around it.
    """
    os.environ["NM_DISABLE_ANALYTICS"] = "1"
    import onnx
    from deepsparse import Engine

    length = arguments.prompt + arguments.new
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    sizes = {"batch": 1, "new": 1, "past": length - 1, "total": length}
    for value in [*graph.graph.input, *graph.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = sizes.get(size.dim_param, length)
    fixed = folder / "onnx" / "fixed.onnx"  # beside the weights, which stay where they are
    onnx.save(graph, fixed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input}
    names = [value.name.replace("present", "past_key_values") for value in graph.graph.output][1:]
    engine = Engine(str(fixed), batch_size=1, num_cores=arguments.threads)

    def generate(prompt, new):
        state = {name: numpy.zeros(shapes[name], numpy.float32) for name in names}
        tokens, seconds, fed = [], [], list(prompt)
        for position in range(len(prompt) + new - 1):
            mask = numpy.zeros((1, length), numpy.int64)
            mask[0, length - 1 - position :] = 1
            feed = {"input_ids": numpy.array([[fed[position]]]), "position_ids": numpy.array([[position]])} | state
            feed["attention_mask"] = mask
            feed = [numpy.ascontiguousarray(feed[name]) for name in engine.input_names]
            begin = clock()
            logits, *present = engine.run(feed, val_inp=False)
            seconds.append(clock() - begin)
            state = {name: array[:, :, 1:] for name, array in zip(names, present, strict=True)}
            if position >= len(prompt) - 1:
                tokens.append(int(logits[0, -1].argmax()))
                fed.append(tokens[-1])
        return tokens, sum(seconds[: len(prompt)]), seconds[len(prompt) :]

    supported = f"{engine.fraction_of_supported_ops:.2f} of the operations are its own; prompt fed token by token"
    return generate, {"weights": "float32", "note": supported}


LOADERS = {
    "torch": (load_torch, ("torch", "transformers")),
    "packed": (load_torch, ("torch", "transformers", "hf_sparse")),
    "openvino": (load_openvino, ("openvino",)),
    "onnxruntime": (load_onnxruntime, ("onnxruntime",)),
    "deepsparse": (load_deepsparse, ("deepsparse",)),
}


def memory() -> dict[str, int]:
    """Bytes of this process in memory: now, of that not backed by a file (mapped weights are), and at most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"rss_bytes": "VmRSS", "anonymous_bytes": "RssAnon", "peak_bytes": "VmHWM"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in kinds.items()}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", "?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--packed-runtime", default="auto")
    arguments = parser.parse_args()
    reply = os.fdopen(os.dup(1), "w")  # what a library prints must not mix with the answers
    os.dup2(2, 1)
    load, packages = LOADERS[arguments.runtime.partition("-")[0]]
    prompt = numpy.random.default_rng(0).integers(arguments.vocabulary, size=arguments.prompt).tolist()
    begin = clock()
    generate, facts = load(arguments.folder, arguments.runtime, arguments)
    generate(prompt, min(arguments.new, 4))  # compiles, allocates, warms the caches
    facts |= {"load_seconds": clock() - begin, "versions": {name: version(name) for name in packages}}
    print(json.dumps(facts), file=reply, flush=True)
    for _ in sys.stdin:
        generate(prompt, 2)  # not timed: what others pushed out of the caches, or the system out of memory, comes back
        tokens, first, seconds = generate(prompt, arguments.new)
        result = {"tokens": tokens, "prompt_seconds": first, "step_seconds": seconds} | memory()
        print(json.dumps(result), file=reply, flush=True)


if __name__ == "__main__":
    main()
