import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import layer_norm

from diptych.errors import ConfigError, TextError
from diptych.models.build import build
from diptych.models.checkpoint import load_model, save_model
from diptych.models.codebook import (
    SCORE_STD,
    CodebookHead,
    CodebookHeadConfig,
    add_codebook,
    codebook_heads,
    has_codebook,
    normalise_scores,
    pool_scores,
    sparsemax,
    suggest_temperature,
)
from diptych.models.dual import DualEncoder
from diptych.models.heads import LinearHeadConfig
from diptych.models.modes import set_mode
from diptych.training.optim import OptimizerConfig, WeightAverage, exponential, make_optimizer
from diptych.types import TowerOutput

SMALL = CodebookHeadConfig(codes=12, dim=8, temperature=2.0)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def output(count: int = 5, width: int = 6, *, batch: int = 3) -> TowerOutput:
    tokens = torch.randn(batch, count, width, generator=generator())
    return TowerOutput(tokens.mean(1), tokens)


@pytest.fixture
def head() -> CodebookHead:
    torch.manual_seed(0)
    return CodebookHead(6, SMALL)


@pytest.fixture
def model(make_model) -> DualEncoder:
    model = make_model()
    add_codebook(model, SMALL)
    return model


def embeddings(model: DualEncoder) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(3, 3, 16, 16, generator=generator())
    tokens = model.tokenizer(["a red circle", "a blue square and a circle", "red"])
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(tokens)


def assert_same(found: DualEncoder, expected: DualEncoder) -> None:
    for one, two in zip(embeddings(found), embeddings(expected), strict=True):
        assert torch.equal(one, two)


# --- sparsemax ---


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.0], [1.0, 0.0]),
        ([0.3, 0.1], [0.6, 0.4]),
        ([7.0] * 5, [0.2] * 5),
        ([100.3, 100.1], [0.6, 0.4]),
        ([0.5, 0.5, -3.0], [0.5, 0.5, 0.0]),
        ([-4.0], [1.0]),
    ],
    ids=str,
)
def test_sparsemax_by_hand(scores, expected):
    torch.testing.assert_close(sparsemax(torch.tensor(scores)), torch.tensor(expected), rtol=0, atol=1e-5)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Bisect for the threshold, which needs no sorting."""
    scores = 2 * torch.randn(50, 33, generator=generator(), dtype=torch.float64)
    low, high = scores.amin(1, keepdim=True) - 1, scores.amax(1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        heavy = (scores - middle).clamp(min=0).sum(1, keepdim=True) > 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    torch.testing.assert_close(sparsemax(scores), (scores - low).clamp(min=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 257, 16384])
def test_sparsemax_gives_weights_that_sum_to_one_and_exact_zeros(size):
    scores = torch.randn(4, size, generator=generator())
    for temperature in (0.01, 1.0, 1000.0):
        weights = sparsemax(scores / temperature)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(4), rtol=0, atol=1e-6)
        far = scores.amax(1, keepdim=True) - scores >= 1.001 * temperature
        assert not weights[far].any()


def test_sparsemax_has_the_closed_gradient():
    scores = torch.randn(6, 20, generator=generator(), dtype=torch.float64, requires_grad=True)
    weights = sparsemax(scores)
    gradient = torch.randn(6, 20, generator=generator(), dtype=torch.float64)
    weights.backward(gradient)
    for row in range(6):
        inside = weights[row] > 0
        expected = torch.where(inside, gradient[row] - gradient[row][inside].mean(), torch.zeros(()))
        torch.testing.assert_close(scores.grad[row], expected.double())
        assert 1 < inside.sum() < 20
    assert torch.autograd.gradcheck(sparsemax, scores)


def test_half_of_the_gradient_flows_at_a_score_on_the_threshold():
    scores = torch.tensor([1.0, 0.0], requires_grad=True)  # tau = 0
    sparsemax(scores).backward(torch.tensor([5.0, -3.0]))
    assert scores.grad.tolist() == [1.5, -1.5]


def test_sparsemax_is_fp32_under_autocast():
    scores = torch.randn(2, 100, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparsemax(scores), sparsemax(scores.clone()))
        assert sparsemax(scores.bfloat16()).dtype == torch.float32


def test_other_normalisers():
    scores = torch.tensor([[0.0, 2.0]])
    torch.testing.assert_close(normalise_scores(scores, "softmax"), torch.tensor([[0.1192029, 0.8807971]]))
    torch.testing.assert_close(normalise_scores(scores, "sigmoid"), torch.tensor([[0.5, 0.8807971]]))


# --- pooling ---

SCORES = torch.tensor([[[-1.0, 4.0], [-3.0, 2.0], [9.0, -9.0]]])
REAL = torch.tensor([[True, True, False]])


@pytest.mark.parametrize(
    ("pool", "pad", "expected"),
    [
        ("max", "neg_inf", [-1.0, 4.0]),
        ("max", "zero", [0.0, 4.0]),  # all negative evidence of a padded text is gone
        ("mean", "neg_inf", [-2.0, 3.0]),
        ("mean", "zero", [-4 / 3, 2.0]),  # divided by padding too
        ("sum", "neg_inf", [-4.0, 6.0]),
        ("sum", "zero", [-4.0, 6.0]),
    ],
)
def test_pooling_by_hand(pool, pad, expected):
    torch.testing.assert_close(pool_scores(SCORES, REAL, pool=pool, pad=pad), torch.tensor([expected]))


@pytest.mark.parametrize(("pool", "expected"), [("max", [9.0, 4.0]), ("mean", [5 / 3, -1.0]), ("sum", [5.0, -3.0])])
def test_without_a_mask_every_position_counts(pool, expected):
    for pad in ("neg_inf", "zero"):
        torch.testing.assert_close(pool_scores(SCORES, None, pool=pool, pad=pad), torch.tensor([expected]))


def test_a_text_that_is_all_padding_is_refused():
    with pytest.raises(TextError, match=r"Text 1 of 2 is all padding"):
        pool_scores(torch.zeros(2, 2, 3), torch.tensor([[True, False], [False, False]]), pool="max", pad="zero")


# --- the head ---


@torch.no_grad()
def test_the_head_is_its_equations_in_a_naive_loop(head):
    given = output()
    expected = []
    for sample in given.tokens:
        scores = [[float(head.query(h) @ code) / 8**0.5 for code in head.codebook] for h in sample]
        pooled = torch.tensor([max(column) / 2.0 for column in zip(*scores, strict=True)])
        weights = sparsemax(pooled)
        expected.append(sum(weight * code for weight, code in zip(weights, head.codebook, strict=True)))
    torch.testing.assert_close(head(given), torch.stack(expected))


def test_a_fresh_query_sees_normed_and_raw_patches_alike(head):
    """Our image tower norms its patches, the official one does not; before training that is the same function."""
    raw = output().tokens * 3 + 1
    torch.testing.assert_close(head.query(layer_norm(raw, (6,))), head.query(raw), rtol=1e-4, atol=1e-4)


def test_max_pooling_minds_neither_the_order_of_patches_nor_repeated_ones():
    given = output()
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = replace(given, tokens=given.tokens[:, order])
    repeated = replace(given, tokens=torch.cat([given.tokens, given.tokens[:, :1]], 1))
    for pool in ("max", "mean", "sum"):
        torch.manual_seed(0)
        head = CodebookHead(6, replace(SMALL, pool=pool))
        torch.testing.assert_close(head(shuffled), head(given))
        same = torch.allclose(head(repeated), head(given), atol=1e-6)
        assert same == (pool == "max")


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_more_padding_changes_nothing_unless_it_scores_zero(pool):
    given = output()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5])
    padded = torch.cat([given.tokens, 7 * torch.ones(3, 4, 6)], 1)
    more = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    for pad in ("neg_inf", "zero"):
        torch.manual_seed(0)
        head = CodebookHead(6, replace(SMALL, pool=pool, pad=pad, temperature=20.0))
        before, after = head(replace(given, mask=mask)), head(TowerOutput(given.pooled, padded, more))
        assert torch.allclose(before, after, atol=1e-5) == (pad == "neg_inf" or pool == "sum")


def test_a_hot_codebook_gives_everything_the_mean_of_its_codes(head):
    head.config = replace(SMALL, temperature=1e7)
    mixture = head.mix(output())
    torch.testing.assert_close(mixture.weights, torch.full((3, 12), 1 / 12), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixture.features, head.codebook.mean(0).expand(3, 8), rtol=0, atol=1e-4)


def test_a_cold_codebook_gives_one_code(head):
    head.config = replace(SMALL, temperature=1e-7)
    mixture, best = head.mix(output()), head.scores(output()).amax(1).argmax(1)
    assert torch.equal(mixture.weights.nonzero()[:, 1], best)
    torch.testing.assert_close(mixture.features, head.codebook[best])


def test_one_code_is_the_same_for_all():
    head = CodebookHead(6, replace(SMALL, codes=1))
    torch.testing.assert_close(head(output()), head.codebook.expand(3, 8))


def test_sigmoid_mixtures_are_divided_by_their_weights():
    head = CodebookHead(6, replace(SMALL, normaliser="sigmoid"))
    mixture = head.mix(output())
    expected = mixture.weights @ head.codebook / mixture.weights.sum(1, keepdim=True)
    torch.testing.assert_close(mixture.features, expected)
    assert (mixture.weights.sum(1) > 2).all()


def test_near_uniform_mixtures_stay_fp32_under_autocast():
    torch.manual_seed(0)
    head = CodebookHead(6, CodebookHeadConfig(codes=64, dim=8, temperature=100.0))
    with torch.autocast("cpu", torch.bfloat16):
        low = head(output())
    assert low.dtype == torch.float32
    difference = head(output()) - head.codebook.mean(0)
    assert (low - head(output())).norm() < 0.1 * difference.norm()


@pytest.mark.parametrize("normaliser", ["sparsemax", "softmax", "sigmoid"])
@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_every_parameter_learns(normaliser, pool):
    head = CodebookHead(6, replace(SMALL, normaliser=normaliser, pool=pool))
    head(output()).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


# --- errors ---


def test_bad_settings():
    for changes, message in (
        ({"temperature": 0.0}, r"temperature of a codebook must be > 0, not 0\.0"),
        ({"temperature": float("nan")}, "must be > 0, not nan"),
        ({"codes": 0}, r"codes >= 1 and dim >= 1, not 0 and 8"),
        ({"dim": 0}, r"not 12 and 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            CodebookHead(6, replace(SMALL, **changes))


def test_heads_that_do_not_fit_each_other():
    with pytest.raises(ConfigError, match=r"equal `shared` and `dim`; image_head has True and 8, text_head True and 4"):
        codebook_heads(6, SMALL, 6, replace(SMALL, dim=4))
    with pytest.raises(ConfigError, match=r"equal codes and dim; one has \(12, 8\), the other \(13, 8\)"):
        codebook_heads(6, SMALL, 6, replace(SMALL, codes=13))
    with pytest.raises(ConfigError, match="image_head has True"):
        codebook_heads(6, SMALL, 6, replace(SMALL, shared=False))


def test_one_codebook_head_alone_is_refused(model):
    config = replace(model.config, text_head=LinearHeadConfig(8))
    with pytest.raises(ConfigError, match=r"Either both heads .* a CodebookHeadConfig, text_head a LinearHeadConfig"):
        build(config, model.tokenizer)


def test_a_tower_without_patches_is_refused(head):
    with pytest.raises(ConfigError, match="need patches or tokens, but this tower gives one pooled vector"):
        head(TowerOutput(torch.zeros(2, 6)))


# --- one codebook, two towers ---


def test_the_codebook_is_one_parameter_of_one_name(model):
    named = [name for name, p in model.named_parameters() if p.shape == (12, 8)]
    assert named == ["image_head.codes"] == [name for name in model.state_dict() if name.endswith("codes")]
    assert model.text_head.codebook is model.image_head.codebook
    image, text = embeddings(model)
    with torch.no_grad():
        model.image_head.codes.mul_(-1.0).add_(0.3)
    for before, after in zip((image, text), embeddings(model), strict=True):
        assert not torch.allclose(before, after, atol=0.1)


def test_gradients_of_both_sides_meet_in_it(model):
    pixels, tokens = torch.rand(2, 3, 16, 16), model.tokenizer(["a red circle", "blue"])
    codes = model.image_head.codes
    apart = [
        torch.autograd.grad(embedding.sum(), codes)[0]
        for embedding in (model.encode_image(pixels), model.encode_text(tokens))
    ]
    (model.encode_image(pixels).sum() + model.encode_text(tokens).sum()).backward()
    torch.testing.assert_close(codes.grad, apart[0] + apart[1])


def test_a_copy_shares_its_own_codebook(model):
    twin = copy.deepcopy(model)
    assert_same(twin, model)
    assert twin.text_head.codebook is twin.image_head.codes is not model.image_head.codes
    with torch.no_grad():
        twin.image_head.codes.zero_()
    assert model.text_head.codebook.any()


def test_it_follows_the_model_to_another_type(model):
    twin = copy.deepcopy(model).to(torch.float64)
    assert twin.text_head.codebook is twin.image_head.codes
    assert twin.text_head.codebook.dtype == torch.float64
    future = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters are then replaced, not filled
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(future)
    assert model.text_head.codebook is model.image_head.codes and model.image_head.codes.dtype == torch.float64


@pytest.mark.parametrize("shared", [True, False])
def test_a_saved_model_comes_back(make_model, tmp_path, shared):
    model = make_model()
    add_codebook(model, replace(SMALL, shared=shared, pad="zero"))
    save_model(model, tmp_path / "saved")
    found = load_model(tmp_path / "saved")
    assert_same(found, model)
    assert found.config == model.config and found.config.text_head == replace(SMALL, shared=shared, pad="zero")
    codes = [name for name in load_file(tmp_path / "saved" / "model.safetensors") if name.endswith("codes")]
    assert codes == (["image_head.codes"] if shared else ["image_head.codes", "text_head.codes"])
    assert (found.text_head.codebook is found.image_head.codebook) == shared


def test_a_state_dict_loads_into_another_model(model, make_model):
    other = make_model(1)
    add_codebook(other, SMALL)
    other.load_state_dict(model.state_dict())
    assert_same(other, model)


def test_the_optimiser_and_the_average_hold_it_once(model):
    optimizer = make_optimizer(model, (model.vision, model.text), OptimizerConfig(lr=0.1, weight_decay=0.5))
    holding = [group for group in optimizer.param_groups if any(p is model.image_head.codes for p in group["params"])]
    assert len(holding) == 1 and holding[0]["weight_decay"] == 0.5
    assert sum(p is model.image_head.codes for p in holding[0]["params"]) == 1
    average = WeightAverage(model, exponential(0.5))
    start = model.image_head.codes.detach().clone()
    with torch.no_grad():
        model.image_head.codes.add_(1.0)
    average.update(model, step=100)
    average.swap(model)
    torch.testing.assert_close(model.text_head.codebook.detach(), start + 0.5)


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_towers_in_any_mode_leave_the_heads_to_be_trained(model, mode):
    for tower in (model.vision, model.text):
        set_mode(tower, mode)
    assert all(p.requires_grad for head in (model.image_head, model.text_head) for p in head.parameters())
    before = [p.detach().clone() for p in model.vision.parameters() if not p.requires_grad]
    image, text = model.encode_image(torch.rand(2, 3, 16, 16)), model.encode_text(model.tokenizer(["red", "blue"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (image * text).sum().backward()
    optimizer.step()
    still = [p for p in model.vision.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, still, strict=True))
    assert model.image_head.codes.grad.any()


# --- on a model that exists ---


def test_new_heads_leave_the_towers_and_start_the_temperature_anew(make_model):
    model = make_model()
    with torch.no_grad():
        model.log_scale.fill_(4.0)
    towers = {n: v.clone() for n, v in model.state_dict().items() if n.partition(".")[0] in ("vision", "text")}
    assert not has_codebook(model)
    add_codebook(model, SMALL)
    assert has_codebook(model)
    assert model.config.image_head == model.config.text_head == SMALL
    assert model.log_scale.item() == pytest.approx(model.config.scale.log_scale)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in towers.items())
    assert [e.shape for e in embeddings(model)] == [(3, 8), (3, 8)]
    rebuilt = build(model.config, model.tokenizer)
    assert {n: v.shape for n, v in rebuilt.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}


# --- the temperature ---


@pytest.mark.parametrize(
    ("codes", "positions", "target"), [*product((256, 4096), (1, 16, 49), (0.02, 0.05, 0.2, 0.8)), (16384, 49, 0.3)]
)
def test_the_suggested_temperature_gives_the_support_asked_for(codes, positions, target):
    scores = SCORE_STD * torch.randn(40, positions, codes, generator=generator()).amax(1)
    temperature = suggest_temperature(codes, positions, target)
    found = (sparsemax(scores / temperature) > 0).double().mean().item()
    assert found == pytest.approx(target, rel=0.15)


def test_the_official_temperature_is_the_one_for_thirty_percent():
    """The card measured 4,885 of 16,384 codes at T = 1000 with 49 positions, 51 of 256 at T = 10 with 16."""
    assert suggest_temperature(16384, 49, 4885 / 16384) == pytest.approx(1000, rel=0.02)
    assert suggest_temperature(256, 16, 51 / 256) == pytest.approx(10, rel=0.1)


def test_it_grows_with_the_share_and_with_the_codes():
    shares = [suggest_temperature(256, 49, share) for share in (0.01, 0.1, 0.5, 0.99)]
    assert shares == sorted(shares) and len(set(shares)) == 4
    assert suggest_temperature(1024, 49) > suggest_temperature(256, 49)
    assert suggest_temperature(1, 1) == 1.0


def test_impossible_temperatures():
    for arguments in ((0, 1), (1, 0), (8, 8, 0.0), (8, 8, 1.0)):
        with pytest.raises(ConfigError, match="suggest_temperature needs num_codes >= 1"):
            suggest_temperature(*arguments)


def test_fresh_heads_have_the_spread_that_is_assumed():
    torch.manual_seed(0)
    head = CodebookHead(64, CodebookHeadConfig(codes=2000, dim=128))
    tokens = torch.randn(8, 20, 64)
    assert head.scores(TowerOutput(tokens[:, 0], tokens)).std().item() == pytest.approx(SCORE_STD, rel=0.03)
