"""Distillation losses for sparse fine-tuning: SquareHead and the KL divergence (arXiv 2310.06927).

A pruned model ("student") is fine-tuned beside the dense model it came from ("teacher"):

    loss = ce * cross entropy + squarehead * L_SH + kl * L_KL

**SquareHead** compares hidden states after every layer. With ``f_l`` the states ``[batch, tokens, width]`` after layer l,
mean squares taken over the tokens that are not padding and over the width,

    L_SH = sum_l  mean (f_l^student - f_l^teacher)^2 / (mean (f_l^teacher)^2 + eps)

Each layer is measured relative to the size of its teacher's states, so that the last layers of a language model, whose
states are orders of magnitude larger, do not drown the first. The released code
(github.com/IST-DASLab/SparseFinetuning) sums over the layers, leaves the embeddings out and has eps = 2^-7, and so does
this file. Pruned by half, a layer is typically off by a few hundredths of its size.

**KL divergence** compares predictions, softened by a temperature, over the positions that have a label:

    L_KL = T^2 / N  sum_t  KL( softmax(z_t^teacher / T) || softmax(z_t^student / T) )

The released code selects position t when t itself has a label; here it is the position that *predicts* a label, t when
t + 1 has one, the one the cross entropy is taken at.

Memory: the softmax of ``[tokens, vocabulary]`` in float32, for two models and once more for its gradient, is what breaks a
training step that otherwise fits. Both losses are computed piece by piece (a block of tokens, a layer), and each piece is
recomputed in the backward pass instead of being kept. :func:`kl_from_states` does not build the logits either.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

__all__ = ["EPS", "kl_divergence", "kl_from_states", "output_head", "predicts_label", "squarehead"]

EPS = 2.0**-7  # the machine epsilon of bfloat16, as in the released code
_ELEMENTS_PER_PIECE = 2**25  # of logits at once: 128 MB in float32


def squarehead(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor | None = None,
    *,
    layers: Sequence[tuple[int, int]] | None = None,
    reduction: str = "sum",
    eps: float = EPS,
) -> torch.Tensor:
    """The SquareHead loss, a float32 scalar.

    Args:
        student: hidden states ``[batch, tokens, width]`` as transformers returns them with ``output_hidden_states=True``:
            the embeddings first, then one per layer.
        teacher: the teacher's; no gradient flows into them.
        mask: ``[batch, tokens]``, nonzero where a token counts (an attention mask); None counts all.
        layers: pairs (student's index, teacher's index) into the hidden states, for models of different depth; index 0 is
            the embeddings. None compares every layer with its equal and leaves the embeddings out.
        reduction: ``sum`` over the layers, as in the released code, or ``mean``.

    Raises:
        ValueError: different numbers of layers and no ``layers``, different widths or tokens, an index out of range,
            an unknown reduction.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is 'sum' or 'mean', got {reduction!r}")
    if layers is None:
        if len(student) != len(teacher):
            raise ValueError(
                f"the student has {len(student) - 1} layers and the teacher {len(teacher) - 1}; say which are compared: "
                f"layers=[(student layer, teacher layer), ...], e.g. [({len(student) - 1}, {len(teacher) - 1})] for the last"
            )
        layers = [(index, index) for index in range(1, len(student))]
    if not layers:
        raise ValueError("layers is empty: name at least one pair (student layer, teacher layer)")
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in layers:
        if not (0 <= ours < len(student) and 0 <= theirs < len(teacher)):
            raise ValueError(
                f"layers has ({ours}, {theirs}); the student's hidden states go to {len(student) - 1}, "
                f"the teacher's to {len(teacher) - 1}"
            )
        if student[ours].shape != teacher[theirs].shape:
            raise ValueError(
                f"hidden states to compare differ in shape: student layer {ours} {tuple(student[ours].shape)}, teacher layer "
                f"{theirs} {tuple(teacher[theirs].shape)}; SquareHead needs the same tokens and the same width"
            )
        of_teacher = teacher[theirs].detach().to(student[ours].device)
        total = total + _recomputed(_layer_error, student[ours], of_teacher, mask, eps)
    return total / len(layers) if reduction == "mean" else total


def kl_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    items: torch.Tensor | float | None = None,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """KL(teacher || student) per token times the squared temperature, a float32 scalar in nats.

    Args:
        student: logits ``[..., vocabulary]``.
        teacher: logits of the same shape; no gradient flows into them.
        mask: the logits' shape without the last dimension, nonzero where a position counts; None counts all.
            See :func:`predicts_label`.
        temperature: above 1 looks at the unlikely tokens more.
        items: what the sum is divided by; None: the positions that count. With gradient accumulation pass the number of
            the whole step, so that the micro-batches' losses add up to that of one large batch.
        vocabulary: compare the first so many entries only, for padded vocabularies of one tokenizer
            (:func:`hf_sparse.distillation.vocabulary.shared_vocabulary`); None: all, which then must be equally many.

    Raises:
        ValueError: different vocabularies or shapes, a temperature that is not positive.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher saw different tokens: {tuple(student.shape)} and {tuple(teacher.shape)}")
    vocabulary = _check_kl(student, teacher, temperature, vocabulary)
    same = nn.Identity()
    widest = max(student.shape[-1], teacher.shape[-1])
    return _kl(student, teacher, same, same, mask, temperature, items, vocabulary, widest)


def kl_from_states(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_head: Callable[[torch.Tensor], torch.Tensor],
    teacher_head: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    items: torch.Tensor | float | None = None,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """:func:`kl_divergence` from the last hidden states ``[..., width]`` and the heads that make logits of them.

    Logits exist for one block of tokens at a time. The heads come from :func:`output_head`; gradients flow into the
    student's.

    Raises:
        ValueError: as :func:`kl_divergence`, as soon as the first block's logits are there.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher saw different tokens: {tuple(student.shape)} and {tuple(teacher.shape)}")
    with torch.no_grad():
        first, other = student_head(student.flatten(0, -2)[:1]), teacher_head(teacher.flatten(0, -2)[:1])
    vocabulary = _check_kl(first, other, temperature, vocabulary)
    widest = max(first.shape[-1], other.shape[-1])
    return _kl(student, teacher, student_head, teacher_head, mask, temperature, items, vocabulary, widest)


def predicts_label(labels: torch.Tensor) -> torch.Tensor:
    """``[batch, tokens]`` bool: True at t where the next token's label is not ignored (-100); the last is False."""
    return nn.functional.pad(labels[..., 1:] != -100, (0, 1), value=False)


def output_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from a causal language model's last hidden states to its logits.

    It is the output embeddings and what a family does to their result: a scale (Cohere, Granite, Falcon-H1) or a soft cap
    (Gemma 2 and 3). The result is compared with the logits of ``model`` on two tokens, since families differ.

    Raises:
        ValueError: the model has no output embeddings, or its logits are not what this function computes.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings; KL needs a causal language model")
    config = base.config.get_text_config()
    scale = next((s for n in ("logit_scale", "lm_head_multiplier") if (s := getattr(config, n, None)) is not None), 1.0)
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(states: torch.Tensor) -> torch.Tensor:
        result = head(states) * scale if scale != 1 else head(states)
        return torch.tanh(result / cap) * cap if cap else result

    _check_head(base, logits)
    return logits


@torch.no_grad()
def _check_head(model: nn.Module, head: Callable) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    was_training = model.training
    model.eval()
    try:
        tokens = torch.tensor([[1, 2]], device=model.get_input_embeddings().weight.device)
        outputs = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        expected, got = outputs.logits.float(), head(outputs.hidden_states[-1]).float()
    finally:
        model.train(was_training)
    if not torch.allclose(got.to(expected.device), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embeddings in a way that is not known here; "
            "distil with SquareHead only (kl=0), or pass full logits to kl_divergence in a loop of your own"
        )


def _check_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float, vocabulary: int | None) -> int:
    """How many entries are compared."""
    if temperature <= 0:
        raise ValueError(f"temperature is positive, got {temperature}")
    sizes = student.shape[-1], teacher.shape[-1]
    if vocabulary is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]}; KL compares distributions over "
            "the same tokens. Padded vocabularies of one tokenizer: say vocabulary=len(tokenizer)"
        )
    if vocabulary is not None and not 1 <= vocabulary <= min(sizes):
        raise ValueError(f"vocabulary lies from 1 to {min(sizes)}, what both models have; got {vocabulary}")
    return vocabulary or sizes[0]


def _kl(
    student, teacher, student_head, teacher_head, mask, temperature, items, vocabulary: int, widest: int
) -> torch.Tensor:
    teacher = teacher.detach().to(student.device)
    if mask is None:
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    else:
        mask = mask.bool().to(student.device)
        student, teacher = student[mask], teacher[mask]
    rows = max(1, _ELEMENTS_PER_PIECE // widest)
    total = student.float().sum() * 0  # a batch without labels still has a gradient: zero
    for ours, theirs in zip(student.split(rows), teacher.split(rows), strict=True):
        total = total + _recomputed(_kl_block, ours, theirs, student_head, teacher_head, temperature, vocabulary)
    return total / torch.as_tensor(len(student) if items is None else items, device=total.device).clamp(min=1)


def _layer_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Mean square of the difference over that of the teacher; sums in float32."""
    teacher = teacher.float()
    error = student.float() - teacher
    if mask is None:
        return error.square().mean() / (teacher.square().mean() + eps)
    kept = mask.bool().to(student.device).unsqueeze(-1)
    count = (kept.sum() * student.shape[-1]).clamp(min=1)
    # where, not a product, and before the square: what stands at padding may be anything, and 0 * inf is NaN
    error, teacher = torch.where(kept, error, 0), torch.where(kept, teacher, 0)
    return (error.square().sum() / count) / (teacher.square().sum() / count + eps)


def _kl_block(student, teacher, student_head, teacher_head, temperature: float, vocabulary: int) -> torch.Tensor:
    with torch.no_grad():
        wanted = log_softmax(teacher_head(teacher)[..., :vocabulary].float() / temperature, dim=-1)
    given = log_softmax(student_head(student)[..., :vocabulary].float() / temperature, dim=-1)
    return kl_div(given, wanted, log_target=True, reduction="sum") * temperature**2


def _recomputed(function: Callable, *arguments) -> torch.Tensor:
    """``function(*arguments)``, whose intermediate results are computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
