"""argmax, top_k, sample and score: the same tokens from every backend, and from a definition written down here."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relevo.kernels import Kernels, load_backend, reference
from relevo.kernels.sampling import draw
from tests.support.triton_interpreter import takes_long

# around whole blocks of 64 logits, and one of thousands of blocks
VOCABS = [1, 2, 63, 64, 65, 130, 4099, 20_001]
KINDS = ["distinct", "tied", "masked", "signed zeros", "nan", "equal"]


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_backend(request.param, "cpu")


def make_logits(kind: str, rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocab) * spread
    if kind in ("tied", "masked"):
        logits = logits.round()
    if kind == "masked":
        logits[torch.rand(rows, vocab) < 0.7] = -math.inf
        logits[0] = -math.inf
    if kind == "signed zeros":
        logits = torch.where(torch.rand(rows, vocab) < 0.5, -0.0, 0.0)
    if kind == "nan":
        logits[torch.rand(rows, vocab) < 0.02] = math.nan
        logits[torch.rand(rows, vocab) < 0.02] = -math.nan
        logits[torch.rand(rows, vocab) < 0.02] = math.inf
    return torch.full_like(logits, 1.5) if kind == "equal" else logits


def descending(row: list[float]) -> list[int]:
    """Ids from the largest on: NaN before all numbers, of equals the lowest id first."""
    return sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_the_largest_come_first_and_of_equals_the_lowest_id(kernels: Kernels, vocab: int, kind: str) -> None:
    logits = make_logits(kind, 2 if takes_long(kernels) else 5, vocab)
    expected = [descending(row) for row in logits.tolist()]
    assert kernels.argmax(logits).tolist() == [ids[0] for ids in expected]
    for k in {1, min(vocab, 7), min(vocab, 50), min(vocab, 1000)}:
        values, ids = kernels.top_k(logits, k)
        assert ids.tolist() == [row[:k] for row in expected]
        assert values.is_contiguous() and values.view(torch.int32).equal(logits.gather(1, ids).view(torch.int32))


def test_all_of_a_vocabulary(kernels: Kernels) -> None:
    logits = make_logits("tied", 2, 4099)
    assert kernels.top_k(logits, 4099)[1].tolist() == [descending(row) for row in logits.tolist()]


def test_rows_may_be_strided(kernels: Kernels) -> None:
    logits = make_logits("distinct", 6, 300)[::2, 7:290]
    assert kernels.argmax(logits).equal(logits.contiguous().argmax(-1))
    assert kernels.top_k(logits, 3)[1].equal(logits.topk(3).indices)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_samples_are_those_of_the_definition(vocab: int, spread: float) -> None:
    """Of the compiled backend; the reference is the definition.

    Probabilities may differ in their last bits, which moves the borders between tokens: by under 1e-5 in total, so
    that of these 448 draws none is near one but in a choice of seeds in 200.
    """
    kernels = load_backend("cpu", "cpu")
    torch.set_num_threads(2)
    rows, generator = 7, torch.Generator().manual_seed(vocab)
    temperature = [0.3, 1.0, 2.0, 1.0, 0.7, 1.0, 5.0]
    for kind in ("distinct", "tied"):
        logits = make_logits(kind, rows, vocab, seed=vocab, spread=spread)
        for case in range(8):
            min_p = [0.05 if case & 1 else 0.0] * rows
            top_k = [0 if case & 2 == 0 else k for k in (1, 2, 5, 50, 1000, 3, 10**6)]
            top_p = [1.0 if case & 4 == 0 else p for p in (0.1, 0.3, 0.5, 0.9, 0.99, 0.999, 1e-9)]
            uniforms: list[float] = torch.rand(rows, generator=generator, dtype=torch.float64).tolist()
            expected = reference.sample(logits, temperature, min_p, top_k, top_p, uniforms)
            assert kernels.sample(logits, temperature, min_p, top_k, top_p, uniforms).equal(expected), (kind, case)


@pytest.mark.parametrize(("vocab", "listed"), [(1, 16384), (65, 16384), (4099, 16384), (65, 4), (1500, 4)])
def test_samples_of_triton_are_those_of_the_definition(
    vocab: int, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with the list of tokens that may stay long enough, and too short."""
    monkeypatch.setattr("relevo.kernels.triton.draw.LISTED", listed)
    kernels, generator = load_backend("triton", "cpu"), torch.Generator().manual_seed(vocab)
    logits = make_logits("tied", 4, vocab, seed=vocab)
    for case in (0, 1, 2, 4, 7):
        min_p = [0.05 if case & 1 else 0.0] * 4
        top_k = [0 if case & 2 == 0 else k for k in (2, 50, 0, 10**6)]
        top_p = [1.0 if case & 4 == 0 else p for p in (0.3, 0.9, 0.999, 1e-9)]
        uniforms: list[float] = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        rest = ([0.3, 1.0, 2.0, 5.0], min_p, top_k, top_p, uniforms)
        assert kernels.sample(logits, *rest).equal(reference.sample(logits, *rest)), case


def test_a_row_of_triton_gets_the_same_in_any_batch() -> None:
    kernels = load_backend("triton", "cpu")
    logits = make_logits("distinct", 3, 5000)
    rest = ([1.0, 0.5, 2.0], [0.0, 0.0, 0.01], [0, 40, 0], [0.9, 1.0, 1.0], [0.1, 0.5, 0.9])
    ids = kernels.sample(logits, *rest)
    for i in range(3):
        temperature, min_p, top_k, top_p, uniforms = rest
        own = ([temperature[i]], [min_p[i]], [top_k[i]], [top_p[i]], [uniforms[i]])
        assert kernels.sample(logits[i : i + 1], *own).equal(ids[i : i + 1])


EXACT = {
    "levels": st.lists(st.integers(0, 4), min_size=2, max_size=300),
    "percent": st.integers(1, 100),
    "top_k": st.integers(0, 310),
    "uniform": st.floats(0.0, 1.0, exclude_max=True),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=100, deadline=None)
@given(**EXACT)
def test_samples_of_exact_probabilities(
    backend: str, levels: list[int], percent: int, top_k: int, uniform: float
) -> None:
    check_exact(load_backend(backend, "cpu"), levels, percent, top_k, uniform)


@settings(max_examples=25, deadline=None)
@given(**EXACT)
def test_samples_of_exact_probabilities_with_triton(
    levels: list[int], percent: int, top_k: int, uniform: float
) -> None:
    check_exact(load_backend("triton", "cpu"), levels, percent, top_k, uniform)


def check_exact(kernels: Kernels, levels: list[int], percent: int, top_k: int, uniform: float) -> None:
    """Powers of two, most of them tied, counted in whole numbers here."""
    mass = [2**level for level in levels]
    kept = [m if top_k == 0 or m >= sorted(mass)[-min(top_k, len(mass))] else 0 for m in mass]
    nucleus: set[int] = set()
    for token_id in sorted((i for i, m in enumerate(kept) if m), key=lambda i: (-kept[i], i)):
        if percent < 100 and sum(kept[i] for i in nucleus) * 100 >= percent * sum(kept):
            break
        nucleus.add(token_id)
    weights = torch.tensor([[float(kept[i]) if i in nucleus else 0.0 for i in range(len(mass))]], dtype=torch.float64)
    expected = int(draw(weights, [uniform]))
    logits = (torch.tensor(mass).log2() * math.log(2.0))[None]
    top_p = 1.0 if percent == 100 else percent / 100 - 1e-6
    assert int(kernels.sample(logits, [1.0], [0.0], [top_k], [top_p], [uniform])) == expected


def test_samples_at_the_ends_are_never_excluded_tokens(kernels: Kernels) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(2, 1)
    ids = kernels.sample(logits, [1.0] * 2, [0.0] * 2, [0] * 2, [1.0] * 2, [0.0, 1.0 - 2.0**-53])
    assert set(ids.tolist()) <= {1, 3}


@pytest.mark.parametrize("vocab", VOCABS)
def test_scores(kernels: Kernels, vocab: int) -> None:
    """float32: 5e-7 of the value, and 2e-6."""
    logits = make_logits("tied", 6, vocab)
    token_ids = torch.randint(0, vocab, (6, 4))
    logprobs, likelier = kernels.score(logits, token_ids)
    expected = logits.double().log_softmax(-1).gather(1, token_ids)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=4e-6)
    assert likelier.tolist() == [int((row > row[ids[0]]).sum()) for row, ids in zip(logits, token_ids, strict=True)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_gets_the_same_in_any_batch(threads: int) -> None:
    """Bit for bit, of the compiled backend."""
    torch.set_num_threads(threads)
    kernels = load_backend("cpu", "cpu")
    logits, token_ids = make_logits("distinct", 9, 5000), torch.randint(0, 5000, (9, 3))
    uniforms = [i / 9 for i in range(9)]
    ids = kernels.sample(logits, [1.0] * 9, [0.0] * 9, [0] * 9, [0.9] * 9, uniforms)
    logprobs, _ = kernels.score(logits, token_ids)
    for i in range(9):
        row = logits[i : i + 1]
        assert kernels.sample(row, [1.0], [0.0], [0], [0.9], uniforms[i : i + 1]).equal(ids[i : i + 1])
        assert kernels.score(row, token_ids[i : i + 1])[0].equal(logprobs[i : i + 1])


def test_two_python_threads_may_choose_at_once() -> None:
    torch.set_num_threads(2)
    kernels = load_backend("cpu", "cpu")
    inputs = [make_logits("distinct", 8, vocab) for vocab in (300, 9000, 500, 30_000)]
    settings = ([1.0] * 8, [0.0] * 8, [40] * 8, [0.9] * 8, [i / 8 for i in range(8)])
    alone = [(kernels.top_k(x, 20)[1], kernels.sample(x, *settings)) for x in inputs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(20):
            if not kernels.top_k(inputs[i], 20)[1].equal(alone[i][0]):
                wrong.append(i)
            if not kernels.sample(inputs[i], *settings).equal(alone[i][1]):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
