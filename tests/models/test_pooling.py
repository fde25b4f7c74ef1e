import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.errors import InputError
from diptych.models.pooling import pool


@pytest.mark.data
def test_official_numbers(data):
    with np.load(data.parent / "golden" / "clippings.npz") as golden:
        image, text = (torch.from_numpy(golden[f"pool/{name}"]) for name in ("image", "text"))
        for weight, expected in zip(golden["pool/weights"].tolist(), golden["pool/pooled"], strict=True):
            torch.testing.assert_close(pool(image, text, weight), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_closed_forms():
    first, second = torch.eye(3)[:1], torch.eye(3)[1:2]
    assert torch.equal(pool(first, first), first)
    assert (pool(first, second) @ first.T).item() == pytest.approx(2**-0.5)
    image, text = F.normalize(torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    length = (0.5 * image + 0.5 * text).norm(dim=-1).square()
    torch.testing.assert_close(length, (1 + (image * text).sum(-1)) / 2)


def test_the_ends_are_one_modality_bit_by_bit():
    image, text = F.normalize(torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert pool(image, text, 1.0) is image and pool(image, text, 0.0) is text


def test_opposites_and_weights_out_of_range_are_refused():
    image = torch.eye(3)
    with pytest.raises(InputError, match=r"cancel each other at image_weight 0.5"):
        pool(image, -image)
    with pytest.raises(InputError, match=r"in \[0, 1\], not 1\.5"):
        pool(image, image, 1.5)
