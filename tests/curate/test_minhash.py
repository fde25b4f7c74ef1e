import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.curate.minhash import (
    ORDERS,
    bands,
    estimated_jaccard,
    folded_words,
    rows_per_band,
    signatures,
)
from diptych.errors import ConfigError


def jaccard(one: str, other: str, size: int = 5) -> float:
    """Return the index by sets of pieces."""
    folded = [" ".join(folded_words(text)) or text for text in (one, other)]
    first, second = ({text[i : i + size] for i in range(max(1, len(text) - size + 1))} for text in folded)
    return len(first & second) / len(first | second)


def words(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(count)]


def test_folding():
    assert folded_words("A  Dog's ｌｉｆｅ, №1!") == ["a", "dog", "s", "life", "no1"]
    assert folded_words("狗 在 海滩。") == ["狗", "在", "海滩"]
    assert folded_words("!?") == []


def test_estimates_are_unbiased_and_as_close_as_the_formula_says():
    rng = np.random.default_rng(0)
    ones, others = [], []
    for _ in range(2000):
        shared = words(rng, int(rng.integers(0, 12)))
        ones.append(" ".join([*shared, *words(rng, 3)]))
        others.append(" ".join([*shared, *words(rng, int(rng.integers(1, 5)))]))
    true = np.array([jaccard(*pair) for pair in zip(ones, others, strict=True)])
    off = estimated_jaccard(signatures(ones), signatures(others)) - true
    assert abs(off.mean()) < 0.003  # standard error 0.001
    between = (true > 0.2) & (true < 0.8)
    scaled = off[between] / np.sqrt(true[between] * (1 - true[between]) / ORDERS)
    assert between.sum() > 500 and 0.9 < scaled.std() < 1.1


def test_texts_that_share_nothing_agree_in_one_byte_of_256():
    rng = np.random.default_rng(1)
    signed = signatures([" ".join(words(rng, 8)) for _ in range(2000)])
    equal = (signed[:1000] == signed[1000:]).mean()
    assert 0.003 < equal < 0.012  # 1 / 256 = 0.0039, and some pieces of five are shared
    assert abs(estimated_jaccard(signed[:1000], signed[1000:]).mean()) < 0.008


@given(st.lists(st.text(max_size=30), max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_text_has_one_signature_wherever_it_stands(texts):
    together = signatures(texts)
    assert together.shape == (len(texts), ORDERS)
    alone = [signatures([text])[0] for text in texts]
    assert all((one == other).all() for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A dog.", "a  DOG", True),
        ("cat", "cat!", True),
        ("cat", "car", False),
        ("", "", True),
        ("", "a", False),
        ("!!", "??", False),
        ("狗在海滩上", "狗在海滩上。", True),
        ("ab\0\0\0", "ab", True),
        ("\ud800", "\udfff", False),
    ],
)
def test_short_and_odd_texts(one, other, same):
    first, second = signatures([one, other])
    assert (first == second).all() == same


def test_pieces_end_where_the_text_does():
    signed = signatures(["abcdefgh", "ijklmnop", "abcdefgh"])
    assert (signed[0] == signed[2]).all() and (signed[0] != signed[1]).any()


@pytest.mark.parametrize(("jaccard_", "rows"), [(1.0, 8), (0.8, 6), (0.7, 4), (0.5, 3), (0.1, 1)])
def test_bands_miss_one_in_a_hundred_at_most(jaccard_, rows):
    assert rows_per_band(jaccard_) == rows
    assert (1 - jaccard_**rows) ** (ORDERS // rows) <= 0.01


def test_an_index_too_small():
    with pytest.raises(ConfigError, match=r"take 0\.1 or more"):
        rows_per_band(0.02)


def test_bands_are_the_bytes():
    signed = np.arange(2 * ORDERS, dtype=np.uint8).reshape(2, ORDERS)
    found = bands(signed, 6)
    assert found.shape == (2, 21)
    assert found[0, 1] == sum(int(byte) << (8 * place) for place, byte in enumerate(range(6, 12)))
