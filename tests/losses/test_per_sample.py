import math

import pytest
import torch
from torch.nn.functional import normalize

from diptych.losses.contrastive import info_nce
from diptych.losses.per_sample import info_nce_per_sample
from diptych.losses.positives import Positives


def embeddings(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    image, text = normalize(torch.randn(2, n, 5, generator=generator, dtype=torch.float64), dim=-1)
    return image, text


def test_each_pair_by_hand():
    image, text = embeddings()
    found = info_nce_per_sample(image, text, 3.0)
    for i in range(6):
        row = sum(math.exp(3 * float(image[i] @ text[j])) for j in range(6))
        column = sum(math.exp(3 * float(image[j] @ text[i])) for j in range(6))
        expected = (math.log(row) + math.log(column)) / 2 - 3 * float(image[i] @ text[i])
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("group", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2]], ids=["diagonal", "groups"])
def test_the_mean_is_info_nce(group):
    image, text = embeddings()
    ids = torch.tensor(group)
    positives = ids[:, None] == ids if len(set(group)) < 6 else None
    if positives is not None:
        listed = Positives(ids, torch.arange(6))
        assert torch.equal(
            info_nce_per_sample(image, text, 7.0, positives=listed),
            info_nce_per_sample(image, text, 7.0, positives=positives),
        )
    found = info_nce_per_sample(image, text, 7.0, positives=positives).mean()
    torch.testing.assert_close(found, info_nce(image, text, 7.0, positives=positives), rtol=1e-12, atol=0)


def test_every_pair_is_at_chance_without_a_scale():
    image, text = embeddings()
    torch.testing.assert_close(
        info_nce_per_sample(image, text, 0.0), torch.full((6,), math.log(6), dtype=torch.float64)
    )


def test_low_precision_is_computed_in_fp32():
    image, text = (x.bfloat16() for x in embeddings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce_per_sample(image, text, 7.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, info_nce_per_sample(image.float(), text.float(), 7.0), rtol=0, atol=0)
