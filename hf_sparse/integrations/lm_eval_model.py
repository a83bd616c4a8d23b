"""lm-eval's model type ``hf-sparse``: packed checkpoints, packed runtimes and drafters, from its own command line.

    hf-sparse lm-eval run --model hf-sparse --model_args pretrained=DIR,sparse_runtime=auto --tasks ...
    hf-sparse lm-eval run --model hf-sparse --model_args pretrained=DIR,draft=DIR2,policy=tapout --tasks gsm8k --batch_size 1

lm-eval knows no plugins: a model type exists once the module that defines it was imported, and its command imports only its
own. ``hf-sparse lm-eval`` is that command, unchanged, with ours registered first; in Python ``import hf_sparse`` before
``lm_eval`` is enough (:mod:`hf_sparse.integrations` registers the type when lm-eval is loaded, without loading anything). A
dense checkpoint with zeros needs none of this: stock ``lm_eval --model hf`` gives the same numbers.

More arguments than lm-eval's ``hf``, each may be left out:

    sparse_runtime    auto, packed or int8: run packed (hf_sparse.runtime)
    draft, policy     a drafter and when it stops (hf_sparse.speculative.policies); generation tasks only, batch_size=1
"""

from lm_eval.models.huggingface import HFLM

__all__ = ["NAME", "SparseLM", "run_command_line"]

NAME = "hf-sparse"


class SparseLM(HFLM):
    """``hf`` with packed runtimes and drafters."""

    def __init__(
        self,
        pretrained,
        *,
        sparse_runtime: str | None = None,
        draft: str | None = None,
        policy: str = "tapout",
        **kwargs,
    ):
        from hf_sparse.integrations import register

        register()  # from_pretrained reads packed checkpoints

        if draft is not None:
            from hf_sparse.speculative.policies import parse_policy

            self.policy = parse_policy(policy)
            if str(kwargs.get("batch_size", 1)) != "1":
                raise ValueError("a drafter writes one text at a time: batch_size=1")
        if isinstance(pretrained, str) and pretrained.endswith(".gguf"):
            from hf_sparse.loading import load_model, load_tokenizer

            kwargs.setdefault("tokenizer", load_tokenizer(pretrained))
            device = kwargs.get("device", "cpu")
            pretrained = load_model(pretrained).to(device)
        super().__init__(pretrained, **kwargs)
        if sparse_runtime is not None:
            from hf_sparse.runtime.pack import check_runtime, pack_for_inference

            check_runtime(sparse_runtime)
            pack_for_inference(self.model, sparse_runtime)
        if draft is not None:
            from hf_sparse.loading import load_model, load_tokenizer
            from hf_sparse.speculative.attach import attach_drafter

            drafter = load_model(draft, str(self.model.dtype).removeprefix("torch.")).to(self.device)
            own, options = load_tokenizer(draft), {}
            if own.get_vocab() != self.tokenizer.get_vocab():
                options = {"tokenizer": self.tokenizer, "draft_tokenizer": own}
            self.speculation = attach_drafter(self.model, drafter, self.policy, **options)


def run_command_line(words: list[str]) -> int:
    """lm-eval's own command line, with our model type."""
    import sys

    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:SparseLM")
    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
