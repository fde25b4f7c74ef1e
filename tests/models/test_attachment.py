import json

import pytest
import torch
from torch import nn

from diptych.errors import CheckpointError
from diptych.models.attachment import RECORD, WEIGHTS, read_attachment, save_attachment


def test_what_was_learnt_beside_a_model_comes_back_without_it(make_model, tmp_path):
    model, module = make_model(), nn.BatchNorm1d(3)
    save_attachment(tmp_path / "part", module, {"classes": ["a", "b"]}, model)
    assert {path.name for path in (tmp_path / "part").iterdir()} == {RECORD, WEIGHTS}
    record, weights = read_attachment(tmp_path / "part", make_model(), needs=("classes",))
    assert record == {"classes": ["a", "b"], "model": model.fingerprint}
    assert weights.keys() == module.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_another_model_and_what_cannot_be_read_are_refused(make_model, tmp_path):
    save_attachment(tmp_path, nn.Linear(1, 1), {}, make_model())
    with pytest.raises(CheckpointError, match="learnt on another model"):
        read_attachment(tmp_path, make_model(seed=1), needs=())
    with pytest.raises(CheckpointError, match=r"holds no adapter that could be read: KeyError.'classes'"):
        read_attachment(tmp_path, make_model(), needs=("classes",))
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_attachment(tmp_path, make_model(), needs=())
    (tmp_path / RECORD).write_text(json.dumps(["no mapping"]))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_attachment(tmp_path, make_model(), needs=())
