from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from diptych.curate.captions import AbstractCaptioner, ImageCaptioner, RegionCaptioner, add_captions, write_captions
from diptych.data.images import decode
from diptych.data.scenes import SceneConfig, scenes
from diptych.data.sources import Listed, open_source
from diptych.errors import CheckpointError, ConfigError, OfflineError
from diptych.types import Region, Sample


class Brightness(AbstractCaptioner):
    """Says what can be checked: the size of each image, and how many images came in one call."""

    def caption(self, samples: Sequence[Sample]) -> list[str]:
        return [
            "" if s.key.startswith("s1") else "{} by {}, one of ".format(*decode(s.image).size) + str(len(samples))
            for s in samples
        ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Save an image-to-text model of random weights, as transformers would find it on a disk."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("captioner")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a the red green circle square on ground".split()]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = small | special | {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 20}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8})
    net = transformers.BlipForConditionalGeneration(config)
    for parameter in net.text_decoder.parameters():
        parameter.data.normal_()
    net.text_decoder.cls.predictions.bias.data[:] = torch.tensor([-99.0] * 6 + [0.0] * 8)  # words, no special tokens
    net.save_pretrained(folder)
    engine = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special_tokens = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token"), words, strict=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **special_tokens)
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_regions_are_named_and_counted():
    boxes = [Region((0, 0, 1, 1), "a red cat", {"noun": "cat"})] * 2 + [Region((0, 0, 1, 1), "eagle")]
    sample = Sample("x", None, (), "x", regions=(*boxes,))
    many = replace(sample, regions=(Region((0, 0, 1, 1), "strawberry"),) * 7)
    said = RegionCaptioner().caption([sample, many, replace(sample, regions=())])
    assert said == ["two cats and an eagle", "7 strawberries", ""]


def test_scenes_get_the_short_caption_that_their_plan_has():
    source = scenes(count=12, config=SceneConfig(size=24))
    captioned = add_captions(source, RegionCaptioner())
    for index in range(12):
        assert captioned.texts(index)[-1].role == "synthetic"
        assert captioned.texts(index)[-1].text == source.plan(index).captions()[-1]


def test_samples_without_a_caption_are_counted(drawings):
    broken = [replace(s, image=b"nothing") if s.key == "s3" else s for s in drawings(6)]
    found = add_captions(Listed([*broken, replace(broken[0], image=None)]), Brightness(), batch_size=4)
    said = [[text.text for text in found.texts(i) if text.role == "synthetic"] for i in range(7)]
    assert said == [[f"24 by 20, one of {n}"] if n else [] for n in (3, 0, 3, 0, 2, 2, 0)]
    assert found.notes == ("3 of 7 samples got no synthetic caption.",)


def test_progress_is_told(drawings):
    steps: list[int] = []
    add_captions(drawings(5), Brightness(), batch_size=2, advance=steps.append)
    assert steps == [2, 2, 1]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_captions_are_written_beside_the_texts_of_a_table(tmp_path, drawings, ending):
    photos = tmp_path / "photos"
    photos.mkdir()
    for sample in drawings(3):
        (photos / f"{sample.key}.png").write_bytes(sample.image)
        (photos / f"{sample.key}.txt").write_text(sample.texts[0].text)
    out = write_captions(open_source(photos), tmp_path / "made" / f"captioned.{ending}", Brightness())
    again = open_source(out)
    roles = [[(text.text, text.role) for text in sample.texts] for sample in again]
    assert roles[0] == [("a red circle 0", "caption"), ("24 by 20, one of 3", "synthetic")]
    assert roles[1] == [("a green circle 0", "caption")]
    assert decode(again[2].image).size == (24, 20)  # the image is found from the new place


def test_a_source_without_a_table_takes_its_images_along(tmp_path, drawings):
    again = open_source(write_captions(drawings(3), tmp_path / "captioned.parquet", Brightness()))
    assert [sample.image for sample in again] == [sample.image for sample in drawings(3)]
    with pytest.raises(ConfigError, match=r"captioned\.jsonl cannot hold images"):
        write_captions(drawings(3), tmp_path / "captioned.jsonl", Brightness())
    with pytest.raises(ConfigError, match=r"must end in \.parquet or \.jsonl"):
        write_captions(drawings(3), tmp_path / "captioned.csv", Brightness())


def test_a_model_of_transformers_says_the_same_each_time(model, drawings):
    captioner = ImageCaptioner(str(model), max_tokens=6, offline=True)
    found = add_captions(drawings(5), captioner, batch_size=2)
    said = [text.text for i in range(5) for text in found.texts(i) if text.role == "synthetic"]
    assert len(said) == 5 and all(0 < len(text.split()) <= 7 for text in said)
    assert said == [captioner.caption([sample])[0] for sample in drawings(5)]


def test_a_prompt_goes_to_the_model_and_is_no_part_of_the_caption(model, drawings, monkeypatch):
    captioner = ImageCaptioner(str(model), prompt="the red", max_tokens=6)
    plain = ImageCaptioner(str(model), max_tokens=6).caption(list(drawings(2)))
    seen = []
    generate = captioner.model.generate
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
    said = captioner.caption(list(drawings(2)))
    assert all("the red" in words for words in captioner.tokenizer.batch_decode(seen[0]["input_ids"]))
    assert len(said) == len(plain) == 2 and not any(text.startswith("the red") for text in said)


def test_what_is_no_captioner_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="image-to-text"):
        ImageCaptioner(str(tmp_path))
    with pytest.raises(OfflineError, match="no folder"):
        ImageCaptioner("nobody/nothing", offline=True)
