from dataclasses import replace

import pytest
import torch

from diptych.data.sources import Listed
from diptych.data.words import UniversalWord, with_word
from diptych.evaluation.attack import evaluate_changed, hits_of, measure_attack, measure_words, reword
from diptych.models.perturbation import UniversalPerturbation, sign_noise
from diptych.use.attacks import StruckCaption, render_attack, strike, strike_captions, to_picture


@pytest.fixture
def labelled(drawings) -> Listed:
    return Listed([replace(s, texts=(), label=("a_dot", "square")[n % 2]) for n, s in enumerate(drawings(10))], "two")


def test_a_picture_has_the_levels_of_its_pixels():
    levels = torch.arange(48, dtype=torch.uint8).view(3, 4, 4) * 5
    picture = to_picture(levels / 255)
    assert picture.size == (4, 4) and picture.getpixel((1, 2)) == tuple(levels[:, 2, 1].tolist())


def test_cards_show_what_was_understood_before(make_model, drawings, labelled):
    model = make_model()
    for source in (drawings(10), labelled):
        noise = sign_noise(16, 12, seed=4)
        report = measure_attack(model, source, noise, precision="fp32")
        understood = report.clean.retrieval or report.clean.zeroshot
        hits = understood.image_to_text.hits(1) if report.clean.retrieval else understood.correct
        struck = strike(model, source, report, noise, count=6)
        assert len(struck) == min(6, int(hits.sum()))
        for one in struck:
            assert hits[report.clean.embedded.keys.index(one.name)] == 1
            assert one.clean.size == one.attacked.size == one.change.size == (16, 16)
            assert (one.before != one.after) or not one.fooled


def test_the_change_is_shown_around_grey(make_model, drawings):
    model, source = make_model(), drawings(6)
    down = UniversalPerturbation(torch.full((3, 16, 16), -12 / 255), 12)
    report = measure_attack(model, source, down, precision="fp32")
    shown = strike(model, source, report, down, count=6)
    assert shown or not report.names()
    for one in shown:
        assert one.change.getpixel((0, 0)) == (
            32,
            32,
            32,
        )  # white becomes darker by all of eps: 127.5 - 96, rounded to even


def test_captions_are_shown_with_the_word_in_place(make_model, drawings):
    model, source = make_model(texts=["a red circle", "the blue square"] * 4), drawings(10)
    report = measure_attack(model, source, sign_noise(16, 12), precision="fp32")
    rewording = reword(model, report.clean.embedded.captions, UniversalWord("blue"))
    by_word = measure_words(model, report, rewording)["word"]
    was, still = (hits_of(part)["text_to_image/recall@1"].right for part in (by_word.clean, by_word.attacked))
    shown = strike_captions(by_word, rewording, count=4)
    assert len(shown) == min(4, int(was.sum()))
    for one in shown:
        row = rewording.captions.index(one.caption)
        assert was[row] == 1 and one.fooled == (still[row] == 0)
        assert with_word(one.caption, one.place, one.word) == rewording.texts(rewording.word)[row]
    made = [StruckCaption("a <b> red dog", (6, 9), "&", True)]
    page = render_attack([("m", by_word)], [], made, title="T", lead="L")
    assert "a &lt;b&gt; <del>red</del> <strong>&amp;</strong> dog" in page and "FOOLED" in page
    assert "<th>random word</th>" in page and "<th>random noise</th>" not in page


def test_the_page_has_every_number_and_escapes_what_others_wrote(make_model, drawings):
    model, source = make_model(), drawings(8)
    noise = sign_noise(16, 12)
    report = measure_attack(model, source, noise, precision="fp32")
    same = replace(report, attacked=evaluate_changed(model, source, report.clean, torch.zeros_like))
    page = render_attack([("<b> on drawings", same)], [], title="T", lead="L", settings=[("model", "<b>")])
    assert "<b>" not in page and "&lt;b&gt;" in page
    for name, value in report.clean.headline().items():
        assert name in page and f"{value.value:.3f}" in page
    assert page.count('class="number"') == 5 * len(report.clean.headline())
