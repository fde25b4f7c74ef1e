import pytest
import torch

from diptych.models.heads import ClassMixtureHead, ClassMixtureHeadConfig, LinearHead, LinearHeadConfig, normed_mlp
from diptych.types import TowerOutput


@pytest.fixture
def head() -> ClassMixtureHead:
    """Return a head that, without looking, gives three classes the shares 1/8, 2/8 and 5/8."""
    head = ClassMixtureHead(4, ClassMixtureHeadConfig(classes=3, dim=2))
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.copy_(torch.tensor([1.0, 2.0, 5.0]).log())
        head.names.copy_(torch.tensor([[8.0, 0.0], [0.0, 4.0], [1.6, -0.8]]))
    return head


def test_a_mixture_is_the_mean_of_names_weighted_by_their_probabilities(head):
    found = head(TowerOutput(torch.randn(3, 4)))
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5]).expand(3, 2))


def test_the_residual_starts_at_zero_and_is_added(head):
    pooled = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with torch.no_grad():
        head.residual.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]))
    torch.testing.assert_close(head(TowerOutput(pooled)), torch.tensor([[2.0 + 1.0, 0.5 + 8.0]]))


def test_a_certain_classifier_gives_the_name_of_its_class(head):
    with torch.no_grad():
        head.classifier.weight.copy_(100 * torch.eye(3, 4))
    found = head(TowerOutput(torch.eye(3, 4)))
    torch.testing.assert_close(found, head.names.detach())


def test_every_part_of_the_mixture_learns(head):
    head(TowerOutput(torch.randn(3, 4))).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_a_linear_head_projects_the_pooled_vector_or_leaves_it():
    pooled = torch.randn(3, 4)
    torch.manual_seed(0)
    head = LinearHead(4, LinearHeadConfig(2, bias=True))
    torch.testing.assert_close(head(TowerOutput(pooled)), pooled @ head.linear.weight.T + head.linear.bias)
    assert LinearHead(4, LinearHeadConfig(2)).linear.bias is None
    assert torch.equal(LinearHead(4, LinearHeadConfig(None))(TowerOutput(pooled)), pooled)


def test_a_normed_mlp_by_hand():
    torch.manual_seed(0)
    mlp, x = normed_mlp(3, 5, 4, 2, hidden_bias=False), torch.randn(6, 3)
    expected = x
    for place in (0, 3):
        expected = expected @ mlp[place].weight.T
        expected = (expected - expected.mean(0)) / (expected.var(0, unbiased=False) + 1e-5).sqrt()
        expected = expected.clamp(min=0)
    torch.testing.assert_close(mlp(x), expected @ mlp[6].weight.T + mlp[6].bias)
    biases = [layer.bias is not None for layer in normed_mlp(3, 5, 2, last_bias=False) if hasattr(layer, "in_features")]
    assert biases == [True, False]
