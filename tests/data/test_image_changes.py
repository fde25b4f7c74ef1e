import pytest
import torch

from diptych.data.image_changes import all_marked, restyled, watermarked


@pytest.mark.parametrize("case", ["watermark", "watermark_random"])
def test_official_mark(golden, case):
    numbers = golden("ip_clip", case)
    image = torch.from_numpy(numbers["image"]).permute(2, 0, 1)
    assert torch.equal(watermarked(image).permute(1, 2, 0), torch.from_numpy(numbers["marked"]))


def test_the_mark_of_a_black_image():
    marked = watermarked(torch.zeros(2, 3, 8, 6, dtype=torch.uint8))
    assert marked.float().mean() == 191.25 and marked[0, 0, 1].tolist() == [255, 0, 255, 0, 255, 0]


def test_new_styles_follow_from_the_seed_and_leave_random_numbers_alone():
    images = [
        torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(row)).byte() for row in range(3)
    ]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other, view = ([*restyled(images, **settings)] for settings in ({}, {}, {"seed": 1}, {"view": 1}))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other)) and not all(map(torch.equal, first, view))
    assert all(map(torch.equal, images, restyled(images, ops=0)))


def test_all_images_are_marked_alike():
    images = torch.randint(0, 256, (2, 3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(torch.stack([*all_marked(images)]), watermarked(images))
