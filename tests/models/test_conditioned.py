import torch

from diptych.models.conditioned import ConditionedAttention


def test_a_new_one_is_the_identity_and_a_moved_one_hears_its_condition():
    torch.manual_seed(0)
    attention = ConditionedAttention(32, 5)
    maps, first, second = torch.randn(2, 32, 3, 4), torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(attention(maps, first), maps)
    with torch.no_grad():
        attention.project_out.weight.copy_(torch.eye(32)[..., None, None])
    assert (attention(maps, first) - attention(maps, second)).abs().max() > 1e-3


def test_a_condition_says_the_same_to_every_pixel():
    """With equal pixels everything but the condition is equal, and what comes out stays equal over pixels."""
    torch.manual_seed(0)
    attention = ConditionedAttention(32, 5)
    torch.nn.init.eye_(attention.project_out.weight.view(32, 32))
    found = attention(torch.randn(2, 32, 1, 1).expand(-1, -1, 3, 4), torch.randn(2, 5))
    torch.testing.assert_close(found, found[..., :1, :1].expand_as(found))
