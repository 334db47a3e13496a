"""What is made of the command line of a trainer before anything heavy is imported."""

import pytest

from lightning_iet.cli.arguments import check_source, with_run, with_underscores


def make(folder, *, checkpoint):
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    if checkpoint:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").touch()


def test_a_run_is_tested_by_the_configuration_of_the_version_whose_checkpoint_is_taken(tmp_path):
    make(tmp_path / "version_0", checkpoint=True)
    make(tmp_path / "version_1", checkpoint=False)  # begun later, and cut off before it had one
    arguments = ["test", "--ckpt_path", str(tmp_path)]
    config = ["--config", str(tmp_path / "version_0" / "config.yaml")]
    assert with_run(arguments) == ["test", *config, *arguments[1:]]
    make(tmp_path / "version_2", checkpoint=True)
    assert with_run(arguments)[2] == str(tmp_path / "version_2" / "config.yaml")


@pytest.mark.parametrize("path", ["version_0", "version_0/checkpoints", "version_0/checkpoints/last.ckpt"])
def test_any_path_of_a_version_finds_its_configuration(tmp_path, path):
    make(tmp_path / "version_0", checkpoint=True)
    assert with_run(["validate", f"--ckpt_path={tmp_path / path}"])[2] == str(tmp_path / "version_0" / "config.yaml")


def test_a_folder_without_a_checkpoint_is_said_to_have_none(tmp_path):
    make(tmp_path / "version_0", checkpoint=False)
    with pytest.raises(FileNotFoundError, match=r"`ckpt_path` expected .* which holds no checkpoint"):
        with_run(["test", "--ckpt_path", str(tmp_path)])


def test_a_configuration_that_is_given_stays_the_only_one(tmp_path):
    make(tmp_path / "version_0", checkpoint=True)
    arguments = ["test", "--config", "my.yaml", "--ckpt_path", str(tmp_path)]
    assert with_run(arguments) == arguments


@pytest.mark.parametrize("option", ["--model.guidance_scale", "--evaluation.num_samples", "--data.batch_size"])
def test_an_option_of_a_class_is_no_configuration(tmp_path, option):
    make(tmp_path / "version_0", checkpoint=True)
    arguments = ["test", "--ckpt_path", str(tmp_path), option, "3"]
    assert with_run(arguments)[1:3] == ["--config", str(tmp_path / "version_0" / "config.yaml")]
    with pytest.raises(ValueError, match="`fit` expected a configuration, but got none"):
        check_source(["fit", option, "3"])


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("--model.min-snr", "--model.min_snr"),
        ("--model.unet.norm-num-groups", "--model.unet.norm_num_groups"),
        ("--model.init_args.unet.init_args.norm-num-groups=4", "--model.init_args.unet.init_args.norm_num_groups=4"),
        ("--model.optimizer.init_args.weight-decay", "--model.optimizer.init_args.weight_decay"),
        ("--trainer.logger.init_args.config.learning-rate", "--trainer.logger.init_args.config.learning-rate"),
        ("--trainer.logger.config.learning-rate", "--trainer.logger.config.learning-rate"),
        ("--trainer.logger.dict_kwargs.a-b", "--trainer.logger.dict_kwargs.a-b"),
        ("--model.weights.a-b", "--model.weights.a-b"),
    ],
)
def test_dashes_are_underscores_in_names_of_arguments_and_not_in_keys_of_dictionaries(typed, understood):
    assert with_underscores(["fit", typed, "a-b"]) == ["fit", understood, "a-b"]
