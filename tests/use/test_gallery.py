import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diptych.data.sources import Listed
from diptych.models.embedding import Embedded
from diptych.types import Sample, Text
from diptych.use.gallery import Candidate, Card, render, retrieval_cards

RED = Image.new("RGB", (8, 8), "red")


def png(shade: int) -> bytes:
    Image.new("L", (4, 4), shade).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def embedded(images: torch.Tensor, texts: torch.Tensor, captions: list[str], owner: list[int]) -> Embedded:
    count = len(images)
    names = tuple(f"k{i}" for i in range(count))
    nobody = (None,) * count
    return Embedded(tuple(range(count)), names, names, images, tuple(captions), tuple(owner), texts, nobody, nobody, ())


def source(count: int) -> Listed:
    return Listed([Sample(f"k{i}", png(10 * i), (Text(f"t{i}"),), f"k{i}") for i in range(count)])


def test_a_hit_is_named_green_and_a_miss_is_not():
    hit = render([Card("q", RED, (Candidate(0.9, "yes", right=True), Candidate(0.1, "no", right=False)))])
    assert hit.count("HIT") == 1 and "MISS" not in hit
    assert '<li class="right"><span dir="auto">yes</span> <span class="score">0.90</span></li>' in hit
    assert '<li class=""><span dir="auto">no</span> <span class="score">0.10</span></li>' in hit
    miss = render([Card("q", None, (Candidate(0.9, "no", right=False), Candidate(0.1, "yes", right=True)))])
    assert miss.count("MISS") == 1 and "HIT" not in miss


def test_a_card_may_say_itself_whether_it_is_a_hit():
    unlinked = (Candidate(0.2, "another", right=False),)
    assert "HIT" in render([Card("q", None, unlinked, right=True)])
    assert "MISS" in render([Card("q", None, (Candidate(0.9, "it", right=True),), right=False)])


def test_pictures_like_lines_are_shown_wide():
    line, square = Image.new("RGB", (200, 20)), Image.new("RGB", (20, 20))
    html = render([Card("q", line, (Candidate(0.5, "x", line),)), Card("q", square, (Candidate(0.5, "x", square),))])
    assert html.count('class="query wide"') == html.count('class="strip wide"') == 1
    assert html.count('class="query"') == html.count('class="strip"') == 1


def test_nobody_knows_so_nothing_is_claimed():
    html = render([Card("a cat", None, (Candidate(0.5, "x", RED), Candidate(0.4, "y", None)))])
    assert "HIT" not in html and "MISS" not in html and "right" not in html
    assert html.count("<figure") == 2 and html.count("<img") == 1
    assert render([Card("q", None, ())]).count("<li") == 0


def test_text_of_users_is_escaped_everywhere():
    evil = '<script>alert(1)</script>" onload="x'
    html = render(
        [
            Card(evil, RED, (Candidate(0.5, evil, right=True),)),
            Card(evil, None, (Candidate(0.5, evil, RED, right=False),)),
        ]
    )
    assert "<script" not in html and '" onload' not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot; onload=&quot;x") == 6


def test_every_text_has_its_own_reading_direction():
    html = render([Card("חתול", None, (Candidate(0.5, "قطة", RED), Candidate(0.4, "cat", RED)))])
    for text in ("חתול", "قطة", "cat"):
        assert f'<span dir="auto">{text}</span>' in html


def test_cards_show_the_best_five_with_their_own_pictures():
    images = torch.eye(7)
    texts = torch.eye(7)[[1, 0, 2, 3, 4, 5, 6]]  # texts of images 0 and 1 are exchanged
    found = embedded(images, texts, [f"t{i}" for i in range(7)], list(range(7)))
    forward, backward = retrieval_cards(found, source(7), count=4)
    assert len(forward) == len(backward) == 4
    for card in forward:
        i = int(card.text.removeprefix("t"))
        assert card.image.getpixel((0, 0)) == (10 * i,) * 3
        assert len(card.candidates) == 5 and card.candidates[0].score == 1
        assert card.candidates[0].text == f"t{ {0: 1, 1: 0}.get(i, i) }"
        assert card.candidates[0].right == (i > 1)
        assert all(c.right == (c.text == card.text) and c.image is None for c in card.candidates)
    for card in backward:
        best = card.candidates[0]
        assert card.image is None and best.right == (best.text == card.text)
        assert best.image.getpixel((0, 0)) == (10 * int(best.text.removeprefix("t")),) * 3


def hits(cards: list[Card]) -> list[bool]:
    return [bool(card.candidates[0].right) for card in cards]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [(10, [True] * 3 + [False] * 3), (2, [True] * 4 + [False] * 2), (18, [True] * 2 + [False] * 4), (0, [True] * 6)],
)
def test_half_of_the_cards_are_hits_as_far_as_there_are_any(wrong, expected):
    order = [*range(1, wrong), 0, *range(wrong, 20)] if wrong else list(range(20))  # the first `wrong` are exchanged
    found = embedded(torch.eye(20), torch.eye(20)[order], [f"t{i}" for i in range(20)], list(range(20)))
    forward, backward = retrieval_cards(found, source(20))
    assert hits(forward) == hits(backward) == expected
    assert len({card.text for card in forward}) == 6
    again, _ = retrieval_cards(found, source(20))
    other, _ = retrieval_cards(found, source(20), seed=3)
    assert [card.text for card in again] == [card.text for card in forward] != [card.text for card in other]


def test_what_counts_as_right_in_the_numbers_counts_here():
    found = embedded(torch.eye(3), torch.eye(3)[[1, 0, 2]], ["A  dog", "a dog", "a cat"], [0, 1, 2])
    forward, backward = retrieval_cards(found, source(3))
    assert hits(forward) == hits(backward) == [True] * 3
    grouped = replace(found, captions=("one", "two", "a cat"), groups=("g", "g", "k2"))
    forward, backward = retrieval_cards(grouped, source(3))
    assert hits(forward) == hits(backward) == [True] * 3
    forward, backward = retrieval_cards(replace(found, captions=("one", "two", "a cat")), source(3))
    assert hits(forward) == hits(backward) == [True, False, False]


def test_images_without_a_text_and_unreadable_ones_do_not_shift_the_pictures():
    found = embedded(torch.eye(3), torch.eye(3)[[0, 2]], ["t1", "t3"], [0, 2])
    found = replace(found, rows=(1, 2, 3), keys=("k1", "k2", "k3"), groups=("k1", "k2", "k3"))
    samples = source(4).samples
    samples[0] = replace(samples[0], image=b"broken")
    forward, backward = retrieval_cards(found, Listed(samples))
    assert {card.text: card.image.getpixel((0, 0))[0] for card in forward} == {"t1": 10, "t3": 30}
    assert {card.text: card.candidates[0].image.getpixel((0, 0))[0] for card in backward} == {"t1": 10, "t3": 30}
    assert {c.text for card in backward for c in card.candidates} == {"t1", "k2", "t3"}  # a key stands in for a text
