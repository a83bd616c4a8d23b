"""SquareHead and KL against the released code's numbers, closed forms, and autograd without recomputation."""

import copy
import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from hf_sparse.distillation import losses
from hf_sparse.distillation.losses import EPS, kl_divergence, kl_from_states, output_head, predicts_label, squarehead
from hf_sparse.distillation.vocabulary import shared_vocabulary


def example():
    """3 layers and embeddings, 2 sequences of 5 tokens, width 8, vocabulary 11; what the released code was run on."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student = [draw(2, 5, 8) * (layer + 1) for layer in range(4)]
    teacher = [state + 0.3 * draw(2, 5, 8) for state in student]
    student_logits = draw(2, 5, 11) * 2
    teacher_logits = student_logits + draw(2, 5, 11)
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 2, 3, -100, -100]])
    return student, teacher, student_logits, teacher_logits, attention, labels


def test_squarehead_is_that_of_the_released_code():
    """IST-DASLab/SparseFinetuning, scripts/train/train_sparse.py, KnowledgeDistillation, run on example()."""
    student, teacher, _, _, attention, _ = example()
    assert squarehead(student, teacher, attention).item() == pytest.approx(0.04785628244280815, rel=1e-6)


@pytest.mark.parametrize(
    ("temperature", "weight", "recorded"), [(1.0, 1.0, 0.26544395089149475), (2.0, 0.5, 0.17249003)]
)
def test_kl_is_that_of_the_released_code(temperature, weight, recorded):
    _, _, student, teacher, _, labels = example()
    ours = weight * kl_divergence(student, teacher, labels != -100, temperature=temperature)
    assert ours.item() == pytest.approx(recorded, rel=1e-6)


def test_closed_forms():
    student, teacher, *_ = example()
    # a student that outputs zero is off by the whole size of the teacher; one that is c times too large, by (c - 1)^2
    silent = [torch.zeros_like(state) for state in teacher]
    assert squarehead(silent, teacher, eps=0.0).item() == pytest.approx(3)
    assert squarehead([3 * state for state in teacher], teacher, eps=0.0, reduction="mean").item() == pytest.approx(4)
    # with the released code's eps a layer of mean square m costs m / (m + eps): 1 but for what eps is beside m
    sizes = [float(state.square().mean()) for state in teacher[1:]]
    expected = sum(size / (size + EPS) for size in sizes)
    assert squarehead(silent, teacher).item() == pytest.approx(expected, rel=1e-6) and 2.97 < expected < 3
    # one token, two words: KL of two Bernoulli distributions
    p, q = 0.7, 0.4
    logits = lambda x: torch.tensor([[math.log(x), math.log(1 - x)]])  # noqa: E731
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl_divergence(logits(q), logits(p)).item() == pytest.approx(expected, rel=1e-5)


def test_layers_are_weighed_relative_to_their_size():
    student, teacher, *_ = example()
    one = squarehead(student, teacher, layers=[(2, 2)], eps=0.0)
    large = squarehead([1000 * s for s in student], [1000 * t for t in teacher], layers=[(2, 2)], eps=0.0)
    assert large.item() == pytest.approx(one.item(), rel=1e-5)


def test_padding_does_not_count_whatever_is_there():
    student, teacher, _, _, attention, _ = example()
    expected = squarehead(student, teacher, attention)
    broken = [torch.where(attention.bool()[..., None], state, math.inf).requires_grad_() for state in student]
    loss = squarehead(broken, teacher, attention)
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert all(torch.isfinite(state.grad).all() for state in broken[1:])
    assert broken[0].grad is None  # the embeddings are not compared


def test_squarehead_gradient_is_that_of_the_formula():
    student, teacher, _, _, attention, _ = example()
    student = [state.clone().requires_grad_() for state in student]
    squarehead(student, teacher, attention).backward()
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        kept = attention.bool()
        size = theirs[kept].square().mean() + EPS
        expected = torch.zeros_like(ours)
        expected[kept] = (2 * (ours - theirs) / (kept.sum() * 8) / size).detach()[kept]
        torch.testing.assert_close(ours.grad, expected)


@pytest.mark.parametrize("elements", [11, 30, 2**25])  # blocks of one token, of two, and one block of all
def test_kl_in_blocks_is_kl(monkeypatch, elements):
    monkeypatch.setattr(losses, "_ELEMENTS_PER_PIECE", elements)
    _, _, student, teacher, _, labels = example()
    whole = student.double().requires_grad_()
    mask = labels != -100
    softened = log_softmax(whole[mask] / 2, -1), log_softmax(teacher[mask].double() / 2, -1)
    wanted = kl_div(*softened, log_target=True, reduction="batchmean") * 4
    wanted.backward()
    pieces = student.clone().requires_grad_()
    got = kl_divergence(pieces, teacher, mask, temperature=2.0)
    got.backward()
    torch.testing.assert_close(got.double(), wanted)
    torch.testing.assert_close(pieces.grad.double(), whole.grad, rtol=1e-4, atol=1e-7)


def test_kl_keeps_no_float32_copy_of_the_logits(monkeypatch):
    """What autograd holds on to for the backward pass: the logits themselves, in their own dtype."""
    monkeypatch.setattr(losses, "_ELEMENTS_PER_PIECE", 200 * 16)
    student = torch.randn(64, 200, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(64, 200, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        kl_divergence(student, teacher).backward()
    assert max((t.numel() for t in kept if t.dtype == torch.float32), default=0) < student.numel()


def test_equal_models_cost_nothing(tiny_llama):
    tokens = torch.arange(12).view(1, 12)
    outputs = tiny_llama(input_ids=tokens, output_hidden_states=True)
    states = outputs.hidden_states
    loss = squarehead(states, states)
    assert loss.item() == 0
    loss.backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in tiny_llama.parameters())
    head = output_head(tiny_llama)
    assert abs(kl_from_states(states[-1], states[-1], head, head).item()) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "phi"])
def test_heads_give_the_models_own_logits(tiny_model, family):
    overrides = {"final_logit_softcapping": 5.0} if family == "gemma3_text" else {}
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        outputs = model(input_ids=torch.arange(9).view(1, 9), output_hidden_states=True)
    torch.testing.assert_close(output_head(model)(outputs.hidden_states[-1]), outputs.logits)


def test_a_head_that_is_not_known_is_noticed(tiny_llama):
    forward = tiny_llama.forward

    def doubled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    tiny_llama.forward = doubled
    with pytest.raises(ValueError, match="not known here"):
        output_head(tiny_llama)


def test_kl_from_states_is_kl_of_the_logits(tiny_model):
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    batch = {"input_ids": torch.arange(20).view(2, 10), "output_hidden_states": True}
    ours, theirs = student(**batch), teacher(**batch)
    mask = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = kl_divergence(ours.logits, theirs.logits, mask, temperature=2.0)
    expected = torch.autograd.grad(wanted, student.lm_head.weight, retain_graph=True)[0]
    heads = output_head(student), output_head(teacher)
    got = kl_from_states(ours.hidden_states[-1], theirs.hidden_states[-1], *heads, mask, temperature=2.0)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, student.lm_head.weight)[0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("elements", [2**25, 30])
def test_padded_vocabularies_are_compared_over_the_tokens_alone(monkeypatch, elements):
    """Whatever stands in the padding of either model, KL and its gradient are those of the tokens."""
    monkeypatch.setattr(losses, "_ELEMENTS_PER_PIECE", elements)
    _, _, student, teacher, _, labels = example()
    mask = labels != -100
    expected = kl_divergence(student[..., :9].clone().requires_grad_(), teacher[..., :9], mask)
    padded = torch.cat([teacher[..., :9], torch.full((2, 5, 6), 50.0)], -1)
    student = student.clone().requires_grad_()
    loss = kl_divergence(student, padded, mask, vocabulary=9)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert student.grad[..., :9][mask].abs().sum() > 0 and not student.grad[..., 9:].any()
    with pytest.raises(ValueError, match="vocabulary lies from 1 to 11, what both models have; got 12"):
        kl_divergence(student, padded, mask, vocabulary=12)


def test_shared_vocabularies(tiny_tokenizer):
    size = len(tiny_tokenizer)
    assert shared_vocabulary(512, 512) == 512
    assert shared_vocabulary(512, 640, tiny_tokenizer, tiny_tokenizer) == size
    with pytest.raises(
        ValueError, match=f"student has 512 tokens, the teacher has 640.*vocabulary={size}, what the student's"
    ):
        shared_vocabulary(512, 640, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"padded to different sizes.*vocabulary=len\(tokenizer\)"):
        shared_vocabulary(512, 640)
    with pytest.raises(ValueError, match=f"the tokenizer {size}: KL needs every token in both"):
        shared_vocabulary(512, size - 1, tiny_tokenizer, tiny_tokenizer)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(
        ValueError, match=f"the tokenizers differ .1 entries; only that of the teacher has '<new>' as {size}"
    ):
        shared_vocabulary(512, 512, tiny_tokenizer, other)


def test_positions_that_predict_a_label():
    labels = torch.tensor([[-100, -100, 3, 4, -100]])
    assert predicts_label(labels).tolist() == [[False, True, True, False, False]]


def test_no_label_is_no_loss():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    loss = kl_divergence(logits, torch.randn(1, 4, 7), torch.zeros(1, 4))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_errors_name_both_sides():
    student, teacher, student_logits, teacher_logits, *_ = example()
    with pytest.raises(ValueError, match="student has 3 layers and the teacher 2"):
        squarehead(student, teacher[:3])
    with pytest.raises(ValueError, match=r"student layer 1 \(2, 5, 8\), teacher layer 1 \(2, 5, 6\)"):
        squarehead(student, [state[..., :6] for state in teacher])
    with pytest.raises(ValueError, match=r"layers has \(4, 1\)"):
        squarehead(student, teacher, layers=[(4, 1)])
    with pytest.raises(ValueError, match="'sum' or 'mean', got 'max'"):
        squarehead(student, teacher, reduction="max")
    with pytest.raises(ValueError, match="student's vocabulary has 11 entries, the teacher's 10"):
        kl_divergence(student_logits, teacher_logits[..., :10])
    with pytest.raises(ValueError, match="different tokens"):
        kl_divergence(student_logits, teacher_logits[:, :4])
    with pytest.raises(ValueError, match="temperature is positive, got 0"):
        kl_divergence(student_logits, teacher_logits, temperature=0)
    # a map makes models of different depth comparable
    assert squarehead(student, teacher[:3], layers=[(1, 1), (3, 2)]).item() > 0
