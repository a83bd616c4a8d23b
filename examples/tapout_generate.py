"""Speculative decoding with TapOut (arXiv 2511.02017): one line in a script, and what it learns about when to stop drafting.

    python examples/tapout_generate.py --model MODEL                      # minutes on a CPU
    python examples/tapout_generate.py --model MODEL --draft DIR          # a drafter of your own
    python examples/tapout_generate.py --model MODEL --tiny               # checks the program, measures nothing

    model.generate(**inputs, custom_generate=SpeculativeDecoding(draft_model, TapOut()))

The target is the model, made slower by layers that change nothing (--depth times as many), so that a drafter cut out of it has
a cost ratio as pairs of real models have. Without --draft the drafter is the model itself at half of its layers' zeros, pruned
here in one shot (50%, SparseGPT on the excerpt of WikiText-2): a drafter that says nearly what the target says. Every question
is answered by the target alone, with fixed lengths of draft, with each of TapOut's rules alone, and with TapOut, which starts
knowing nothing and keeps what it learns from question to question. All answers must be the same. Written: tapout_generate.json
and .png beside each other, and tapout.json, which the next run could start from (``TapOut.load``).
"""

import argparse
import copy
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 60 miles in 1.5 hours. What is its average speed? Show your work.",
    "Explain in simple terms why the sky is blue.",
    "List five tips for better sleep.",
    "Write a short story about a lighthouse keeper who finds a lost whale.",
    "Translate to French: The weather is beautiful today and we are going to the beach.",
    "Summarize the water cycle in three sentences.",
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub id, directory or .gguf file")
    add("--draft", help="a drafter of the same tokenizer; default: the model at 50%% sparsity")
    add(
        "--depth",
        type=float,
        default=4.0,
        metavar="X",
        help="the target has X times the model's layers; default: %(default)s",
    )
    add("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "question"; default: eight questions')
    add("--limit", type=int, metavar="N", help="only the first prompts")
    add("--new-tokens", type=int, default=96, help="of an answer; default: %(default)s")
    add("--max-draft", type=int, default=16, help="default: %(default)s")
    add("--policies", nargs="+", help="default: static:2 static:4 static:8, TapOut's rules, the stock ones, tapout")
    add("--dtype", default="float32")
    add("--device", default="cpu")
    add("--output", type=Path, default=Path("tapout_generate.json"))
    add("--tiny", action="store_true", help="two questions, a few tokens")
    arguments = parser.parse_args()
    if arguments.prompts and not arguments.prompts.is_file():
        parser.error(f"no such file: {arguments.prompts}")
    if arguments.depth < 1:
        parser.error(f"--depth is at least 1, got {arguments.depth:g}")
    if arguments.tiny:
        arguments.limit, arguments.new_tokens, arguments.max_draft, arguments.depth = 2, 8, 4, 2.0
        arguments.policies = arguments.policies or ["static:2", "tapout"]
    rules = ["max-confidence", "svip", "svip-difference", "margin", "adaedl"]
    arguments.policies = arguments.policies or [
        "static:2",
        "static:4",
        "static:8",
        *rules,
        "heuristic",
        "confidence",
        "tapout",
    ]
    return arguments


def main() -> None:
    arguments = parse()
    import torch
    import transformers
    from _deepened import deepen
    from rich.console import Console

    from hf_sparse import SparsityConfig, load_model, load_segments, load_tokenizer, prune
    from hf_sparse.atomic import atomic_write_text
    from hf_sparse.speculative.bench import benchmark
    from hf_sparse.speculative.decoding import SpeculativeDecoding
    from hf_sparse.speculative.policies import parse_policies
    from hf_sparse.speculative.tapout import TapOut

    transformers.logging.set_verbosity_error()
    policies = parse_policies(arguments.policies, arguments.max_draft)
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, dtype=arguments.dtype).to(arguments.device)
    if arguments.draft:
        drafter = load_model(arguments.draft, dtype=arguments.dtype).to(arguments.device)
    else:
        drafter = copy.deepcopy(model)
        size = dict(samples=2, sequence_length=64) if arguments.tiny else dict(samples=24, sequence_length=512)
        text = load_segments(str(HERE / "data" / "wikitext2_excerpt.txt"), tokenizer, **size)
        prune(drafter, SparsityConfig(sparsity=0.5, saliency="sparsegpt"), text.ids, progress=not arguments.tiny)
    target = deepen(model, round(arguments.depth * model.config.get_text_config().num_hidden_layers))
    del model

    prompts = [ids(question, tokenizer) for question in questions(arguments)]
    report = benchmark(
        target,
        {"drafter": drafter},
        policies,
        prompts,
        max_new_tokens=arguments.new_tokens,
        progress=not arguments.tiny,
    )
    command = " ".join(["python", "examples/tapout_generate.py", *(Path(w).name for w in sys.argv[1:])])
    report.facts |= {"command": command, "model": Path(arguments.model).name, "depth": arguments.depth}
    atomic_write_text(arguments.output, json.dumps(report.to_dict(), indent=1) + "\n")
    try:
        report.plot(arguments.output.with_suffix(".png"))
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    console = Console()
    console.print(*report.tables(console.width), sep="\n")

    # the same by hand, as a script would have it
    policy = TapOut(max_draft=arguments.max_draft)
    decoding = SpeculativeDecoding(drafter, policy)
    prompt = torch.tensor([prompts[0]], device=target.device)
    output = target.generate(prompt, do_sample=False, max_new_tokens=arguments.new_tokens, custom_generate=decoding)
    policy.save("tapout.json")
    console.print(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip(), markup=False)
    last = decoding.last
    console.print(
        f"{last.mean_accepted_length:.2f} tokens per forward of the target, {last.acceptance:.0%} of the drafted accepted; "
        f"saved {arguments.output} and tapout.json",
        markup=False,
    )


def questions(arguments) -> list[str]:
    if arguments.prompts is None:
        return QUESTIONS[: arguments.limit]
    rows = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row.get("prompt") or row["question"] for row in rows[: arguments.limit]]


def ids(question: str, tokenizer) -> list[int]:
    chat = [{"role": "user", "content": question}]
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer(question)["input_ids"]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]


if __name__ == "__main__":
    main()
