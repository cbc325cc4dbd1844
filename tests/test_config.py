"""The config: where values come from, what is refused and in which words, and that it can be saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dinoreg.config.load import COMMAND_ONLY, Config, find_config, load_config, require_complete, to_yaml
from dinoreg.config.option import keys_of
from dinoreg.config.schema import ModelConfig
from dinoreg.runtime.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def refusal(*overrides: str, source: Path | str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Where values come from


def test_without_a_file_every_value_is_the_default() -> None:
    assert load_config() == Config()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "batch_size: 32\nseed: 5\n")
    config = load_config(path, ["seed=7"])
    assert (config.batch_size, config.seed, config.log.every) == (32, 7, Config().log.every)


def test_overrides_may_be_a_mapping_with_dotted_keys() -> None:
    config = load_config(None, {"optim.lr": 1e-3, "data": Path("photos"), "crops": {"num_local": 2}})
    assert config.optim.lr == 1e-3
    assert config.data.source == "photos"
    assert config.crops.num_local == 2


def test_a_shipped_config_is_found_by_name_and_a_run_by_its_folder(tmp_path: Path) -> None:
    assert load_config("vits14_reg4").loss.centering == "sinkhorn"
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    assert load_config(tmp_path).seed == 3


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_numbers_are_read_however_they_are_written(text: str) -> None:
    assert load_config(None, [f"optim.lr={text}"]).optim.lr == 1e-3


def test_a_whole_number_may_be_written_as_a_power_of_ten() -> None:
    assert load_config(None, ["steps=1e4"]).steps == 10_000


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False)])
def test_truth_values_are_true_and_false(text: str, value: bool) -> None:
    assert load_config(None, [f"model.compile={text}"]).model.compile is value


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_none_unsets_an_optional_value(text: str) -> None:
    assert load_config(None, [f"model.layerscale={text}"]).model.layerscale is None


def test_pairs_become_tuples_from_the_command_line_and_from_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "schedule:\n  momentum: [0.99, 1]\n")
    config = load_config(path, ["crops.local_scale=[0.1,0.3]"])
    assert config.schedule.momentum == (0.99, 1.0)
    assert config.crops.local_scale == (0.1, 0.3)


def test_one_number_serves_where_any_number_of_them_is_accepted() -> None:
    assert load_config(None, ["augment.mean=0.5"]).augment.mean == (0.5,)


# The data source: a path is the text it is


@pytest.mark.parametrize(
    "text",
    [
        "photos/of my cat",
        "photos/a,b",
        "photos/a=b",
        "s3:bucket",
        "2024",
        "1e3",
        "true",
        "photos/{x}#1*",
        "~/photos",
        "scenes:count=1000,size=64",
    ],
)
def test_data_is_taken_as_it_is_written(text: str) -> None:
    assert load_config(None, [f"data={text}"]).data.source == text


def test_data_in_brackets_is_a_list_of_folders() -> None:
    assert load_config(None, ["data=[a b/c, d=1,2024]"]).data.source == ["a b/c", "d=1", "2024"]
    assert load_config(None, ['data=["a,b",c]']).data.source == ["a,b", "c"]


def test_data_and_the_section_data_go_together(tmp_path: Path) -> None:
    path = write(tmp_path, "data: photos/\n")
    config = load_config(path, ["data.workers=3"])
    assert (config.data.source, config.data.workers) == ("photos/", 3)
    assert load_config(None, ["data.workers=3", "data=x"]).data.source == "x"
    assert load_config(None, {"data.workers": 3, "data": {"source": "x"}}).data.workers == 3
    assert load_config(write(tmp_path, "data: {}\nmodel: {}\n")) == Config()
    assert "expected keys below it" in refusal(source=write(tmp_path, "model: null\n"))


def test_an_empty_path_is_refused() -> None:
    assert refusal("data=").startswith("data.source=: expected text")
    assert refusal("out=").startswith("out=: expected text")


# What is refused, and in which words


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.baselr=1", "optim.base_lr"),
        ("crops.globl_size=224", "crops.global_size"),
        ("batchsize=3", "batch_size"),
        ("prototypes=3", "head.prototypes"),
        ("model.prototypes=3", "head.prototypes"),
        ("modle.name=x", "model.name"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override: str, hint: str) -> None:
    key = override.partition("=")[0]
    message = refusal(override)
    assert message.startswith(f"{key.partition('.')[0]}")
    assert "unknown key" in message
    assert f"did you mean {hint}" in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "optim:\n  learning_rate: 1\n")
    message = refusal(source=path)
    assert "optim.learning_rate: unknown key" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=many", "steps=many: expected a whole number or none"),
        ("steps=1.5", "steps=1.5: expected a whole number"),
        ("steps=true", "steps=true: expected a whole number"),
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("optim.lr=.nan", "optim.lr=.nan: expected a number"),
        ("resume=1", "resume=1: expected true or false"),
        ("batch_size=none", "batch_size=none: expected a whole number"),
        ("schedule.momentum=0.9", "schedule.momentum=0.9: expected 2 numbers"),
        ("crops.ratio=[1,2,3]", "crops.ratio=[1,2,3]: expected 2 numbers"),
        ("crops.ratio=[1,x]", "crops.ratio=[1,x]: expected 2 numbers"),
        ("data.weights=[a]", "data.weights=[a]: expected a list of numbers"),
        ("model=vits14", "model=vits14: expected keys below it, such as model.name"),
        ("steps.x=1", "steps: is a value, not a section"),
        ("steps={a: 1}", "steps={a: 1}: expected a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(override: str, expected: str) -> None:
    assert refusal(override).startswith(expected)


def test_yaml_numbers_are_no_text_and_text_is_no_number(tmp_path: Path) -> None:
    assert refusal(source=write(tmp_path, "out: 2024_01\n")).startswith("out=202401: expected text")
    assert refusal(source=write(tmp_path, "steps: '100'\n")).startswith("steps=100: expected a whole number")


@pytest.mark.parametrize(
    "override",
    [
        *("steps=0", "precision=fp8", "model.heads=5", "optim.accumulate=3"),
        *("schedule.momentum=[0.9, 1.1]", "schedule.teacher_temp=[0, 0.07]", "crops.global_scale=[0.5, 0.3]"),
        *("crops.local_scale=[0, 0.3]", "crops.ratio=[0, 1]", "mask.ratio=[0.5, 0.1]"),
        *("augment.blur_kernel=8", "augment.std=[0.2, 0, 0.2]", "augment.mean=[0.5, 0.5]"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(override: str) -> None:
    """What every key accepts, and that it refuses the rest, is checked in test_option; here, what related keys do."""
    assert refusal(override).startswith(f"{override}: expected ")


def test_all_loss_weights_zero_is_refused() -> None:
    assert "all are zero" in refusal("loss.dino_weight=0", "loss.ibot_weight=0")


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        (["crops.global_size=225"], "224 or 238"),
        (["crops.local_size=96"], "84 or 98"),
        (["crops.local_size=5"], "14 or 28"),
        (["model.name=vits16_reg4", "crops.local_size=98"], "96 or 112"),
    ],
)
def test_a_crop_that_the_patch_does_not_divide_is_refused_with_sizes_that_fit(
    overrides: list[str], nearest: str
) -> None:
    message = refusal(*overrides)
    assert "expected a multiple of the patch size" in message
    assert message.endswith(f"as {nearest}")


def test_the_size_of_local_crops_does_not_matter_when_there_are_none() -> None:
    assert load_config(None, ["crops.num_local=0", "crops.local_size=96"]).crops.num_local == 0


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    message = refusal("model.name=vits14_regs4")
    assert message.startswith("model.name=vits14_regs4")
    assert "vits14_reg4" in message


@pytest.mark.parametrize("text", ["seed: ${oc.env:HOME}\n", "data:\n  source: [a, '${seed}']\n"])
def test_a_config_may_not_read_the_environment_or_other_keys(tmp_path: Path, text: str) -> None:
    assert "is not allowed in a config" in refusal(source=write(tmp_path, text))


def test_the_command_line_may_not_interpolate_either() -> None:
    assert "is not allowed" in refusal("out=${oc.env:HOME}")


@pytest.mark.parametrize("text", ["a: [1\n", "- 1\n- 2\n", "seed: 1\nseed: 2\n", "!!python/object:os.system {}\n"])
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(source=write(tmp_path, text)).startswith(f"config {tmp_path / 'own.yaml'}")


def test_a_missing_file_an_unknown_name_and_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    assert refusal(source=tmp_path / "no.yaml").startswith(f"config {tmp_path / 'no.yaml'}: no such file")
    assert "did you mean vits14_reg4?" in refusal(source="vits14_reg")
    assert "without config.yaml" in refusal(source=tmp_path)
    with pytest.raises(UserError, match="unknown"):
        find_config("nothing like it")


@pytest.mark.parametrize("item", ["seed", "=3", "--seed"])
def test_an_override_without_key_or_value_is_refused(item: str) -> None:
    assert "expected key=value" in refusal(item)


def test_a_key_given_twice_is_refused() -> None:
    assert refusal("seed=1", "seed=2") == "seed: given twice"


# Budgets and rates exclude each other


def test_two_budgets_in_one_place_are_refused(tmp_path: Path) -> None:
    assert "give exactly one" in refusal("steps=5", "epochs=3")
    assert "give exactly one" in refusal(source=write(tmp_path, "steps: 5\nimages: 100\n"))


@pytest.mark.parametrize("override", ["epochs=2", "images=640", "steps=9"])
def test_a_budget_of_the_command_line_replaces_the_files(tmp_path: Path, override: str) -> None:
    config = load_config(write(tmp_path, "steps: 5\n"), [override])
    key, _, value = override.partition("=")
    given = {name: getattr(config, name) for name in ("steps", "images", "epochs")}
    assert given.pop(key) == float(value)
    assert set(given.values()) == {9} or set(given.values()) == {None}


def test_budgets_count_steps_images_or_epochs() -> None:
    assert load_config(None, ["steps=7"]).num_steps(1000) == 7
    assert load_config(None, ["images=640", "batch_size=32"]).num_steps(1000) == 20
    assert load_config(None, ["images=640", "batch_size=32"]).num_steps(1000, world_size=4) == 5
    assert load_config(None, ["epochs=2", "batch_size=50"]).num_steps(1000) == 40
    assert load_config(None, ["epochs=0.5", "batch_size=50"]).num_steps(1000) == 10
    assert load_config(None, ["images=1", "batch_size=50"]).num_steps(1000) == 1
    with pytest.raises(UserError, match="no budget"):
        Config().num_steps(10)


def test_a_given_rate_replaces_the_scaled_one_and_is_used_as_given() -> None:
    config = load_config(None, ["optim.lr=1e-3", "batch_size=256"])
    assert config.optim.base_lr is None
    assert config.peak_lr() == config.peak_lr(world_size=8) == 1e-3
    assert "as given" in config.explain_lr()


def test_the_base_rate_is_scaled_by_the_root_of_the_global_batch() -> None:
    config = load_config(None, ["optim.base_lr=4e-3", "batch_size=64"])
    assert config.peak_lr(world_size=32) == pytest.approx(4e-3 * 2**0.5)
    assert config.explain_lr(world_size=32) == "learning rate 0.00566 = 0.004 · √(2048/1024)"


def test_a_base_rate_of_the_command_line_replaces_the_files_rate(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "optim:\n  lr: 1.0e-3\n"), ["optim.base_lr=2e-3"])
    assert (config.optim.lr, config.optim.base_lr) == (None, 2e-3)


def test_both_rates_or_none_are_refused() -> None:
    assert "exactly one" in refusal("optim.lr=1e-3", "optim.base_lr=1e-3")
    assert "exactly one" in refusal("optim.base_lr=none")


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    assert "give one of the two" in refusal("resume=true", "overwrite=true")
    config = load_config(write(tmp_path, "overwrite: true\n"), ["resume=true"])
    assert (config.resume, config.overwrite) == (True, False)


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [(["data=x", "steps=1"], "out"), (["out=x", "steps=1"], "data"), (["out=x", "data=y"], "no budget")],
)
def test_a_run_needs_out_data_and_a_budget(overrides: list[str], missing: str) -> None:
    with pytest.raises(UserError) as caught:
        require_complete(load_config(None, overrides))
    assert str(caught.value).startswith(missing)
    require_complete(load_config(None, ["out=x", "data=y", "steps=1"]))


# Saving


def everything_differs() -> Config:
    return load_config(
        None,
        [
            "out=runs/a b",
            "epochs=2.5",
            'data=["p,q",r=s,scenes:count=5]',
            "data.weights=[1,2,3]",
            "optim.lr=1e-6",
            "model.layerscale=none",
            "model.in_channels=2",
            "augment.mean=[0.25,1e-3]",
            "augment.std=[0.5,1]",
            "crops.ratio=[0.5,2]",
            "probe.every=0",
        ],
    )


@pytest.mark.parametrize("config", [Config(), everything_differs()], ids=["default", "changed"])
def test_a_saved_config_reads_back_equal(config: Config, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_a_saved_config_names_every_key_but_those_of_one_command() -> None:
    saved = to_yaml(dataclasses.replace(Config(), overwrite=True))
    for key in keys_of(Config):
        leaf = key.rpartition(".")[2]
        assert (f"{leaf}:" in saved) == (key not in COMMAND_ONLY), key


def test_the_hash_depends_on_what_shapes_the_weights_and_on_nothing_else() -> None:
    config = load_config("vits14_reg4")
    watched = [
        *(
            "out=elsewhere",
            "resume=true",
            "device=cpu",
            "threads=2",
            "data.workers=3",
            "data.prefetch=5",
            "log.every=20",
        ),
        *("checkpoint.every=7", "checkpoint.keep=9", "probe.every=0", "probe.data=scenes", "health.max_rollbacks=0"),
        *("parallel.strategy=fsdp", "parallel.timeout=9", "model.compile=true", "model.checkpointing=true"),
    ]
    assert config.hash() == load_config("vits14_reg4").hash() == load_config("vits14_reg4", watched).hash()
    shaping = ("seed=1", "precision=fp32", "parallel.param_dtype=bf16", "optim.beta2=0.9", "data=scenes", "init=x.pth")
    hashes = {load_config("vits14_reg4", [override]).hash() for override in shaping}
    assert len(hashes | {config.hash()}) == 1 + len(shaping)
    assert len(config.hash()) == 12
    assert int(config.hash(), 16) >= 0


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().name = "vitb14_reg4"  # type: ignore[misc]


def test_a_learning_rate_of_zero_is_a_learning_rate() -> None:
    config = load_config(None, {"optim.lr": 0.0})
    assert (config.optim.lr, config.optim.base_lr) == (0.0, None)
