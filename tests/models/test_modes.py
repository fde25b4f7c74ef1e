import sys

import pytest
import torch

from diptych.errors import ConfigError, MissingExtraError
from diptych.models.dual import DualEncoder
from diptych.models.foreign import TimmConfig, TimmTower
from diptych.models.modes import is_frozen, merged_state, set_mode, train_mode

WORDS = ["a red circle", "a blue square"]


@pytest.fixture
def model(make_model) -> DualEncoder:
    return make_model()


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def embeddings(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode_image(images()), model.encode_text(model.tokenizer(WORDS))


def train(model: DualEncoder, steps: int = 3) -> None:
    """Pull the pairs together, with steps large enough to be seen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        image, text = model.encode_image(images()), model.encode_text(model.tokenizer(WORDS))
        (image - text).square().sum().backward()
        optimizer.step()


def test_a_frozen_tower_gets_no_gradient_and_stays_as_it_is(model):
    set_mode(model.vision, "frozen")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    assert is_frozen(model.vision) and not is_frozen(model.text)
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    changed = {name.partition(".")[0] for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"text", "image_head", "text_head"}


def test_a_frozen_tower_stays_in_eval_mode(model):
    set_mode(model.vision, "frozen")
    objective = torch.nn.ModuleDict({"model": model})  # objectives hold the model
    train_mode(objective)
    assert not any(module.training for module in model.vision.modules())
    assert all(module.training for module in model.text.modules()) and model.image_head.training
    set_mode(model.vision, "full")
    train_mode(objective)
    assert model.vision.training and all(parameter.requires_grad for parameter in model.vision.parameters())


def test_batch_statistics_of_a_frozen_tower_do_not_move(model):
    model.vision = tower = TimmTower(TimmConfig("test_resnet"))
    moved = []
    for mode in ("full", "frozen"):
        set_mode(tower, mode)
        train_mode(model)
        before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
        tower(torch.randn(2, 3, 64, 64))
        moved.append(any(not buffer.equal(before[name]) for name, buffer in tower.named_buffers()))
    assert moved == [True, False]


def test_lora_trains_only_low_rank_updates_of_attention(model):
    set_mode(model.vision, "lora", rank=2)
    trained = {name: p for name, p in model.vision.named_parameters() if p.requires_grad}
    assert all(".attention." in name and ".lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == 4 * 2 * (
        16 + 16
    )  # four projections of width 16, A and B of rank 2
    before = {name: value.clone() for name, value in model.vision.state_dict().items()}
    train(model)
    changed = {name for name, value in model.vision.state_dict().items() if not value.equal(before[name])}
    assert changed == set(trained)
    assert not is_frozen(model.vision)


def test_lora_starts_from_the_original(model):
    before = embeddings(model)
    for tower in (model.vision, model.text):
        set_mode(tower, "lora")
    for found, expected in zip(embeddings(model), before, strict=True):
        assert torch.equal(found, expected)


def test_merged_weights_do_what_the_adapted_model_does(model, make_model):
    names, before = set(model.state_dict()), embeddings(model)
    for tower in (model.vision, model.text):
        set_mode(tower, "lora", rank=4)
    train(model)
    adapted, merged = embeddings(model), merged_state(model)
    assert set(merged) == names
    plain = make_model(1)
    plain.load_state_dict(merged)
    for found, expected, original in zip(embeddings(plain), adapted, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (expected - original).abs().max() > 0.01
    for found, expected in zip(embeddings(model), adapted, strict=True):
        assert torch.equal(found, expected)  # merging leaves the model as it was


def test_an_update_is_twice_b_times_a(model):
    name = "vision.transformer.blocks.0.attention.query"
    set_mode(model.vision, "lora", rank=2)
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.any() and not b.any()
    with torch.no_grad():
        b.normal_()
    expected = layer.base_layer.weight + 2 * b @ a
    torch.testing.assert_close(merged_state(model)[f"{name}.weight"], expected.detach())


def test_without_lora_the_merged_state_is_the_state(model):
    merged, state = merged_state(model), model.state_dict()
    assert merged.keys() == state.keys() and all(merged[name].equal(state[name]) for name in state)


def test_lora_on_a_tower_of_timm():
    tower = TimmTower(TimmConfig("test_vit"))
    set_mode(tower, "lora")
    adapted = {name for name, module in tower.named_modules() if hasattr(module, "lora_A")}
    depth = len(tower.model.blocks)
    assert adapted == {f"model.blocks.{i}.attn.{part}" for i in range(depth) for part in ("qkv", "proj")}


def test_lora_needs_attention():
    with pytest.raises(ConfigError, match=r"TimmTower has no attention projections for LoRA\. Use mode full or frozen"):
        set_mode(TimmTower(TimmConfig("test_resnet")), "lora")


def test_lora_needs_peft(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diptych\[hf\]'"):
        set_mode(model.vision, "lora")
