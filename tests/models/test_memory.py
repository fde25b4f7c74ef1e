import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from diptych import files
from diptych.data.sources import Listed
from diptych.evaluation.run import Evaluation, evaluate_model
from diptych.models.codebook import CodebookHeadConfig, add_codebook
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_source
from diptych.models.memory import remembered
from diptych.models.modes import set_mode
from diptych.types import Text


@pytest.fixture
def source(drawings) -> Listed:
    """Return 70 samples, more than one batch, two of which cannot be read, some with equal images and captions."""
    samples = [replace(s, label="ab"[i % 2]) for i, s in enumerate(drawings(24).samples * 3)][:70]
    samples = [replace(s, key=f"{i}", texts=(*s.texts, Text(f"number {i}"))) for i, s in enumerate(samples)]
    samples[5], samples[69] = replace(samples[5], image=b"no image"), replace(samples[69], image=None)
    return Listed(samples, "drawings")


@pytest.fixture
def frozen(make_model) -> DualEncoder:
    model = make_model(0, ["a red circle number 123456789", "a photo of"])
    set_mode(model.vision, "frozen")
    set_mode(model.text, "frozen")
    return model


def count_calls(model: DualEncoder) -> dict[str, int]:
    model.texts_by_length = False  # so that a batch of texts is one call
    calls = {"vision": 0, "text": 0}
    for name in calls:
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    return calls


def nudge(model: DualEncoder) -> None:
    """Do what a training step does to heads."""
    with torch.no_grad():
        for head in (model.image_head, model.text_head):
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def same(one: Evaluation, other: Evaluation) -> bool:
    records = [{**found.to_json(), "seconds": None} for found in (one, other)]
    bits = [torch.equal(getattr(one.embedded, side), getattr(other.embedded, side)) for side in ("images", "texts")]
    rest = [replace(found.embedded, images=torch.empty(0, 1), texts=torch.empty(0, 1)) for found in (one, other)]
    return all(bits) and json.dumps(records[0]) == json.dumps(records[1]) and repr(rest[0]) == repr(rest[1])


@pytest.mark.parametrize("codebook", [False, True])
def test_towers_are_asked_once_over_three_evaluations_and_numbers_stay_to_the_last_bit(frozen, source, codebook):
    if codebook:  # it reads tokens, not the pooled vector
        add_codebook(frozen, CodebookHeadConfig(codes=12, dim=8))
    calls, seen = count_calls(frozen), []
    with remembered(frozen, source) as memory:
        for _ in range(3):
            nudge(frozen)
            found = evaluate_model(frozen, source, memory=memory)
            seen.append(dict(calls))
            assert same(found, evaluate_model(frozen, source))
            calls.update(seen[-1])  # the evaluation without a memory does not count
    assert found.zeroshot is not None and len(found.embedded.skipped) == 2
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] == {
        "vision": 2,
        "text": 2,
    }  # 68 images by 64; 136 captions at once; the prompts of all classes at once


def test_only_what_the_head_reads_is_kept(frozen, source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "feature_folder", lambda: tmp_path)
    with remembered(frozen, source) as memory:
        embed_source(frozen, source, memory=memory)
        kept = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 4 * 16 * (68 + 136) < kept < 1.5 * 4 * 16 * (68 + 136)  # pooled vectors of width 16
    assert list(tmp_path.iterdir()) == []  # gone with the context


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_tower_that_is_trained_is_asked_every_time(frozen, source, mode):
    set_mode(frozen.vision, mode)
    calls = count_calls(frozen)
    with remembered(frozen, source) as memory:
        for _ in range(2):
            with torch.no_grad():
                frozen.vision.patch_embedding.weight.mul_(1.1)
            found = embed_source(frozen, source, memory=memory)
    assert calls == {"vision": 4, "text": 1}
    plain = embed_source(frozen, source)
    assert torch.equal(found.images, plain.images) and torch.equal(found.texts, plain.texts)


def test_images_that_are_remembered_are_not_read_again(frozen, source):
    class Counted(Listed):
        read = 0

        def __getitem__(self, index):
            Counted.read += 1
            return super().__getitem__(index)

    counted = Counted(source.samples, "counted")
    with remembered(frozen, counted) as memory:
        for _ in range(3):
            found = embed_source(frozen, counted, memory=memory)
    assert Counted.read == len(source) and found.keys == embed_source(frozen, source).keys


@pytest.mark.parametrize("trouble", ["limit", "disk"])
def test_what_finds_no_room_is_asked_again(frozen, source, monkeypatch, trouble):
    def full(*given):
        raise OSError(28, "No space left on device")

    if trouble == "disk":
        monkeypatch.setattr("diptych.data.store.TensorStore.add", full)
    calls = count_calls(frozen)
    with remembered(frozen, source, gigabytes=1e-9 if trouble == "limit" else 1.0) as memory:
        first, second = (embed_source(frozen, source, memory=memory) for _ in range(2))
    assert calls == {"vision": 4, "text": 2}
    assert torch.equal(first.images, second.images) and torch.equal(first.texts, second.texts)


def test_a_memory_is_of_one_model_and_one_source(frozen, make_model, source, drawings):
    with remembered(frozen, source) as memory:
        for model, other in ((make_model(1), source), (frozen, drawings(3))):
            with pytest.raises(AssertionError):
                embed_source(model, other, memory=memory)


def test_another_batch_size_is_remembered_by_itself(frozen, source):
    calls = count_calls(frozen)
    with remembered(frozen, source) as memory:
        for size in (64, 32, 64, 32):
            found = embed_source(frozen, source, batch_size=size, memory=memory)
    assert calls["vision"] == 2 + 3
    assert torch.equal(found.images, embed_source(frozen, source, batch_size=32).images)


def test_outputs_of_towers_without_tokens_and_grids_come_back(frozen, source):
    class Pooled(nn.Module):
        def forward(self, output):
            return output.tokens.mean(1)[:, :8] if output.grid == (1, 1) else output.tokens[:, 0, :8]

    frozen.image_head = Pooled()  # reads the grid
    with remembered(frozen, source) as memory:
        for _ in range(2):
            found = embed_source(frozen, source, memory=memory)
    assert torch.equal(found.images, embed_source(frozen, source).images)
