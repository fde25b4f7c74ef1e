import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers

from diptych.data.text_changes import STOP_WORDS, stop_words
from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.words import (
    Placed,
    UniversalWord,
    placed_words,
    random_word,
    whole_words,
    with_word,
    word_spans,
)
from diptych.errors import ConfigError


def word_piece(words: str, *, length: int = 16, begin: int | None = 1) -> Tokenizer:
    """Return a tokenizer of the BERT family over a few words."""
    vocabulary = {token: row for row, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words.split()])}
    engine = Engine(models.WordPiece(vocabulary, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens(["[UNK]"])
    return Tokenizer(engine, TextPolicy(length=length, begin=begin, end=2, pad=0))


def said(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


def test_words_are_what_spaces_separate_without_punctuation():
    text = 'A  dog\'s "tail", (black-and-white) ... über 2 katzen!'
    assert said(text, word_spans(text)) == ["A", "dog's", "tail", "black-and-white", "über", "2", "katzen"]
    assert said(text, word_spans(text, spared=frozenset({"a", "2"}))) == [*said(text, word_spans(text))[1:5], "katzen"]
    assert word_spans("?! 🙂") == []


def test_a_word_is_replaced_where_it_stands():
    text = "Dogs, (dogs) and dogs!"
    spans = word_spans(text)
    assert [with_word(text, span, "cats") for span in spans[:2]] == ["cats, (dogs) and dogs!", "Dogs, (cats) and dogs!"]
    assert with_word(text, spans[-1], "cats") == "Dogs, (dogs) and cats!"


def test_every_word_knows_its_tokens():
    tokenizer = word_piece("a dog ##gy house ##s .")
    assert placed_words(tokenizer, " A  doggy houses. ") == [
        Placed((0, 1), (1,)),
        Placed((2, 7), (2, 3)),
        Placed((8, 14), (4, 5)),
    ]
    without = placed_words(word_piece("a dog ##gy house ##s .", begin=None), "a doggy")
    assert [word.tokens for word in without] == [(0,), (1, 2)]


def test_words_behind_the_longest_length_are_not_read_and_a_cut_one_is_as_far_as_it_goes():
    tokenizer = word_piece("a dog ##gy house ##s .", length=5)  # three tokens of content
    assert [word.tokens for word in placed_words(tokenizer, "doggy houses a")] == [(1, 2), (3,)]


def test_a_text_without_words_is_one():
    assert placed_words(word_piece("a !"), "!!!") == [Placed((0, 3), (1, 2, 3))]


def test_byte_level_tokens_belong_to_words_too():
    tokenizer = Tokenizer.train(["a red circle", "a blue square"] * 4, vocabulary=300)
    text = "a red zebra, über"
    (ids,) = tokenizer.sequences([text])
    words = placed_words(tokenizer, text)
    assert [text[slice(*word.span)] for word in words] == ["a", "red", "zebra", "über"]
    comma = ids.index(tokenizer.engine.token_to_id(","))
    covered = [place for word in words for place in word.tokens]
    assert covered == [place for place in range(1, len(ids) - 1) if place != comma]


def test_whole_words_stand_for_themselves():
    tokenizer = word_piece("a dog ##gy Dog it . 12 é house")  # "Dog" is never what the lower-casing tokenizer gives
    assert whole_words(tokenizer, spared=stop_words("en")) == {5: "dog", 12: "house"}
    assert set(whole_words(tokenizer).values()) == {"dog", "it", "house"}
    with pytest.raises(ConfigError, match="None of the tokens"):
        whole_words(word_piece("a b ##cd"))


def test_a_byte_level_token_is_a_word_only_at_the_beginning_of_one():
    """Of "Ġred" and "ed" the second only goes on."""
    tokenizer = Tokenizer.train(["a red circle", "a blue square", "redred bed"] * 4, vocabulary=300)
    words = whole_words(tokenizer)
    assert {"red", "circle", "blue", "square"} <= set(words.values())
    for number, word in words.items():
        assert tokenizer.sequences([word]) == [[2, number, 1]]
        assert tokenizer.engine.id_to_token(number).startswith("Ġ")


def test_the_words_of_clip_end_with_its_mark():
    pytest.importorskip("open_clip")
    import open_clip

    from diptych.models.openclip import clip_tokenizer

    tokenizer = clip_tokenizer(open_clip)
    words = whole_words(tokenizer)
    assert len(words) > 20_000
    assert {"dog", "photograph"} <= set(words.values())
    assert all(
        tokenizer.engine.id_to_token(number) == f"{word}</w>" for number, word in words.items() if word.isascii()
    )


def test_a_random_word_follows_from_its_seed_and_is_another_one():
    tokenizer, word = word_piece("a dog cat bus the house"), UniversalWord("dog")
    found = {random_word(tokenizer, word, seed=seed).word for seed in range(30)}
    assert found == {"cat", "bus", "house"}
    assert random_word(tokenizer, word, seed=3) == random_word(tokenizer, word, seed=3)


def test_what_is_no_word_is_refused():
    for wrong in ("", "two words", "dog!", "##gy"):
        with pytest.raises(ConfigError, match="A word has letters"):
            UniversalWord(wrong)
    with pytest.raises(ConfigError, match=f"'xx', only for {', '.join(STOP_WORDS)}"):
        UniversalWord("dog", "xx")
