"""One line for scripts that call ``generate`` themselves, and for lm-eval: a model that always drafts.

    attach_drafter(model, draft_model, TapOut())        model.generate(...) is speculative from here on
    HFLM(pretrained=model, batch_size=1)                lm-eval as well
    detach_drafter(model)                               and back

``generate`` of this one object is replaced by a function that calls the class's with ``custom_generate``, the way transformers
itself does for repositories that bring their own. ``streamer``, ``stop_strings`` and ``tokenizer`` work as usual. A call that
speculative decoding cannot serve (a batch, beams) is an error, not a slower answer of another kind; detach the drafter for it.
"""

import functools

from hf_sparse.speculative.decoding import SpeculativeDecoding

__all__ = ["attach_drafter", "detach_drafter"]


def attach_drafter(model, draft_model, policy=None, **options) -> SpeculativeDecoding:
    """Makes ``model.generate`` speculative; returns the decoding, whose ``total`` says how it went.

    Args:
        options: of :class:`hf_sparse.speculative.decoding.SpeculativeDecoding`.

    Raises:
        ValueError: the model has a drafter already.
    """
    if "generate" in vars(model):
        raise ValueError("this model's generate is replaced already; call detach_drafter(model) first")
    decoding = SpeculativeDecoding(draft_model, policy, **options)
    plain = model.generate

    @functools.wraps(plain)
    def generate(*args, **kwargs):
        if kwargs.get("custom_generate") is not None:
            return plain(*args, **kwargs)
        decoding.streamer = kwargs.pop("streamer", options.get("streamer"))
        tokenizer = kwargs.pop("tokenizer", None)
        stops = _stop_strings(model, kwargs)
        if stops:
            from transformers import StoppingCriteriaList, StopStringCriteria

            if tokenizer is None:
                raise ValueError("stop_strings need tokenizer=, as in plain generate")
            own = kwargs.pop("stopping_criteria", None) or []
            criterion = StopStringCriteria(stop_strings=stops, tokenizer=tokenizer)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*own, criterion])
        return plain(*args, custom_generate=decoding, **kwargs)

    model.generate = generate
    return decoding


def detach_drafter(model) -> None:
    """Gives ``model.generate`` back."""
    vars(model).pop("generate", None)


def _stop_strings(model, kwargs: dict) -> list[str] | None:
    """Those of the call or of its config, taken out so that ``generate`` does not ask for a tokenizer it would not pass on."""
    stops = kwargs.pop("stop_strings", None)
    config = kwargs.get("generation_config")
    if stops is None and config is not None and config.stop_strings:
        import copy

        kwargs["generation_config"] = config = copy.deepcopy(config)
        stops, config.stop_strings = config.stop_strings, None
    return [stops] if isinstance(stops, str) else stops
