import pytest
import torch

from diptych.errors import ImageError
from diptych.models import reference
from diptych.models.reference import image_embeddings, reference_pixels, reference_texts, text_embeddings, tower_outputs


@pytest.fixture
def folder(drawings, tmp_path) -> str:
    for sample in drawings(7):
        (tmp_path / f"{sample.key}.png").write_bytes(sample.image)
        (tmp_path / f"{sample.key}.txt").write_text(sample.texts[0].text)
    return str(tmp_path)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Forget all answers, and return a list of the questions that are really asked."""
    questions: list[str] = []
    in_parts = reference._in_parts

    def watched(model, pixels, ask):
        questions.append(ask.__name__)
        return in_parts(model, pixels, ask)

    monkeypatch.setattr(reference, "_answers", {})
    monkeypatch.setattr(reference, "_in_parts", watched)
    return questions


def test_all_images_or_some_drawn_at_random(folder, make_model):
    policy = make_model().image_policy
    whole = reference_pixels(folder, policy, count=None, seed=0)
    some = reference_pixels(folder, policy, count=3, seed=1)
    assert len(whole) == 7 and len(some) == 3
    assert all(any(torch.equal(one, other) for other in whole) for one in some)
    assert torch.equal(some, reference_pixels(folder, policy, count=3, seed=1))


def test_texts_are_there_once(folder, tmp_path):
    (tmp_path / "s6.txt").write_text((tmp_path / "s0.txt").read_text())
    assert len(reference_texts(folder)) == 6


def test_answers_equal_those_of_the_model_and_are_given_once_to_equal_weights(folder, make_model, asked):
    model, twin, other = make_model(), make_model(), make_model(seed=1)
    model.train()
    pixels = reference_pixels(folder, model.image_policy, count=None, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(image_embeddings(model, pixels), model.encode_image(pixels))
        torch.testing.assert_close(tower_outputs(model, pixels).pooled, model.image_output(pixels).pooled)
    assert all(module.training for module in model.modules())
    assert image_embeddings(twin, pixels) is image_embeddings(model, pixels)
    assert asked == ["encode_image", "image_output"]
    assert not torch.equal(image_embeddings(other, pixels), image_embeddings(model, pixels))
    with torch.no_grad():
        twin.image_head.linear.weight.add_(1.0)
    assert tower_outputs(twin, pixels) is tower_outputs(model, pixels)  # the head has no part in it
    assert not torch.equal(image_embeddings(twin, pixels), image_embeddings(model, pixels))


def test_texts_are_embedded_once(make_model, asked):
    model = make_model()
    first = text_embeddings(model, ("a red circle", "a blue square"))
    assert text_embeddings(make_model(), ("a red circle", "a blue square")) is first
    assert text_embeddings(model, ("a blue square", "a red circle")) is not first
    torch.testing.assert_close(first, model.encode_text(model.tokenizer(["a red circle", "a blue square"])).detach())


def test_the_oldest_answer_goes_first(make_model, asked):
    model = make_model()
    first = text_embeddings(model, ("0",))
    for number in range(1, reference.ANSWERS + 1):
        text_embeddings(model, (str(number),))
    assert len(reference._answers) == reference.ANSWERS
    assert text_embeddings(model, ("0",)) is not first


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path, make_model):
    (tmp_path / "s2.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"'s2.*in the reference .* cannot be used"):
        reference_pixels(folder, make_model().image_policy, count=None, seed=5)
