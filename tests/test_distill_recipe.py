"""Recipes: the package's load, wrong ones say what is wrong."""

import dataclasses

import pytest

from reasoners.distill.recipe import RECIPES, Recipe, Stage, Student, load_recipe, recipe_from_dict
from reasoners.model import CONFIGS, HybridLM

STAGE = {"name": "s", "objective": "end_to_end", "tokens": 1000, "batch": 2, "lr": 1e-3}
GOOD = {"name": "r", "student": {"kind": "llamba"}, "stages": [STAGE]}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_the_packages_recipes_load(path):
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path)
    assert recipe.name == path.stem
    assert recipe_from_dict(dataclasses.asdict(recipe)) == recipe


def test_a_recipe_means_what_it_says():
    assert recipe_from_dict(GOOD) == Recipe(
        name="r", student=Student("llamba"), stages=(Stage("s", "end_to_end", 1000, 2, 1e-3),)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lenght": 3}, "keys among name, student, .* got lenght"),
        ({"student": {}}, "recipe: student expected a key 'kind', got none"),
        ({"student": {"kind": "rwkv"}}, "llamba or mamba1 or mamba2 or llama, got 'rwkv'"),
        ({"student": {"kind": "llama"}}, "config and vocabulary"),
        ({"student": {"kind": "llamba", "vocabulary": 8}}, "for kind llama alone"),
        ({"stages": []}, "stages expected one or more, got none"),
        ({"stages": [STAGE | {"lr": "fast"}]}, r"stages\[0\]: lr expected float, got 'fast'"),
        ({"stages": [STAGE | {"tokens": True}]}, "tokens expected int, got True"),
        ({"stages": [STAGE | {"beta": 1.5}]}, "beta expected 0 to 1, got 1.5"),
        ({"stages": [STAGE | {"batch": 3}], "micro_batch": 2}, "a multiple of micro_batch = 2, got 3"),
        ({"length": 1}, "length expected > 1, got 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict(GOOD | change)


def test_no_such_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a file or one of .*llamba.*, got 'lamba'"):
        load_recipe("lamba")
    (tmp_path / "bad.toml").write_text("length = ")
    with pytest.raises(ValueError, match=r"bad\.toml: expected TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_steps_read_all_tokens():
    stage = Stage("s", "end_to_end", 1000, 2, 1e-3)
    assert stage.num_steps(100) == 5
    assert stage.num_steps(128) == 4


def test_patterns_choose_parameters():
    model = HybridLM(CONFIGS["tiny-llamba"])
    stage = dataclasses.replace(Stage("s", "end_to_end", 1, 1, 1.0), train=("layers.1.mixer.*",))
    names = [name for name, _ in stage.trained(model)]
    assert "layers.1.mixer.in_proj.weight" in names
    assert all(name.startswith("layers.1.mixer.") for name in names)
    assert len(Stage("s", "end_to_end", 1, 1, 1.0).trained(model)) == len(list(model.parameters()))
    typo = dataclasses.replace(stage, train=("layers.*.mixers.*",))
    with pytest.raises(ValueError, match=r"got 'layers\.\*\.mixers\.\*', which names none"):
        typo.trained(model)


@pytest.mark.parametrize("kind", ["llamba", "mamba1", "mamba2"])
def test_students_take_the_teachers_shape(kind):
    teacher = CONFIGS["tiny-llama"]
    keep = () if kind == "llamba" else (0, 3)
    config = Student(kind, keep=keep).model_config(teacher, teacher.vocab_size, None)
    assert len(config.mixers) == len(teacher.mixers)
    assert [i for i, m in enumerate(config.mixers) if m == "attention"] == list(keep)
    if keep:
        stepwise = Student(kind, keep=keep).model_config(teacher, teacher.vocab_size, (0, 1, 3))
        assert stepwise.mixers == ("attention", "attention", kind, "attention")


def test_a_kept_layer_that_is_not_there():
    with pytest.raises(ValueError, match="keep expected layers below 4, got 4"):
        Student("mamba2", keep=(1, 4)).model_config(CONFIGS["tiny-llama"], 256, None)


def test_a_model_from_nothing():
    fields = {
        "d_model": 32,
        "mlp_dim": 64,
        "layers": 3,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    config = Student("llama", config=fields, vocabulary=300).model_config(None, 301, None)
    assert (config.vocab_size, config.d_model, config.mixers) == (301, 32, ("attention",) * 3)
