"""How many tokens the vocabularies of two models share, where a distillation compares their predictions.

Models of one family pad their embeddings to different sizes: Qwen2.5's tokenizer has 151,665 tokens, its small models have
151,936 rows for them, its large ones 152,064. The rows beyond the tokenizer's are never a target and mean nothing, so the KL
divergence is taken over the tokens alone. Two different tokenizers, in contrast, give the same row different words; no number
of rows makes that right.
"""

__all__ = ["shared_vocabulary"]


def shared_vocabulary(
    student: int,
    teacher: int,
    student_tokenizer=None,
    teacher_tokenizer=None,
    names: tuple[str, str] = ("student", "teacher"),
) -> int:
    """The number of leading entries of both vocabularies that stand for the same tokens.

    Args:
        student, teacher: the sizes of the two models' vocabularies.
        student_tokenizer, teacher_tokenizer: transformers tokenizers (or processors that have one), as far as they are known.
            With both, their tokens are compared.
        names: what the message of an error calls the models.

    Raises:
        ValueError: tokenizers that differ, or sizes that differ while it is not known that the tokenizers do not.
    """
    ours, theirs = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    if ours is not None and theirs is not None:
        if different := sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1]):
            token, index = different[0]
            holders = [name for name, tokens in zip(names, (ours, theirs), strict=True) if tokens.get(token) == index]
            raise ValueError(
                f"the tokenizers differ ({len(different)} entries; only that of the {holders[0]} has {token!r} as {index}): KL "
                "would compare the probabilities of different words. Distil with SquareHead only (kl=0) where the widths "
                "allow, or let the teacher write the data (hf-sparse distill) and fine-tune on that"
            )
    if student == teacher:
        return student
    sizes = f"the {names[0]} has {student} tokens, the {names[1]} has {teacher}"
    count = None if ours is None else max(ours.values()) + 1
    if count is not None and count > min(student, teacher):
        raise ValueError(f"{sizes}, and the tokenizer {count}: KL needs every token in both")
    if theirs is not None and ours is not None:
        return count
    known = f"vocabulary={count}, what the {names[0]}'s has" if count else "vocabulary=len(tokenizer)"
    raise ValueError(
        f"{sizes}; KL compares the same tokens. If both use one tokenizer and are padded to different sizes, say how many "
        f"tokens that has ({known}); if their tokenizers differ, KL compares different words: use kl=0"
    )


def _tokens(tokenizer) -> dict[str, int] | None:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
