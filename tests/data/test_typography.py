import numpy as np
import pytest

from diptych.data.typography import HEIGHT, SMALLEST, WIDTH, arrange, drawable, overlay
from diptych.errors import TextError


def grey(height: int = 96, width: int = 128) -> np.ndarray:
    return np.full((height, width, 3), 90, dtype=np.uint8)


def box(found: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of what is no longer grey."""
    changed = (found != 90).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


@pytest.mark.parametrize(
    "words", ["dog", "a large grey elephant in the grass of the savannah", "one " * 200, "x" * 500]
)
@pytest.mark.parametrize("side", [32, 64, 224])
def test_words_and_empty_box_cover_the_same_part_of_the_picture(words, side):
    picture = grey(side, side)
    before = picture.copy()
    empty = overlay(picture, words, np.random.default_rng(1), written=False)
    found = overlay(picture, words, np.random.default_rng(1))
    assert np.array_equal(picture, before)
    top, bottom, left, right = box(empty)
    assert (empty[top:bottom, left:right] == 255).all()
    assert bottom - top <= max(HEIGHT * side, 2 * SMALLEST) and right - left <= side
    changed = (found != empty).any(-1)
    assert changed[top:bottom, left:right].any()  # there are letters, and they are in the box
    assert changed.sum() == changed[top:bottom, left:right].sum()
    assert found[changed].min() < 128


def test_place_follows_from_the_generator():
    places = {box(overlay(grey(), "dog", np.random.default_rng(seed), written=False)) for seed in range(20)}
    assert len(places) > 15
    assert all(0 <= top < bottom <= 96 and 0 <= left < right <= 128 for top, bottom, left, right in places)


def test_letters_are_as_large_as_they_can_be():
    layout = arrange("dog", 224, 224)
    assert layout.lines == ("dog",) and layout.font_size > 40
    longer = arrange("a dog and a cat on a mat", 224, 224)
    assert len(longer.lines) > 1 and " ".join(longer.lines) == "a dog and a cat on a mat"
    assert layout.font_size > longer.font_size > SMALLEST
    assert longer.width <= 224 and longer.height <= HEIGHT * 224


def test_what_does_not_fit_is_cut_off_at_its_end():
    layout = arrange("abcdefghij" * 30, 64, 64)
    assert layout.font_size == SMALLEST and len(layout.lines) == 1
    assert ("abcdefghij" * 30).startswith(layout.lines[0]) and 5 < len(layout.lines[0]) < 40
    assert layout.width <= WIDTH * 64 + SMALLEST


def test_letters_that_the_font_lacks_are_known():
    assert drawable("café Łódź") and not drawable("猫") and not drawable("Кот")


def test_nothing_to_write_is_refused():
    with pytest.raises(TextError, match="has none"):
        overlay(grey(), " \n", np.random.default_rng(0))
