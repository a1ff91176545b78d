"""The recipes against the papers, and how settings are changed."""

import math

import pytest

from minidvae.models import MODELS
from minidvae.training.config import PAPER_RECIPES, RECIPES, SettingError
from minidvae.training.run import resolve

OURS = ("quick", "cpu_hour", "smoke")  # the other recipes are the papers'


def test_light2023_is_the_papers():
    """Lin et al. 2023, sections 2.3, 3.1 and 3.2."""
    recipe, config = resolve("light_dvae", "light2023", {})
    assert (recipe.window, recipe.hop, recipe.frames, recipe.trim) == (1024, 256, 150, True)
    assert (recipe.optimiser, recipe.betas, recipe.epsilon, recipe.weight_decay) == (
        "adamw",
        (0.9, 0.99),
        1e-9,
        1e-5,
    )
    assert recipe.steps == 25_000 and recipe.scheduled_sampling == (0.0, 0.0) and recipe.clip == 0
    assert recipe.learning_rate_at(0) == pytest.approx(5e-5 / 5_000)
    assert recipe.learning_rate_at(2_499) == pytest.approx(2.5e-5)
    assert recipe.learning_rate_at(5_000) == pytest.approx(5e-5)
    assert recipe.learning_rate_at(15_000) == pytest.approx((5e-5 + 1e-8) / 2)
    assert recipe.learning_rate_at(25_000) == pytest.approx(1e-8)
    paper = {
        "bins": 513,
        "latent": 16,
        "w_latent": 32,
        "width": 256,
        "heads": 1,
        "feedforward": 1024,
        "layers": 4,
    }
    paper |= {
        "beta_z": 0.01,
        "beta_w": 0.01,
        "input_scale": "power",
        "z_log_variance": 0.0,
        "variant": "plain",
    }
    assert {key: config[key] for key in paper} == paper
    for model in RECIPES["light2023"].models:
        assert resolve(model, "light2023", {})[1]["beta_z"] == 0.01
        assert resolve(model, "light2023", {})[1]["input_scale"] == "power"


def test_benchmark2021_is_the_papers():
    """Bie et al. 2021, section 4."""
    for model in RECIPES["benchmark2021"].models:
        recipe, config = resolve(model, "benchmark2021", {})
        assert (recipe.window, recipe.hop, recipe.frames, recipe.batch) == (512, 256, 150, 32)
        assert (recipe.optimiser, recipe.learning_rate_at(10**6), recipe.patience) == (
            "adam",
            1e-4,
            20,
        )
        assert (config["bins"], config["latent"], config["beta_z"], config["input_scale"]) == (
            257,
            16,
            1.0,
            "power",
        )


def test_the_papers_use_neither_muon_nor_augmentation():
    for name, recipe in RECIPES.items():
        for model in recipe.models:
            settings, config = resolve(model, name, {})
            if name not in OURS:
                assert settings.optimiser != "muon" and (
                    settings.speed,
                    settings.gain,
                    settings.equaliser,
                ) == (
                    (1, 1),
                    (0, 0),
                    0,
                )
                assert config.get("z_log_variance", 0) == 0


def test_every_model_has_a_recipe_for_both_kinds_of_machine():
    """But for this project's additions, which are in no paper."""
    for model in MODELS:
        papers = [name for name in PAPER_RECIPES if model in RECIPES[name].models]
        assert bool(papers) != model.endswith("_local")
        assert all(model in RECIPES[name].models for name in OURS)


def test_overrides_reach_recipe_and_model():
    recipe, config = resolve(
        "vae", "quick", {"batch": "7", "betas": "0.5,0.6", "hidden": "8,4", "latent": "3"}
    )
    assert (recipe.batch, recipe.betas) == (7, (0.5, 0.6)) and (
        config["hidden"],
        config["latent"],
    ) == ((8, 4), 3)
    assert resolve("vae", "quick", {"hidden": ""})[1]["hidden"] == ()
    assert resolve("vae", "quick", {"window": "256", "hop": "64"})[1]["bins"] == 129
    with pytest.raises(SettingError, match="learning_rate"):
        resolve("vae", "quick", {"learning_rates": "1"})


def test_scheduled_sampling_rises_linearly():
    recipe, _ = resolve("light_dvae", "light2023", {"own_past": "0.1,1", "steps": "11"})
    assert recipe.scheduled_sampling_at(0) == pytest.approx(0.1)
    assert recipe.scheduled_sampling_at(5) == pytest.approx(0.55)
    assert recipe.scheduled_sampling_at(10) == pytest.approx(1.0)


def test_constant_schedule_warms_up():
    recipe, _ = resolve(
        "vae", "quick", {"schedule": "constant", "warmup": "4", "learning_rate": "1"}
    )
    assert [recipe.learning_rate_at(step) for step in (0, 1, 3, 4, 10**6)] == [0.25, 0.5, 1, 1, 1]
    assert math.isclose(resolve("vae", "quick", {"warmup": "0"})[0].learning_rate_at(0), 2e-3)
