from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import ConfigError, TextError
from diptych.models.layers import fresh_twin, jl_dimension, layer_features, sparse_projection
from diptych.types import Text


@pytest.fixture
def source(drawings):
    return Listed([replace(s, texts=(Text("a" + " blue" * (i % 4)),)) for i, s in enumerate(drawings(9))])


def test_layers_equal_forward_passes_one_by_one(make_model, source):
    model = make_model()
    names = ("text", "vision.transformer.blocks.0", "vision", "text_head", "image_head", "text.transformer.blocks.0")
    found = layer_features(model, source, names, batch_size=4)
    assert tuple(found) == names and model.texts_by_length
    with torch.inference_mode():
        for row, sample in enumerate(source):
            alone = layer_features(model, Listed([sample]), names)
            tokens = model.tokenizer([sample.texts[0].text])
            text = model.text(tokens.ids, tokens.mask, layers=(0,))
            torch.testing.assert_close(found["text"][row], text.pooled[0])
            torch.testing.assert_close(found["text.transformer.blocks.0"][row], text.layers[0][0].mean(0))
            for name in names:
                torch.testing.assert_close(found[name][row], alone[name][0])


def test_sequences_become_vectors(make_model, source):
    model, name = make_model(), "vision.transformer.blocks.0"
    found = {how: layer_features(model, source, [name], positions=how)[name] for how in ("mean", "first", "flatten")}
    flat = found["flatten"].unflatten(1, (-1, 16))
    torch.testing.assert_close(flat.mean(1), found["mean"])
    assert torch.equal(flat[:, 0], found["first"])


def test_names_that_are_no_layers_and_missing_texts(make_model, drawings):
    with pytest.raises(ConfigError, match=r"no layer 'visoin'. Did you mean 'vision'"):
        layer_features(make_model(), drawings(2), ["visoin"])
    silent = Listed([replace(sample, texts=()) for sample in drawings(2)])
    with pytest.raises(TextError, match=r"Sample 0 .* has no text"):
        layer_features(make_model(), silent, ["text"])
    assert len(layer_features(make_model(), silent, ["vision"])["vision"]) == 2


def test_a_twin_shares_the_architecture_and_no_weights(make_model):
    model = make_model()
    twin, same = fresh_twin(model, seed=3), fresh_twin(model, seed=3)
    assert twin.config == model.config and twin.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(twin.vision.position, same.vision.position)
    assert not torch.equal(twin.vision.position, model.vision.position)


@pytest.mark.data
def test_official_dimensions(data):
    with np.load(data.parent / "golden" / "brain_encoding.npz") as golden:
        pairs = zip(golden["jl/n"].tolist(), golden["jl/dim"].tolist(), strict=True)
        assert all(abs(jl_dimension(n, float(golden["jl/eps"])) - dim) <= 1 for n, dim in pairs)


def test_projections_keep_distances():
    x = torch.randn(30, 4000, generator=torch.Generator().manual_seed(0))
    y = sparse_projection(x, 1500)
    ratio = torch.pdist(y) / torch.pdist(x)
    assert y.shape == (30, 1500) and ratio.mean().item() == pytest.approx(1, abs=0.02) and ratio.std() < 0.05
    assert torch.equal(sparse_projection(x, 1500), y) and sparse_projection(x, 4000) is x
