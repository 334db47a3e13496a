"""What docs/howto/own-data.md shows works, block after block."""

import inspect
import re
import sys
from pathlib import Path

import jsonargparse
import pytest
import yaml

import lightning_iet.data
from lightning_iet.data import ImageDataModule
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.pictures import write_pictures

for _name in lightning_iet.data.__all__:  # configurations name classes by their bare names, once they are imported
    getattr(lightning_iet.data, _name)

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "own-data.md").read_text()
WRAPPED, OWN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CONFIGURATIONS = [yaml.safe_load(block)["data"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(autouse=True)
def _own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "spots.py").write_text(OWN)
    yield
    sys.modules.pop("spots", None)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration["class_path"])
def test_the_configurations_are_understood(configuration, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # as the command line does
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    configuration = configuration | {"init_args": configuration["init_args"] | {"synthetic": True, "num_workers": 0}}
    data = parser.instantiate_classes(parser.parse_object({"data": configuration})).data
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))) == 3


def test_the_short_class_trains_on_shards(tmp_path):
    from spots import Spots

    data = lightning_iet.ShardedDataModule(Spots(num_control=40, channels=1, batch_size=8, num_workers=1), 2)
    averaging = lightning_iet.ParameterAveragingCallback(2)
    module = tiny_diffusion()
    quiet_trainer(tmp_path, callbacks=[averaging], max_epochs=1).fit(module, data)
    assert [len(data.train_set), len(data.control_set), len(data.reference_set)] == [120, 40, 40]
    for image, label, _ in data.control_set:
        assert image[0, 2:6, 4 * label : 4 * label + 4].min() == 1


def test_the_wrapped_folder(tmp_path):
    write_pictures(tmp_path / "images", [f"{kind}/{number}.png" for kind in "ab" for number in range(10)])
    names = {}
    exec(WRAPPED, names)
    assert names["image"].shape == (3, 16, 16)
    assert (names["condition"], names["index"]) == (0, 0)
    assert len(names["data"].train_dataloader()) == 4


def test_all_classes_and_options_are_named():
    for name in lightning_iet.data.__all__:
        kind = getattr(lightning_iet.data, name)
        if isinstance(kind, type) and issubclass(kind, ImageDataModule) and kind is not ImageDataModule:
            assert f"`{name}`" in PAGE or name == "DigitsDataModule"
    for option in inspect.signature(ImageDataModule.__init__).parameters:
        assert f"`{option}`" in PAGE or option in ("self", "batch_size", "num_workers")
