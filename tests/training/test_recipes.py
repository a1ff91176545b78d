"""The recipes against the papers, and how settings are changed."""

import math

import pytest

from minidvae.models import MODELS
from minidvae.training.config import PAPER_RECIPES, RECIPES, SettingError
from minidvae.training.run import resolve

OUR_RECIPES = ("quick", "cpu_hour", "smoke")  # The others are the papers'.


def assert_settings(settings: dict, expected: dict) -> None:
    assert {name: settings[name] for name in expected} == expected


def test_light2023_is_the_papers():
    """Fails if a setting is not that of Lin et al. 2023, sections 2.3, 3.1 and 3.2."""
    recipe, config = resolve("light_dvae", "light2023", {})
    assert_settings(vars(recipe), {"window": 1024, "hop": 256, "frames": 150, "trim": True})
    assert_settings(vars(recipe), {"optimiser": "adamw", "betas": (0.9, 0.99), "epsilon": 1e-9})
    assert_settings(vars(recipe), {"weight_decay": 1e-5, "steps": 25_000, "clip": 0})
    assert recipe.scheduled_sampling == (0.0, 0.0)
    assert recipe.learning_rate_at(0) == pytest.approx(5e-5 / 5_000)
    assert recipe.learning_rate_at(2_499) == pytest.approx(2.5e-5)
    assert recipe.learning_rate_at(5_000) == pytest.approx(5e-5)
    assert recipe.learning_rate_at(15_000) == pytest.approx((5e-5 + 1e-8) / 2)
    assert recipe.learning_rate_at(25_000) == pytest.approx(1e-8)
    assert_settings(config, {"bins": 513, "latent": 16, "w_latent": 32, "width": 256, "heads": 1})
    assert_settings(config, {"feedforward": 1024, "layers": 4, "beta_z": 0.01, "beta_w": 0.01})
    assert_settings(config, {"input_scale": "power", "z_log_variance": 0.0, "variant": "plain"})
    for model in RECIPES["light2023"].models:
        _, config = resolve(model, "light2023", {})
        assert_settings(config, {"beta_z": 0.01, "input_scale": "power"})


def test_benchmark2021_is_the_papers():
    """Fails if a setting is not that of Bie et al. 2021, section 4."""
    for model in RECIPES["benchmark2021"].models:
        recipe, config = resolve(model, "benchmark2021", {})
        assert_settings(vars(recipe), {"window": 512, "hop": 256, "frames": 150, "batch": 32})
        assert_settings(vars(recipe), {"optimiser": "adam", "patience": 20})
        assert recipe.learning_rate_at(10**6) == 1e-4
        assert_settings(config, {"bins": 257, "latent": 16, "beta_z": 1.0, "input_scale": "power"})


def test_the_papers_use_neither_muon_nor_augmentation():
    """Fails if a paper's recipe has an addition of this project."""
    for name, recipe in RECIPES.items():
        for model in recipe.models:
            settings, config = resolve(model, name, {})
            if name not in OUR_RECIPES:
                assert settings.optimiser != "muon"
                no_augmentation = {"speed": (1, 1), "gain": (0, 0), "equaliser": 0}
                assert_settings(vars(settings), no_augmentation)
                assert config.get("z_log_variance", 0) == 0


def test_every_model_has_a_recipe_for_both_types_of_machine():
    """Fails if a model cannot be trained with the small recipes, or has no recipe of a paper unless
    it is an addition of this project, which is in no paper."""
    for model in MODELS:
        papers = [name for name in PAPER_RECIPES if model in RECIPES[name].models]
        assert bool(papers) != model.endswith("_local")
        assert all(model in RECIPES[name].models for name in OUR_RECIPES)


def test_overrides_reach_recipe_and_model():
    """Fails if a setting does not arrive, or if a misspelt one is taken or not corrected."""
    overrides = {"batch": "7", "betas": "0.5,0.6", "hidden": "8,4", "latent": "3"}
    recipe, config = resolve("vae", "quick", overrides)
    assert recipe.batch == 7
    assert recipe.betas == (0.5, 0.6)
    assert config["hidden"] == (8, 4)
    assert config["latent"] == 3
    assert resolve("vae", "quick", {"hidden": ""})[1]["hidden"] == ()
    assert resolve("vae", "quick", {"window": "256", "hop": "64"})[1]["bins"] == 129
    with pytest.raises(SettingError, match="learning_rate"):
        resolve("vae", "quick", {"learning_rates": "1"})


def test_scheduled_sampling_rises_linearly():
    """Fails if `own_past`, the former name of the setting, is refused, or if the probability is not
    0.1 at the first step, 1 at the last and between them on a line."""
    recipe, _ = resolve("light_dvae", "light2023", {"own_past": "0.1,1", "steps": "11"})
    assert recipe.scheduled_sampling_at(0) == pytest.approx(0.1)
    assert recipe.scheduled_sampling_at(5) == pytest.approx(0.55)
    assert recipe.scheduled_sampling_at(10) == pytest.approx(1.0)


def test_constant_schedule_warms_up():
    """Fails if the learning rate does not rise linearly over the warm-up and then stay."""
    overrides = {"schedule": "constant", "warmup": "4", "learning_rate": "1"}
    recipe, _ = resolve("vae", "quick", overrides)
    assert [recipe.learning_rate_at(step) for step in (0, 1, 3, 4, 10**6)] == [0.25, 0.5, 1, 1, 1]
    recipe, _ = resolve("vae", "quick", {"warmup": "0"})
    assert math.isclose(recipe.learning_rate_at(0), 2e-3)
