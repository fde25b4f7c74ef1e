import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data.tokenizer import TextPolicy, Tokenizer, hash_strings
from diptych.errors import TextError

TEXTS = ["a red cat sits on the mat", "two dogs and a tree by the sea", "the sea at night"]
PAD, END, BEGIN = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocabulary=300, length=12)


def with_policy(tokenizer: Tokenizer, **values) -> Tokenizer:
    return Tokenizer(tokenizer.engine, TextPolicy(**values))


def decoded(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    return tokenizer.engine.decode(ids.tolist()).strip()


def test_the_vocabulary_is_of_the_size_asked_for_where_the_texts_allow_it(tokenizer):
    assert Tokenizer.train(TEXTS, vocabulary=280).size == 280
    assert 280 < tokenizer.size < 300  # three short sentences have no more pairs to join
    assert Tokenizer.train(["a"], vocabulary=259).size == 259  # three special ids and 256 bytes
    assert [tokenizer.engine.token_to_id(name) for name in ("<pad>", "<end>", "<begin>")] == [PAD, END, BEGIN]


def test_ids_are_begun_ended_and_padded(tokenizer):
    found = tokenizer(["cat", "a red cat"])
    assert found.ids[:, 0].tolist() == [BEGIN, BEGIN]
    lengths = found.mask.sum(1)
    assert lengths.tolist() == tokenizer.lengths(["cat", "a red cat"])
    assert found.ids.shape == (2, lengths.max())
    for row, length in enumerate(lengths.tolist()):
        assert found.mask[row].tolist() == [True] * length + [False] * (found.ids.shape[1] - length)
        assert found.ids[row, length - 1] == END and (found.ids[row, length:] == PAD).all()
        assert not set(found.ids[row, 1 : length - 1].tolist()) & {PAD, END, BEGIN}
    assert decoded(tokenizer, found.ids[1]) == "a red cat"


def test_json_round_trip(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json(), tokenizer.policy)
    assert again.to_json() == tokenizer.to_json() and again.size == tokenizer.size
    texts = [*TEXTS, "Ünïcode, 猫 and 🐈"]
    one, other = tokenizer(texts), again(texts)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.mask, other.mask) and torch.equal(one.key, other.key)


def test_a_tokenizer_file_that_pads_and_cuts_by_itself_is_told_not_to(tokenizer):
    engine = type(tokenizer.engine).from_str(tokenizer.to_json())
    engine.enable_truncation(3)
    engine.enable_padding(length=40, pad_id=7)
    found = Tokenizer.from_json(engine.to_str(), tokenizer.policy)
    assert torch.equal(found(TEXTS).ids, tokenizer(TEXTS).ids)
    assert found.lengths(TEXTS) == tokenizer.lengths(TEXTS)


def test_long_texts_are_cut_and_keep_their_end(tokenizer):
    long = " ".join(TEXTS)
    needed = tokenizer.lengths([long])[0]
    whole = with_policy(tokenizer, length=needed)([long])
    assert needed > 12 and whole.ids.shape == (1, needed)
    cut = tokenizer([long])
    assert cut.ids.shape == (1, 12) and cut.mask.all()
    assert cut.ids[0].tolist() == [*whole.ids[0, :11].tolist(), END]
    shorter = with_policy(tokenizer, length=needed - 1)([long]).ids[0]
    assert shorter.tolist() == [*whole.ids[0, : needed - 2].tolist(), END]
    assert with_policy(tokenizer, length=2)([long]).ids.tolist() == [[BEGIN, END]]


@pytest.mark.parametrize(("begin", "end"), [(None, 1), (2, None), (None, None)])
def test_lengths_count_only_the_special_tokens_there_are(tokenizer, begin, end):
    plain = len(tokenizer.engine.encode("cat", add_special_tokens=False).ids)
    found = with_policy(tokenizer, begin=begin, end=end, length=12)
    expected = plain + (begin is not None) + (end is not None)
    assert found.lengths(["cat"]) == [expected]
    ids = found(["cat"]).ids[0].tolist()
    assert len(ids) == expected and (ids[0] == BEGIN) == (begin == 2) and (ids[-1] == END) == (end == 1)
    assert found([" ".join(TEXTS)]).ids.shape == (1, 12)


def test_offsets_say_which_characters_an_id_stands_for(tokenizer):
    text = "  A  dog on the beach "
    cleaned, (ids,), offsets = tokenizer.clean(text), tokenizer.sequences([text]), tokenizer.offsets(text)
    assert len(offsets) == len(ids) and offsets[0] == offsets[-1] == (0, 0)
    for number, (start, end) in zip(ids[1:-1], offsets[1:-1], strict=True):
        assert tokenizer.engine.decode([number]).strip() == cleaned[start:end].strip().lower()
    short = with_policy(tokenizer, length=4, end=None)
    assert len(short.offsets(text)) == len(short.sequences([text])[0]) == 4
    assert short.offsets(text) == offsets[:4]


def test_padding_to_the_longest_or_to_the_full_length(tokenizer):
    longest = tokenizer(["cat"])
    full = with_policy(tokenizer, length=12, pad=5, pad_to="length")(["cat"])
    count = longest.ids.shape[1]
    assert count == tokenizer.lengths(["cat"])[0] < 12
    assert full.ids.tolist() == [longest.ids[0].tolist() + [5] * (12 - count)]
    assert full.mask.sum() == count


@pytest.mark.parametrize(
    ("policy", "text", "expected"),
    [
        ("whitespace", "  Two\tRed\n\n cats\u00a0! ", "Two Red cats !"),
        ("whitespace", "It&#39;s", "It&#39;s"),
        ("lower", " It’s  A &amp;amp; “B” ", 'it\'s a & "b"'),
        ("lower", "ÉCOLE, no_1!", "école, no_1!"),
        ("canonicalize", "Hello, World_of  (cats)!", "hello world of cats"),
        ("canonicalize", "it's 50% off", "its 50 off"),
    ],
)
def test_clean(tokenizer, policy, text, expected):
    assert with_policy(tokenizer, clean=policy).clean(text) == expected


def test_keys_are_those_of_the_cleaned_text(tokenizer):
    key = tokenizer(["a  cat ", "a cat", "A cat", "a dog"]).key
    assert key[0] == key[1] and len(set(key.tolist())) == 3
    key = with_policy(tokenizer, clean="canonicalize")(["A cat!", "a cat", "a dog"]).key
    assert key[0] == key[1] and key[1] != key[2]


def test_texts_that_differ_only_behind_the_cut_are_different(tokenizer):
    long = " ".join(TEXTS)
    found = tokenizer([f"{long} one", f"{long} two"])
    assert torch.equal(found.ids[0], found.ids[1]) and found.key[0] != found.key[1]


def test_hashes_are_the_same_in_every_process():
    # printf 'a cat' | b2sum -l 64, read from the low end
    digests = ["e4a6a0577479b2b4", "67f5dfb40b23dda2", "3825438160567439"]
    expected = [int.from_bytes(bytes.fromhex(digest), "little", signed=True) for digest in digests]
    assert hash_strings(["", "a cat", "猫"]).tolist() == expected
    assert hash_strings([]).shape == (0,)


SCRIPTS = ["🐈‍⬛ 👩🏽‍🚀", "חתול אדום", "قطة حمراء", "一只红色的猫", "แมวสีแดง", "красный кот", "x\0y", "\u200b", "𓃠"]


@pytest.mark.parametrize("text", SCRIPTS)
def test_any_script_comes_back_whole(tokenizer, text):
    wide = with_policy(tokenizer, length=200)
    ids = wide([text]).ids[0]
    assert len(ids) == wide.lengths([text])[0] > 2
    assert decoded(tokenizer, ids) == text.strip()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_text_is_refused_as_empty_or_fits(text):
    tokenizer = TRAINED
    if not text.strip():
        with pytest.raises(TextError):
            tokenizer([text])
        return
    found = tokenizer([text])
    needed = tokenizer.lengths([text])[0]
    assert found.ids.shape == (1, min(needed, 12)) and found.mask.all()
    assert found.ids[0, 0] == BEGIN and found.ids[0, -1] == END and found.ids.max() < tokenizer.size


TRAINED = Tokenizer.train(TEXTS, vocabulary=300, length=12)


@pytest.mark.parametrize(
    ("policy", "text"), [("whitespace", ""), ("whitespace", " \t\n"), ("lower", "&nbsp;"), ("canonicalize", "?!_")]
)
def test_a_text_without_content_is_named(tokenizer, policy, text):
    strict = with_policy(tokenizer, clean=policy)
    for call in (strict, strict.lengths):
        with pytest.raises(TextError, match="Text 1 of 3 is empty"):
            call(["cat", text, "dog"])


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(TextError, match="surrogate"):
        tokenizer(["a cat \ud83d"])
