import json
import math
import runpy
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.data.sources import Listed
from diptych.data.text_changes import stop_words
from diptych.data.words import whole_words
from diptych.errors import ConfigError, DataError, TrainingError
from diptych.methods.c_pgc import (
    Attack,
    Config,
    Generator,
    Partners,
    WordLearner,
    _batches,
    attack_loss,
    augmented,
    farthest,
    inverted_contrast,
    word_loss,
    word_vector,
)
from diptych.models.build import build
from diptych.models.foreign import HFTextConfig
from diptych.models.perturbation import load_perturbation
from diptych.models.text import AbstractTextTower

CLOSE = {"rtol": 1e-8, "atol": 1e-12}
TINY = Config(
    steps=3, batch_size=3, captions=2, lr=1e-2, filters=((32,), (8,)), z_dim=4, scales=(0.5,), scale_noise=0.01
)
ATTENTION = {
    "norm": "norm",
    "project_in": "proj_in",
    "project_out": "proj_out",
    "norm_attention": "transformer_blocks.0.norm1",
    "norm_mlp": "transformer_blocks.0.norm3",
    "query": "transformer_blocks.0.attn1.to_q",
    "key": "transformer_blocks.0.attn1.to_k",
    "value": "transformer_blocks.0.attn1.to_v",
    "out": "transformer_blocks.0.attn1.to_out.0",
    "condition_value": "transformer_blocks.0.attn2.to_v",
    "condition_out": "transformer_blocks.0.attn2.to_out.0",
    "gated": "transformer_blocks.0.ff.net.0.proj",
    "mlp_out": "transformer_blocks.0.ff.net.2",
}
NAMES = {
    "groups.0.0": "hidden_layer.model1.deconv1",
    "groups.0.1": "hidden_layer.model1.bn2",
    "groups.1.0": "hidden_layer.model2.deconv4",
    "groups.1.1": "hidden_layer.model2.bn5",
    "out": "output_layer.out",
    "merge": "residual_layer.res",
    **{f"attention.0.{ours}": f"hidden_layer.cross attention1.{theirs}" for ours, theirs in ATTENTION.items()},
}


def official(numbers: dict[str, np.ndarray], condition_dim: int, **options: int) -> Generator:
    """Return the generator of the official numbers, in float64."""
    count, z_dim = numbers["z"].shape[:2]
    generator = Generator(z_dim, ((32,), (8,)), count, condition_dim, **options).double()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            module, _, kind = name.rpartition(".")
            parameter.copy_(torch.from_numpy(numbers[f"param.{NAMES[module]}.{kind}"].astype(np.float64)))
    return generator


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


@pytest.mark.data
@pytest.mark.parametrize("case", ["loss_image", "loss_image_aligned", "loss_image_balanced"])
def test_official_image_losses(golden, case):
    numbers = {name: tensor(value) for name, value in golden("c_pgc", case).items() if name != "settings"}
    leaves = [numbers[name].requires_grad_() for name in ("adv", "matched", "targets")]
    adversarial, matched, targets = leaves
    is_own = torch.arange(len(adversarial))[:, None] == numbers["owner"]
    chosen = farthest(numbers["clean"], targets, numbers["target_group"])
    loss = inverted_contrast(adversarial, matched, is_own, targets, chosen)
    loss.backward()
    torch.testing.assert_close(loss.detach(), numbers["loss"], **CLOSE)
    for leaf, name in zip(leaves, ("grad_adv", "grad_matched", "grad_targets"), strict=True):
        torch.testing.assert_close(leaf.grad, numbers[name], **CLOSE)


@pytest.mark.data
def test_official_text_loss(golden):
    numbers = {name: tensor(value) for name, value in golden("c_pgc", "loss_text").items() if name != "settings"}
    adversarial, targets = numbers["adv"].requires_grad_(), numbers["targets"]
    is_own = numbers["matched_image_of_text"][:, None] == torch.arange(len(numbers["images"]))
    chosen = farthest(adversarial, targets, torch.arange(len(targets)))
    loss = inverted_contrast(adversarial, numbers["images"], is_own, targets, chosen)
    loss.backward()
    torch.testing.assert_close(loss.detach(), numbers["loss"], **CLOSE)
    torch.testing.assert_close(adversarial.grad, numbers["grad_adv"], **CLOSE)


@pytest.mark.data
def test_official_generator(golden):
    numbers = golden("c_pgc", "generator")
    condition = tensor(numbers["cond"]).requires_grad_()
    noise = official(numbers, 7)(tensor(numbers["z"]), condition)
    (noise * tensor(numbers["cotangent"])).sum().backward()
    torch.testing.assert_close(noise.detach(), tensor(numbers["out"]), **CLOSE)
    torch.testing.assert_close(condition.grad, tensor(numbers["grad_cond"]), **CLOSE)


@pytest.mark.data
def test_two_official_steps(golden):
    numbers = golden("c_pgc", "image_steps")
    settings = json.loads(str(numbers["settings"]))
    config = Config(lr=settings["lr"], temperature=settings["tau"], distance_weight=settings["alpha"], scales=())
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    weight = tensor(numbers["surrogate_W"])

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        blocks = F.avg_pool2d((pixels - mean) / std, 4).flatten(1)
        return F.normalize(blocks @ weight.T, dim=-1)

    generator = official(numbers, 6)
    optimizer = torch.optim.Adam(generator.parameters(), config.lr, betas=(0.5, 0.999))
    eps = config.eps / 255
    for step in range(2):
        own, targets = (tensor(numbers[name][step]) for name in ("text_features", "target_text_features"))
        owner = torch.arange(2).repeat_interleave(5)
        partners = Partners(own, torch.arange(2)[:, None] == owner, targets, torch.arange(3).repeat_interleave(5))
        condition = own.unflatten(0, (2, 5)).mean(1).repeat(5, 1)
        delta = generator(tensor(numbers["z"]), condition).clamp(-eps, eps)
        torch.testing.assert_close(delta.detach()[0], tensor(numbers["delta"][step]), rtol=1e-6, atol=1e-9)
        images = tensor(numbers["augmented_images"][step])
        parts = {
            name: attack_loss(embed, [images], delta, partners, replace(config, **weights)).item()
            for name, weights in (
                ("loss_cl", {"distance_weight": 0.0}),
                ("distance_sum", {"contrast_weight": 0.0, "distance_weight": -1.0}),
            )
        }
        for name, value in parts.items():
            assert value == pytest.approx(numbers[name][step], rel=1e-6)
        loss = attack_loss(embed, [images], delta, partners, config)
        assert loss.item() == pytest.approx(numbers["loss"][step], rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(
        generator.merge.weight.detach(), tensor(numbers["after_merge_weight"]), rtol=1e-6, atol=1e-9
    )


@pytest.mark.data
def test_official_steps_of_the_text_side(golden):
    numbers = golden("c_pgc", "text_steps")
    settings = json.loads(str(numbers["settings"]))
    config = Config(lr=settings["lr"], temperature=settings["tau"], distance_weight=settings["alpha"])
    vocabulary = {word: row for row, word in enumerate(numbers["vocabulary"].tolist())}
    table, head, weight = (tensor(numbers[name]) for name in ("token_table", "W_txt", "position_weight"))

    def embed(texts: list[str], places: np.ndarray, vector: torch.Tensor | None = None) -> torch.Tensor:
        found = []
        for text, place in zip(texts, places, strict=True):
            rows = table[[settings["bos"], *(vocabulary[word] for word in text.split())]]
            if vector is not None:
                rows = torch.where(torch.arange(len(rows))[:, None] == place, vector, rows)
            found.append(head @ (rows * weight[: len(rows), None]).mean(0))
        return F.normalize(torch.stack(found), dim=-1)

    generator = official(numbers, settings["context_dim"], channels=settings["n_words"], first=1)
    optimizer = torch.optim.Adam(generator.parameters(), config.lr, betas=(0.5, 0.999))
    for step in range(settings["steps"]):
        images, targets = (tensor(numbers[name][step]) for name in ("image_features", "target_image_features"))
        texts, places = numbers["texts"][step].tolist(), numbers["replaced_token_index"][step, :, 0]
        partners = Partners(images, torch.ones(len(texts), 1, dtype=torch.bool), targets, torch.arange(len(targets)))
        made = generator(tensor(numbers["z"]), images.repeat_interleave(len(texts), 0))
        vector = word_vector(made, table.shape[1], settings["min_norm"], settings["max_norm"])
        torch.testing.assert_close(vector.detach(), tensor(numbers["embedding"][step, 0]), rtol=1e-6, atol=1e-9)
        sides = embed(texts, places, vector), embed(texts, places)
        parts = {"loss_cl": replace(config, distance_weight=0.0)}
        parts["distance_sum"] = replace(config, contrast_weight=0.0, distance_weight=-1.0)
        for name, alone in parts.items():
            assert word_loss(*sides, partners, alone).item() == pytest.approx(numbers[name][step], rel=1e-6)
        loss = word_loss(*sides, partners, config)
        assert loss.item() == pytest.approx(numbers["loss"][step], rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(
        generator.merge.weight.detach(), tensor(numbers["after_merge_weight"]), rtol=1e-6, atol=1e-9
    )


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)


def test_equal_masses_give_log_one_half_and_the_loss_stays_below_0():
    one = unit([1.0, 0.0])
    yes = torch.ones(1, 1, dtype=torch.bool)
    assert inverted_contrast(one, one, yes, one, yes).item() == pytest.approx(math.log(0.5))
    aligned = inverted_contrast(one, one, yes, -one, yes)
    assert -1e-8 < aligned.item() <= 0
    assert inverted_contrast(one, -one, yes, one, yes).item() == pytest.approx(-20, rel=1e-6)


def test_the_loss_pushes_partners_away_and_pulls_targets_near():
    adversarial = unit([1.0, 0.2])
    own, targets = unit([0.8, 0.6]).requires_grad_(), unit([-0.5, 1.0]).requires_grad_()
    yes = torch.ones(1, 1, dtype=torch.bool)
    inverted_contrast(adversarial, own, yes, targets, yes).backward()
    assert (own.grad * adversarial).sum() > 0  # a larger cosine with what belongs to it is a larger loss
    assert (targets.grad * adversarial).sum() < 0


def test_the_naive_ratio_of_sums_is_the_loss():
    generator = torch.Generator().manual_seed(0)
    adversarial, own, targets = (
        F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1) for n in (3, 6, 8)
    )
    owner, group = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    kept = gained = 0.0
    for row in range(3):
        means = [np.mean([float(adversarial[row] @ targets[j]) for j in range(8) if group[j] == g]) for g in range(4)]
        away = int(np.argmin(means))
        kept += sum(math.exp(float(adversarial[row] @ own[j]) / 0.1) for j in range(6) if owner[j] == row)
        gained += sum(math.exp(float(adversarial[row] @ targets[j]) / 0.1) for j in range(8) if group[j] == away)
    found = inverted_contrast(
        adversarial, own, torch.arange(3)[:, None] == owner, targets, farthest(adversarial, targets, group)
    )
    assert found.item() == pytest.approx(math.log(kept / (kept + gained)))


def test_the_distance_of_orthogonal_embeddings_is_minus_2_each():
    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(pixels.mean((2, 3)), dim=-1)

    copies = [torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(2, 3, 4, 4)]
    delta = torch.tensor([-1.0, 1.0, 0.0])[:, None, None].expand(1, 3, 4, 4)
    partners = Partners(torch.eye(3)[:2], torch.eye(2, dtype=torch.bool), torch.eye(3)[:2], torch.arange(2))
    config = replace(TINY, contrast_weight=0.0, distance_weight=1.0)
    assert attack_loss(embed, copies, delta, partners, config).item() == pytest.approx(-4)


def test_a_new_generator_does_not_look_at_its_condition_and_a_moved_one_does():
    torch.manual_seed(0)
    generator = Generator(4, ((32,), (8,)), 6, 5)
    z, first, second = torch.randn(6, 4, 1, 1), torch.randn(6, 5), torch.randn(6, 5)
    assert generator(z, first).shape == (1, 3, 16, 16)
    assert torch.equal(generator(z, first), generator(z, second))
    with torch.no_grad():
        generator.attention[0].project_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert (generator(z, first) - generator(z, second)).abs().max() > 1e-3


def test_the_condition_is_what_cross_attention_to_one_token_gives():
    """The softmax over one key is 1, whatever query and key are."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 9, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    found = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, value.expand(2, 9, 8))


def test_copies_stay_in_range_and_of_one_size():
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16)
    copies = augmented(pixels, replace(TINY, scales=(0.5, 1.5)))
    assert [copy.shape for copy in copies] == [pixels.shape] * 3
    assert all(0 <= copy.min() and copy.max() <= 1 for copy in copies)
    assert (copies[0] - pixels).abs().max() <= 12 / 255 + 1e-6
    assert torch.equal(augmented(pixels, replace(TINY, eps=0, scales=()))[0], pixels)


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"steps": 0}, {"batch_size": 1}, {"temperature": 0.0}, {"captions": 0}):
        with pytest.raises(ConfigError, match="c_pgc needs"):
            replace(TINY, **wrong)
    for filters in ((), ((),), ((48,), (8,))):
        with pytest.raises(ConfigError, match="multiple of 32"):
            replace(TINY, filters=filters)
    with pytest.raises(ConfigError, match="8/255 is 8"):
        replace(TINY, eps=12 / 255)


def test_what_cannot_be_attacked_is_said(make_model, drawings):
    with pytest.raises(DataError):
        Attack(TINY).fit(make_model(), Listed([], "nothing"))
    with pytest.raises(TrainingError, match="at step"):
        Attack(replace(TINY, lr=1e30)).fit(make_model(), drawings(6))


def test_some_steps_lower_the_loss_of_a_linear_model():
    """White images, whose embedding is the direction of their mean colour: a noise within eps can turn it, and finds out how."""

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(pixels.mean((2, 3)) - 0.95, dim=-1)

    torch.manual_seed(0)
    partners = Partners(torch.eye(3)[:1], torch.ones(1, 1, dtype=torch.bool), torch.eye(3)[1:2], torch.tensor([0]))
    generator, condition, z = Generator(4, ((32,), (8,)), 2, 3), torch.ones(2, 3), torch.randn(2, 4, 1, 1)
    optimizer = torch.optim.Adam(generator.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        delta = generator(z, condition).clamp(-12 / 255, 12 / 255)
        loss = attack_loss(embed, [torch.ones(1, 3, 16, 16)], delta, partners, TINY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(0.5), abs=0.2)  # equally far from both captions
    assert losses[-1] < losses[0] - 0.5


def test_a_word_keeps_its_length_within_those_of_words():
    made = torch.tensor([3.0, 4, 0, 7]).view(1, 1, 2, 2)
    assert word_vector(made, 2, 1, 9).tolist() == [3, 4]  # what is too many is cut off
    torch.testing.assert_close(word_vector(made, 2, 1, 2), torch.tensor([1.2, 1.6]))
    torch.testing.assert_close(word_vector(made, 2, 10, 20), torch.tensor([6.0, 8.0]))


WORDY = replace(TINY, word=True, word_filters=((32,), (8,)), word_z_dim=4)


def test_the_word_leaves_the_noise_as_it_is_to_the_last_bit(make_model, drawings):
    model, source = make_model(texts=[sample.texts[0].text for sample in drawings(12)]), drawings(12)
    alone, pair = (Attack(config).fit(model, source) for config in (TINY, WORDY))
    assert torch.equal(alone.delta, pair.delta)
    assert alone.word is None and pair.word is not None
    assert Attack(replace(WORDY, eps=0)).fit(model, source).word == pair.word


def test_the_word_is_one_of_the_model_and_no_stop_word(make_model, drawings):
    model = make_model(texts=["the blue circle of the square", "the and of with"] * 4)
    assert {"the", "of", "and"} <= set(whole_words(model.tokenizer).values())
    config = replace(WORDY, eps=0, steps=1)
    learner = WordLearner(model, drawings(6), 6, config)
    assert not set(learner.words.values()) & stop_words("en")
    assert Attack(config).fit(model, drawings(6)).word.word in learner.words.values()


def test_learning_changes_the_embedding_that_becomes_the_word(make_model, drawings):
    """It is that before the last step, so that one step takes what the first weights make."""
    model, source = make_model(), drawings(6)
    config = replace(WORDY, eps=0, lr=1e-2)
    learner = WordLearner(model, source, 6, config)
    loaders = [_batches(model, source, config, seed=seed) for seed in (0, 1)]
    made = [learner.step(*pair, 0) for pair in islice(zip(*loaders, strict=True), 3)]
    assert learner.table.shape[1:] == made[0].shape
    shortest, longest = learner.table.norm(dim=1).aminmax()
    for before, after in pairwise(made):
        assert not torch.equal(before, after)
        assert shortest - 1e-5 <= after.norm() <= longest + 1e-5
    row = 3
    assert learner.nearest(learner.table[row] + 1e-4).word == [*learner.words.values()][row]


def test_some_steps_lower_the_loss_of_a_linear_text_side():
    """A word's vector is the whole text; its image is one way and the other image another way, and the word turns round."""
    torch.manual_seed(0)
    partners = Partners(torch.eye(16)[:1], torch.ones(1, 1, dtype=torch.bool), torch.eye(16)[1:2], torch.tensor([0]))
    generator = Generator(4, ((32,), (8,)), 2, 3, channels=1, first=1)
    z, condition, clean = torch.randn(2, 4, 1, 1), torch.ones(2, 3), torch.eye(16)[:1]
    optimizer = torch.optim.Adam(generator.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        adversarial = F.normalize(word_vector(generator(z, condition), 16, 0.5, 2.0)[None], dim=1)
        loss = word_loss(adversarial, clean, partners, replace(TINY, distance_weight=0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2  # cosines change by 0.2 at least, at a temperature of 0.1


def test_a_text_tower_of_transformers_learns_a_word(make_model, drawings, tmp_path):
    from transformers import BertConfig

    ours = make_model()
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertConfig(vocab_size=300, max_position_embeddings=16, **sizes).save_pretrained(tmp_path)
    theirs = build(replace(ours.config, text=HFTextConfig(str(tmp_path))), ours.tokenizer)
    found = Attack(replace(WORDY, eps=0)).fit(theirs, drawings(6))  # 24 is not 16 times a whole number: cut
    assert found.word.word in whole_words(ours.tokenizer).values()


def test_without_words_or_their_embeddings_a_word_cannot_be_learnt(make_model, drawings):
    class Opaque(AbstractTextTower):
        by_row, width = False, 16

        def __init__(self, tower: AbstractTextTower) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, ids, mask):
            return self.tower(ids, mask)

    model = make_model()
    model.text = Opaque(model.text)
    with pytest.raises(ConfigError, match="Opaque has no token_embeddings"):
        Attack(WORDY).fit(model, drawings(6))
    assert Attack(TINY).fit(model, drawings(6)).word is None
    with pytest.raises(ConfigError, match="no stop words for the language 'tlh'"):
        replace(WORDY, language="tlh")


@pytest.mark.slow
def test_the_example_runs(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "c_pgc.py"))
    example["main"](tmp_path / "pair.safetensors", steps=2, count=24)
    pair, said = load_perturbation(tmp_path / "pair.safetensors"), capsys.readouterr().out
    assert pair.delta.shape == (3, 64, 64) and f"The word is {pair.word.word!r}" in said
    for name in ("shuffled", "word", "noise and word"):
        assert f"{name:14} text_to_image/recall@1: lost" in said
