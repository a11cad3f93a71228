"""Training of the generator: determinism, resume, frozen parts, EMA, accumulation, activation norms."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_cases import Images, fit, module
from lightning.pytorch import Callback

from callbacks.activation_norms import ActivationNorms
from callbacks.ema import ExponentialMovingAverage
from lightning_modules.optimization import parameter_groups
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.text.base import TextEmbedding


def test_same_seed_same_losses_to_the_last_bit(tmp_path: Path) -> None:
    first = fit(module(), tmp_path / "a")
    second = fit(module(), tmp_path / "b")
    assert first.losses == second.losses
    assert len(set(first.losses)) == 6


def test_variants_share_batches_and_initial_weights(tmp_path: Path) -> None:
    built = {v: module(visibility=v) for v in ("causal", "non_causal")}
    for variant in built.values():
        variant.configure_model()
    states = [copy.deepcopy(variant.generator.state_dict()) for variant in built.values()]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    watched = [fit(variant, tmp_path / name) for name, variant in built.items()]
    assert watched[0].keys == watched[1].keys
    # Gates start near zero, so the variants part slowly, but they do.
    assert watched[0].losses != watched[1].losses


def test_resume_repeats_and_skips_nothing(tmp_path: Path) -> None:
    full, ema = module(), ExponentialMovingAverage(0.9)
    uninterrupted = fit(full, tmp_path / "full", callbacks=(ema,))
    first = fit(module(), tmp_path / "parts", stop_after=3, callbacks=(ExponentialMovingAverage(0.9),))
    resumed = module()
    checkpoint = tmp_path / "parts" / "checkpoints" / "step_000003.ckpt"
    second = fit(resumed, tmp_path / "parts", resume=checkpoint, callbacks=(ExponentialMovingAverage(0.9),))
    assert first.losses + second.losses == uninterrupted.losses
    assert first.keys + second.keys == uninterrupted.keys
    expected, actual = full.state_dict(), resumed.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_frozen_tokenizer_is_neither_saved_nor_trained(tmp_path: Path) -> None:
    built = module()
    before = copy.deepcopy(built.tokenizer.state_dict())
    fit(built, tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in content["state_dict"]} == {"generator", "ema_generator"}
    after = built.tokenizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    trained = {id(p) for group in built.optimizers().param_groups for p in group["params"]}
    assert not trained & {id(p) for p in built.tokenizer.parameters()}
    assert not trained & {id(p) for p in built.ema_generator.parameters()}


def test_ema_equals_its_definition(tmp_path: Path) -> None:
    built = module(steps=4)
    history: list[torch.Tensor] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            history.append(pl_module.generator.head.weight.detach().double().clone())

    built.configure_model()
    expected = built.generator.head.weight.detach().double().clone()
    fit(built, tmp_path, callbacks=(Note(), ExponentialMovingAverage(0.5)))
    for step, weight in enumerate(history, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(built.ema_generator.head.weight.double(), expected, rtol=0, atol=1e-6)


def test_accumulated_batches_equal_one_batch(tmp_path: Path) -> None:
    full, parts = module(steps=3), module(steps=3, accumulate=2)
    fit(full, tmp_path / "full", batch=8)
    fit(parts, tmp_path / "parts", batch=4)
    for (name, a), b in zip(full.generator.named_parameters(), parts.generator.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)


def test_training_step_is_the_mean_cross_entropy_of_all_tokens(tmp_path: Path) -> None:
    built = module()
    built.configure_model()
    batch = torch.utils.data.default_collate([Images(2).sample(i) for i in range(2)])
    losses, tokens = built.compute_losses(batch, built.generator, 0.0, correct=True)
    conditions = [batch[name] for name in ("text", "text_mask", "pooled", "crop")]
    logits = built.generator(built.tokenizer.teacher_forcing(tokens), *conditions)
    expected = -logits.double().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(losses.tokens_BL.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.mean.double(), expected.mean(), rtol=0, atol=1e-5)
    assert torch.equal(losses.correct_BL, logits.argmax(dim=-1) == tokens)
    again = built.tokenizer.tokenize(batch["image"])
    assert torch.equal(tokens, again)


def test_norms_are_those_of_the_block_outputs(tmp_path: Path) -> None:
    built = module(steps=2)
    seen: list[torch.Tensor] = []

    class Hook(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.generator.blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out.detach()))

    fit(built, tmp_path, callbacks=(Hook(), ActivationNorms(every=2)))
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    values = {row[2]: float(row[3]) for row in rows if row[2].startswith("norms/")}
    norms = seen[1].norm(dim=-1)  # the second step; validation has not run yet
    assert values["norms/last/mean"] == pytest.approx(norms.mean().item(), rel=1e-5)
    assert values["norms/last/max"] == pytest.approx(norms.max().item(), rel=1e-5)
    assert {"norms/block_0/mean", "norms/block_1/max"} <= set(values)


def test_only_matrices_decay() -> None:
    built = ScaleTransformer(module().model_config)
    names = {id(p): name for name, p in built.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in parameter_groups(built, 0.1))
    assert "blocks.0.attn.to_qkv.weight" in decayed and "head.weight" in decayed
    assert all(name.endswith("weight") for name in decayed)
    for name in ("blocks.0.ffn_norm1.weight", "blocks.0.crop_cond_scales", "pos_start", "lvl_embed.weight"):
        assert name in others
    assert "crop_embed.weight" not in decayed + others


def test_generate_is_repeatable_and_leaves_training_as_it_was() -> None:
    built = module(ema=False)
    built.configure_model()
    built.train()
    generator = torch.Generator().manual_seed(0)
    text = TextEmbedding(
        torch.randn(2, 5, 12, generator=generator),
        torch.ones(2, 5, dtype=torch.bool),
        torch.randn(2, 10, generator=generator),
    )
    state = torch.random.get_rng_state()
    images = [built.generate(text, text[[0]], [1, 2], SamplingConfig(top_k=8)) for _ in range(2)]
    assert torch.equal(images[0], images[1])
    assert images[0].shape == (2, 3, 8, 8) and images[0].min() >= 0 and images[0].max() <= 1
    assert built.generator.training
    assert torch.equal(state, torch.random.get_rng_state())
