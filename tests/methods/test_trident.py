"""Trident: the official numbers, closed forms, and what it does on towers of several kinds."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from by_hand import doubles
from diptych.claims import drawn_things
from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.data.images import decode
from diptych.data.scenes import NOUNS, SceneConfig, scenes
from diptych.data.transforms import to_tensor
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.segmentation import Vocabulary, labels_of, probabilities_of
from diptych.methods import load_method
from diptych.methods.trident import (
    PRESETS,
    Adapter,
    Config,
    aggregate,
    claim,
    guided_values,
    masked_affinity,
    mini,
    refine,
    thresholds,
    window_affinity,
)
from diptych.models.dense import patch_embeddings
from diptych.models.dense_features import tower_features
from diptych.models.segmenters import Looked, Masks, SelfAttention, out_of_square, regions_of
from diptych.models.tiles import Windows
from diptych.models.vision import VisionConfig, VisionTransformer
from diptych.models.weights import convert, load
from diptych.types import Batch

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def picture(height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch(*images: torch.Tensor) -> Batch:
    return Batch(tuple(map(str, range(len(images)))), (torch.stack(images),), (), torch.arange(len(images)))


def given(attention: torch.Tensor, value: torch.Tensor, grid: tuple[int, int]) -> SelfAttention:
    return SelfAttention(lambda start, stop: attention[:, start:stop], value, grid)


# --- the official numbers ---


@pytest.mark.parametrize("case", ["affinity", "affinity_ref_false"])
def test_the_official_affinity_over_the_picture(golden, case):
    numbers = golden("trident", case)
    attention, value = (torch.from_numpy(numbers[name]).double() for name in ("attention", "value"))
    value = F.normalize(value.flatten(1, 2), dim=-1)
    cosine = value @ value.mT
    negative = None if bool(numbers["refine_neg_cos"]) else 0.6
    eps = thresholds(cosine, float(numbers["cos_fac"]), negative=negative)
    torch.testing.assert_close(eps, torch.from_numpy(numbers["eps"]), **EXACT)
    affinity = masked_affinity(attention, cosine, eps)
    torch.testing.assert_close(affinity, torch.from_numpy(numbers["affinity"]), **EXACT)


def test_the_official_windows(golden):
    case = {name: value.tolist() for name, value in golden("trident", "windows").items()}
    pixels = Windows(case["height"], case["width"], case["crop"], case["stride"])
    side = case["patch"]
    cells = Windows(*(length // side for length in (pixels.height, pixels.width, pixels.side, pixels.stride)))
    found = [[y, x, y + cells.side, x + cells.side] for y, x in cells.corners]
    assert found == case["coords_in_cells_y1x1y2x2"]
    assert [(side * y, side * x) for y, x in cells.corners] == list(pixels.corners)
    count = torch.zeros(case["grid"][0], 0)  # windows by row
    assert len(found) == case["grid"][0] * case["grid"][1] and len(count) == 3
    cover = torch.zeros(cells.height, cells.width)
    for y0, x0, y1, x1 in found:
        cover[y0:y1, x0:x1] += 1
    assert cover.tolist() == case["cover_count"] and cover.min() >= 1


def official_tower(case: dict[str, torch.Tensor]) -> VisionTransformer:
    """Return the tower of the pipeline case."""
    tower = VisionTransformer(VisionConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_width=32))
    weights = {
        "class_token": case["param.class_embedding"],
        "position": case["param.positional_embedding"],
        "patch_embedding.weight": case["param.conv1.weight"],
    }
    names = {"norm_before": "ln_pre", "norm_after": "ln_post"}
    for i in range(2):
        ours, theirs = f"transformer.blocks.{i}", f"transformer.resblocks.{i}"
        names |= {f"{ours}.norm_attention": f"{theirs}.ln_1", f"{ours}.norm_mlp": f"{theirs}.ln_2"}
        names |= {f"{ours}.attention.out": f"{theirs}.attn.out_proj"}
        names |= {f"{ours}.mlp.up": f"{theirs}.mlp.c_fc", f"{ours}.mlp.down": f"{theirs}.mlp.c_proj"}
        for kind in ("weight", "bias"):
            parts = case[f"param.{theirs}.attn.in_proj_{kind}"].chunk(3)
            weights |= {
                f"{ours}.attention.{n}.{kind}": p for n, p in zip(("query", "key", "value"), parts, strict=True)
            }
    weights |= {f"{a}.{kind}": case[f"param.{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    tower.double().load_state_dict(weights)
    return tower.eval()


@torch.no_grad()
def test_the_official_pipeline_from_windows_to_logits(golden, make_model):
    case = doubles(golden("trident", "pipeline"))
    model = make_model().double()
    model.vision = official_tower(case)
    model.image_head.linear = torch.nn.Linear(16, 8, bias=False).double()
    model.image_head.linear.weight.copy_(case["param.proj"].T)
    affinity = window_affinity(case["guide"], beta=1.2, gamma=3.0)
    maps = guided_values(model, case["windows"], affinity, (4, 4))
    torch.testing.assert_close(maps.flatten(2).mT, case["window_out"], **EXACT)
    windows = Windows(6, 8, 4, 3)
    corners = [(y, x) for y, x, _, _ in case["coords_in_cells_y1x1y2x2"].long().tolist()]
    if list(windows.corners) != corners:
        windows = next(w for s in range(1, 5) if list((w := Windows(6, 8, 4, s)).corners) == corners)
    spliced = windows.merge(maps)
    torch.testing.assert_close(spliced.flatten(1).T, case["spliced"], **EXACT)
    grid = (5, 6)
    on_grid = F.interpolate(spliced[None], grid, mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(on_grid, case["spliced_on_sam_grid"], **EXACT)
    attention = given(case["sam_attention"], case["sam_value"].flatten(1, 2), grid)
    gathered = aggregate(attention, on_grid, cos_factor=1.2, block=7)
    torch.testing.assert_close(gathered, case["aggregated"], **EXACT)
    tokens = patch_embeddings(model, model.vision.norm_after(gathered[None]))[0]
    torch.testing.assert_close(tokens, case["visual_tokens"], **EXACT)
    logits = (case["text"] @ F.normalize(tokens, dim=-1).T).unflatten(1, grid)
    torch.testing.assert_close(logits, case["logits"], **EXACT)
    upsampled = F.interpolate(logits[None], (15, 19), mode="bilinear")[0]
    torch.testing.assert_close(upsampled, case["logits_upsampled"], **EXACT)


def test_the_official_classes(golden):
    numbers = golden("trident", "post")
    case = doubles(numbers)
    words = int((case["query_class"] == 0).sum())
    found = probabilities_of(case["logits"], words, scale=float(case["logit_scale"]))
    torch.testing.assert_close(found, case["probs"], **EXACT)
    labels = labels_of(found, background=True, least=float(case["prob_thd"]))
    assert torch.equal(labels, torch.from_numpy(numbers["labels"]))


def test_the_official_outlines(golden):
    numbers = golden("trident", "refine")
    case = {name: torch.from_numpy(value) for name, value in numbers.items()}
    asked = []

    def answer(prompts):
        start = sum(len(one.points) for one in asked)
        asked.append(prompts)
        part = slice(start, start + len(prompts.points))
        low = F.interpolate(case["decoder_logits_8x8"][part, None], (256, 256), mode="bilinear")[:, 0]
        return Masks(out_of_square(low, (48, 64)), case["decoder_iou"][part])

    looked = Looked(given(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), (1, 1)), answer, 256)
    found = refine(
        case["probs"],
        case["labels"].long(),
        looked,
        Config(
            refine_threshold=float(case["coarse_thresh"]),
            least_area=int(case["min_area"]),
            least_quality=float(case["iou_thresh"]),
            mask_factor=float(case["mask_coefficient"]),
        ),
    )
    assert [len(prompts.points) for prompts in asked] == case["regions_per_call"].tolist()
    assert torch.equal(torch.cat([prompts.points for prompts in asked]) * 4, case["region_points"])
    assert torch.equal(torch.cat([prompts.boxes for prompts in asked]) * 4, case["region_boxes"])
    masks = torch.stack([prompts.mask[::8, ::8] for prompts in asked])
    torch.testing.assert_close(masks, case["mask_prompt_8x_subsampled"], rtol=1e-4, atol=1e-6)
    boxes = torch.cat([prompts.boxes for prompts in asked])[case["decoder_iou"] > case["iou_thresh"]]
    assert torch.equal(boxes, case["accepted_boxes_full_res"])
    assert torch.equal(found.labels, case["refined_labels"].long())
    torch.testing.assert_close(found.probabilities, case["refined_scores"], rtol=1e-4, atol=1e-6)


# --- closed forms ---


def test_rows_of_a_window_sum_to_one_and_drop_what_is_unlike():
    torch.manual_seed(0)
    features = torch.randn(3, 8, 2, 3, dtype=torch.float64) + 0.5
    affinity = window_affinity(features, beta=1.2, gamma=3.0)
    torch.testing.assert_close(affinity.sum(-1), torch.ones(3, 6, dtype=torch.float64))
    direction = F.normalize(features.flatten(2), dim=1)
    similarity = torch.einsum("kci,kcj->kij", direction, direction)
    assert torch.equal(affinity == 0, similarity < 1.2 * similarity.mean()) and (affinity == 0).any()
    naive = torch.where(similarity < 1.2 * similarity.mean(), 0, (3 * similarity).exp())
    torch.testing.assert_close(affinity, naive / naive.sum(-1, keepdim=True))


def test_features_that_are_all_equal_leave_every_place_to_itself():
    """The official code gives NaN here: S is 1 everywhere and beta more."""
    eye = torch.eye(6).expand(2, 6, 6)
    assert torch.equal(window_affinity(torch.ones(2, 4, 2, 3), beta=1.2, gamma=3.0), eye)
    torch.testing.assert_close(
        window_affinity(torch.ones(2, 4, 2, 3), beta=1.0, gamma=3.0), torch.full((2, 6, 6), 1 / 6), rtol=1e-4, atol=1e-4
    )
    zeros = window_affinity(torch.zeros(1, 4, 2, 3), beta=1.2, gamma=3.0)  # no direction at all: 0 is kept
    torch.testing.assert_close(zeros, torch.full((1, 6, 6), 1 / 6))
    one = torch.ones(1, 4, 2, 3)
    one[0, :, 0, 0] = -1  # one place unlike all others keeps itself
    mixed = window_affinity(one, beta=1.2, gamma=3.0)
    assert mixed.isfinite().all() and mixed[0, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_without_sharpness_what_is_left_is_averaged():
    affinity = window_affinity(torch.randn(2, 8, 2, 3), beta=-100.0, gamma=0.0)
    torch.testing.assert_close(affinity, torch.full((2, 6, 6), 1 / 6))


def test_a_high_threshold_leaves_every_place_to_itself():
    """cos_factor so large that eps is 0.9, and no two values more alike."""
    torch.manual_seed(0)
    value = F.normalize(torch.randn(3, 12, 32), dim=-1)
    cosine, attention = value @ value.mT, torch.rand(3, 12, 12).softmax(-1)
    assert (cosine - 2 * torch.eye(12)).max() < 0.9
    eps = thresholds(cosine, 1e6)
    assert torch.equal(eps, torch.full((12,), 0.9))
    assert torch.equal(masked_affinity(attention, cosine, eps), torch.eye(12))


def test_no_row_over_the_picture_is_ever_empty():
    attention, value = torch.zeros(2, 5, 5), torch.zeros(2, 5, 4)  # no attention, no direction
    affinity = masked_affinity(attention, value @ value.mT, torch.full((5,), 0.9))
    assert torch.equal(affinity, torch.eye(5))
    some = masked_affinity(torch.full((2, 2, 5), 0.2), torch.zeros(2, 2, 5), torch.full((2,), 0.5), first=3)
    assert some.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_blocks_of_rows_change_nothing():
    torch.manual_seed(1)
    attention, value = torch.rand(2, 11, 11).softmax(-1), torch.randn(2, 11, 5)
    features = torch.randn(11, 6)
    every, by_three = (
        aggregate(given(attention, value, (1, 11)), features, cos_factor=1.2, block=block) for block in (64, 3)
    )
    torch.testing.assert_close(every, by_three)
    unit = F.normalize(value, dim=-1)
    naive = torch.zeros(11, 11)
    for i in range(11):
        cosines = [[float(unit[h, i] @ unit[h, j]) for j in range(11)] for h in range(2)]
        eps = min(1.2 * sum(map(sum, cosines)) / 22, 0.9)
        for h in range(2):
            for j in range(11):
                naive[i, j] += float(attention[h, i, j]) / 2 if cosines[h][j] > eps or i == j else 0
    torch.testing.assert_close(every, naive / naive.sum(1, keepdim=True) @ features, rtol=1e-4, atol=1e-5)
    affinity = aggregate(given(attention, value, (1, 11)), torch.eye(11), cos_factor=1.2)
    assert (affinity.diagonal() > 0).all() and (affinity == 0).any()
    torch.testing.assert_close(affinity.sum(1), torch.ones(11))


def test_regions_are_large_enough_and_come_in_order():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:3, 5:8] = mask[4:6, 0:3] = True
    mask[3, 4] = True  # diagonal to the first
    mask[0, 0] = True  # too small
    probability = torch.zeros(6, 8)
    probability[2, 6], probability[5, 1], probability[0, 1] = 0.7, 0.6, 0.9
    first, second = regions_of(mask, probability, least_area=2)
    assert first.point == (6, 2) and first.box == (4, 1, 7, 3) and int(first.mask.sum()) == 7
    assert second.point == (1, 5) and second.box == (0, 4, 2, 5)
    assert regions_of(mask, probability, least_area=7) and not regions_of(mask, probability, least_area=8)


class TestOutlines:
    def half(self) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = torch.full((2, 8, 8), 0.4)
        probabilities[0, :, :4] = probabilities[1, :, 4:] = 0.6
        return probabilities, probabilities.argmax(0)

    def looked(self, quality: tuple[float, float], logits: torch.Tensor) -> Looked:
        calls = iter(range(2))

        def answer(prompts):
            call = next(calls)
            assert len(prompts.points) == 1 and prompts.mask.max() <= 0.005
            return Masks(logits[call : call + 1], torch.tensor(quality[call : call + 1]))

        return Looked(given(torch.ones(1, 1, 1), torch.ones(1, 1, 1), (1, 1)), answer, 16)

    def test_a_mask_that_is_sure_moves_the_outline(self):
        probabilities, labels = self.half()
        logits = torch.full((2, 8, 8), -5.0)
        logits[0, :, :6], logits[1, :, 6:] = 3.0, 3.0
        found = refine(probabilities, labels, self.looked((0.9, 0.9), logits), Config(least_area=4))
        assert found.labels[0].tolist() == [0] * 6 + [1] * 2
        assert found.probabilities[0, 0, 5] == pytest.approx(0.4 * torch.tensor(3.0).sigmoid())

    def test_masks_that_are_not_sure_change_nothing(self):
        probabilities, labels = self.half()
        logits = torch.full((2, 8, 8), 3.0)
        found = refine(probabilities, labels, self.looked((0.8, 0.1), logits), Config(least_area=4))
        assert torch.equal(found.labels, labels) and torch.equal(found.probabilities, probabilities)

    def test_small_or_unlikely_regions_are_not_asked_for(self):
        probabilities, labels = self.half()

        def never(prompts):
            raise AssertionError

        looked = replace(self.looked((1, 1), torch.zeros(2, 8, 8)), answer=never)
        for config in (Config(least_area=9), Config(least_area=1, refine_threshold=0.7)):
            assert torch.equal(refine(probabilities, labels, looked, config).labels, labels)


# --- the whole ---

WORDS = Vocabulary(("a red circle", "a blue square", "green"))
PLAIN = Config(prompts="name", least_probability=0.0, least_area=4)


def at_once(attention: torch.Tensor, grid: tuple[int, int]):
    """Return a segmenter whose attention is given, all values alike, and that draws nothing."""
    value = torch.ones(1, grid[0] * grid[1], 2)
    return lambda image: Looked(given(attention[None], value, grid), lambda prompts: None, 16)


def test_affinity_to_oneself_alone_is_no_affinity(make_model):
    """The off-switch: W = I on the grid of the spliced features is what comes out without the segmenter."""
    model, image = make_model(), picture(32, 48)
    without = Adapter(replace(PLAIN, aggregate=False, refine=False), WORDS).fit(model).label(image)
    identity = at_once(torch.eye(24), (4, 6))
    inside = Adapter(replace(PLAIN, refine=False), WORDS, segmenter=identity).fit(model).label(image)
    torch.testing.assert_close(inside.probabilities, without.probabilities)
    assert without.labels.shape == (32, 48) and without.probabilities.shape == (3, 32, 48)
    even = at_once(torch.full((24, 24), 1 / 24), (4, 6))
    same = Adapter(replace(PLAIN, refine=False), WORDS, segmenter=even).fit(model).label(image)
    assert same.labels.unique().numel() == 1  # every place says the mean of all


def test_unguided_values_of_one_window_are_those_of_the_tower(make_model):
    """Everything off: each patch's own value through projection, norm and head, one window over the picture."""
    model, image = make_model(), picture(16, 16)
    config = replace(PLAIN, guided=False, aggregate=False, refine=False, crop=16, stride=16, short_side=16)
    found = Adapter(config, WORDS).fit(model).label(image)
    with torch.no_grad():
        vit = model.vision
        block = vit.transformer.blocks[-1]
        stream = vit.embed(model.pixels(image[None]))[:, 1:]
        own = vit.norm_after(block.attention.out(block.attention.value(block.norm_attention(stream))))
        patches = F.normalize(model.image_head.linear(own)[0], dim=-1)
        texts = model.encode_text(model.tokenizer(WORDS.labels))
        logits = (texts @ patches.T).view(1, 3, 2, 2)
        expected = (40 * F.interpolate(logits, (16, 16), mode="bilinear")[0]).softmax(0)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-5)
    windows = replace(config, splice="logits")
    torch.testing.assert_close(Adapter(windows, WORDS).fit(model).label(image).probabilities, expected)
    averaged = replace(config, guided=True, gamma=0.0, beta=-1e6)
    one = Adapter(averaged, WORDS).fit(model).label(image)
    assert one.probabilities.flatten(1).std(1).max() < 1e-6  # plain value-averaging: every place says the same


def test_ordinary_tokens_are_those_of_the_tower(make_model):
    model, image = make_model(), picture(16, 16)
    config = replace(PLAIN, tokens="ordinary", guided=False, aggregate=False, refine=False, crop=16, short_side=16)
    found = Adapter(config, WORDS).fit(model).label(image)
    with torch.no_grad():
        tokens = model.vision(model.pixels(image[None])).tokens
        logits = model.encode_text(model.tokenizer(WORDS.labels)) @ F.normalize(
            model.image_head.linear(tokens)[0].T, dim=0
        )
        expected = (40 * F.interpolate(logits.view(1, 3, 2, 2), (16, 16), mode="bilinear")[0]).softmax(0)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-5)


def test_the_order_of_labels_is_only_their_number(make_model):
    model, image = make_model(), picture(32, 40)
    order = [2, 0, 1]
    turned = Vocabulary(tuple(WORDS.labels[i] for i in order))
    plain, other = (Adapter(PLAIN, words).fit(model).label(image) for words in (WORDS, turned))
    torch.testing.assert_close(plain.probabilities[order], other.probabilities)
    background = Adapter(replace(PLAIN, least_probability=1.0), replace(WORDS, background=("sky", "wall"))).fit(model)
    assert not background.label(image).labels.any() and background.vocabulary.classes[0] == "background"


def test_a_picture_of_one_colour_and_an_extreme_one(make_model):
    labeller = Adapter(PLAIN, WORDS).fit(make_model())
    for image in (torch.full((3, 20, 30), 128, dtype=torch.uint8), picture(5, 90), picture(1, 1)):
        found = labeller.label(image)
        assert found.labels.shape == image.shape[1:] and found.probabilities.isfinite().all()


@pytest.mark.parametrize("number", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_labels_nearly_everywhere(number, monkeypatch):
    """The official code runs in fp16, ours can in bf16; of a model that knows what it sees, fewer than 1 % of the labels change."""
    monkeypatch.setattr(
        "diptych.models.embedding.autocast",
        lambda chosen, device: torch.autocast(device.type, number, enabled=chosen == "bf16"),
    )
    words = Vocabulary(tuple(NOUNS[:6]), ("ground", "sky"))
    drawn = scenes("test", count=2, config=SceneConfig(128, nouns=6, things=(2, 3), copies=1, tint_rate=0))
    model = load("mini", offline=True)
    whole, half = (
        Adapter(replace(mini(), refine=False, least_probability=0.0, precision=precision), words).fit(model)
        for precision in ("fp32", "bf16")
    )
    pairs = [[each.label(to_tensor(decode(scene.image))) for each in (whole, half)] for scene in drawn]
    labels = torch.cat([one.labels.flatten() for one, _ in pairs])
    same = torch.cat([(one.labels == other.labels).flatten() for one, other in pairs])
    assert same.float().mean() > 0.99 and labels.unique().numel() > 2
    assert not torch.equal(pairs[0][0].probabilities, pairs[0][1].probabilities)


def test_settings_follow_the_size_of_the_model(make_model):
    labeller = Adapter(PLAIN, WORDS).fit(make_model())
    assert (labeller.patch, labeller.crop, labeller.stride, labeller.short_side) == (8, 24, 16, 32)


@pytest.mark.parametrize("pool", ["attention", "efficientnet"])
def test_other_kinds_of_towers(make_model, pool):
    from diptych.models.foreign import TimmConfig, TimmTower
    from diptych.models.heads import LinearHead, LinearHeadConfig

    model, image = make_model(), picture(64, 80)
    torch.manual_seed(0)
    if pool == "attention":
        model.vision = VisionTransformer(
            VisionConfig(image_size=16, width=16, depth=1, heads=2, mlp_width=24, pool=pool, norm_before=False)
        )
    else:
        model.vision = TimmTower(TimmConfig("tf_efficientnet_lite0"))
        model.image_head = LinearHead(model.vision.width, LinearHeadConfig(8))
        model.config = replace(model.config, image_policy=replace(model.image_policy, size=64))
        with pytest.raises(ConfigError, match="needs the attention of a vision transformer"):
            Adapter(replace(PLAIN, tokens="values"), WORDS).fit(model)
    labeller = Adapter(PLAIN, WORDS).fit(model)
    assert labeller.tokens == ("values" if pool == "attention" else "ordinary")
    found = labeller.label(image)
    assert found.labels.shape == (64, 80) and found.probabilities.isfinite().all()


@pytest.mark.parametrize(("to", "prefix"), [("open_clip", "open_clip"), ("hf", "hf")])
def test_models_of_other_libraries_say_the_same(make_model, tmp_path, to, prefix):
    model, image = make_model(), picture(32, 40)
    convert(model, tmp_path / "theirs", to)
    theirs = load(f"{prefix}:{tmp_path / 'theirs'}", offline=True)
    config = replace(PLAIN, refine=False, scale=1.0)
    said = [Adapter(config, WORDS).fit(one).label(image).probabilities for one in (model, theirs)]
    torch.testing.assert_close(*said, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3])
def test_finer_and_coarser_features_than_patches(make_model, factor):
    """Values are resized to the features' grid; the result is spliced on a whole number of places per patch."""
    model, image = make_model(), picture(32, 32)

    def finer(images):
        return F.interpolate(tower_features(model)(images), scale_factor=factor, mode="bilinear")

    labeller = Adapter(replace(PLAIN, refine=False, aggregate=False), WORDS, features=finer).fit(model)
    window = image[None, :, :24, :24]
    maps = labeller._see(window)
    assert maps.shape == (1, 16, 3 * factor, 3 * factor) and labeller.label(image).labels.shape == (32, 32)
    odd = Adapter(
        PLAIN, WORDS, features=lambda images: F.interpolate(tower_features(model)(images), (4, 4), mode="bilinear")
    )
    assert odd.fit(model)._see(window).shape == (1, 16, 3, 3)


def test_what_cannot_be_segmented(make_model):
    model = make_model()
    labeller = Adapter(PLAIN, WORDS).fit(model)
    with pytest.raises(ConfigError, match="one at a time"):
        labeller(batch(picture(), picture(seed=1)))
    assert torch.equal(labeller(batch(picture())).labels, labeller.label(picture()).labels)
    broken = Adapter(
        replace(PLAIN, aggregate=False), WORDS, features=lambda x: torch.full((len(x), 2, 3, 3), torch.nan)
    )
    with pytest.raises(EvaluationError, match="not finite"):
        broken.fit(model).label(picture())


@pytest.mark.parametrize(
    ("labels", "background", "complaint"),
    [
        ((), ("sky",), "needs labels"),
        (("cat",), (), "at least two words"),
        (("cat", " "), (), "none may be empty"),
        (("cat", "sky"), ("sky",), "must differ"),
    ],
)
def test_bad_words(labels, background, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Vocabulary(labels, background)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"splice": "logits"}, "needs aggregate=False"),
        ({"least_probability": 1.5}, "in \\[0, 1\\]"),
        ({"gamma": -1.0}, "gamma >= 0"),
        ({"least_area": 0}, "least_area >= 1"),
    ],
)
def test_bad_settings(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Config(**changes)


def test_windows_that_leave_places_out_are_refused(make_model):
    with pytest.raises(ConfigError, match="stride <= side"):
        Adapter(replace(PLAIN, crop=16, stride=32), WORDS).fit(make_model()).label(picture(64, 64))


def test_the_papers_values_are_the_defaults():
    config = Config()
    assert (config.beta, config.gamma, config.cos_factor, config.most, config.scale) == (1.2, 3.0, 1.2, 0.9, 40.0)
    assert (config.least_area, config.least_quality, config.mask_factor, config.negative) == (225, 0.8, 0.005, None)
    assert len(PRESETS) == 8 and all(replace(config, **changes) for changes in PRESETS.values())
    assert PRESETS["ade20k"]["negative"] == PRESETS["cityscapes"]["negative"] == 0.6


class TestClaims:
    def test_they_are_well_formed(self):
        found = claim()
        assert [one.name for one in found] == ["scenes", "loaded"]
        check(found, "trident")

    def test_the_control_is_judged(self):
        for one in claim():
            assert one.control.passed({"baseline": [0.3], "method": [0.4], "control": [0.05, 0.09]})
            assert not one.control.passed({"baseline": [0.3], "method": [0.4], "control": [0.05, 0.2]})

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["scenes", "loaded"])
    def test_every_arm_runs(self, name, monkeypatch):
        from diptych.claims.train import train_quietly

        monkeypatch.setattr(drawn_things, "TRAINED", 96)
        monkeypatch.setattr(drawn_things, "TESTED", 3)
        for drawn in (drawn_things.captioned_things, drawn_things.larger_scenes):
            drawn.cache_clear()
        (one,) = (one for one in claim() if one.name == name)
        trained, noted = [], []

        def train(settings, source, *, shared):
            assert shared
            settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=48))
            if not trained:
                trained.append((settings, source, train_quietly(settings, source, load_method("clip"), seed=0)[0]))
            assert (settings, source) == trained[0][:2]  # so all arms can share one model
            return trained[0][2]

        for arm in one.arms:
            trial = Trial(
                0,
                "validation",
                arm.grid[0],
                lambda slug: load_method(slug).mini(),
                train,
                note=lambda *said: noted.append(said),
            )
            assert 0 <= arm.run(trial) <= 1
        assert len(noted) == 3 * len(one.arms)
        assert {name for name, _ in noted} == {"miou", "foreground_miou", "pixel_accuracy"}
        for drawn in (drawn_things.captioned_things, drawn_things.larger_scenes):
            drawn.cache_clear()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trident.py"), run_name="__main__")
    assert "with outlines: mIoU" in capsys.readouterr().out
    assert (tmp_path / "runs" / "trident.html").read_text().count("data:image/webp") == 24
