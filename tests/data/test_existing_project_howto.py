"""What docs/howto/shards-in-your-project.md shows works, block after block."""

import re
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_iet import DigitsDataModule
from tests.helpers.models import quiet_trainer, tiny_diffusion

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "shards-in-your-project.md"


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.rand(1, 8, 8), 0) for _ in range(64))


def test_the_blocks_run(tmp_path):
    images = TensorDataset(torch.rand(64, 1, 8, 8), torch.zeros(64))
    module = tiny_diffusion()
    names = {
        "Trainer": lambda **kwargs: quiet_trainer(tmp_path, **kwargs),
        "DataLoader": DataLoader,
        "module": module,
        "datamodule": DigitsDataModule(64, batch_size=8),
        "dataset": images,
        "stream": Stream(),
        "train_loader": DataLoader(images, batch_size=8, shuffle=True),
        "val_loader": DataLoader(images, batch_size=8),
    }
    before = module.unet.conv_in.weight.clone()
    first, loaders, stream, index = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(first, names)
    assert not torch.equal(module.unet.conv_in.weight, before)
    assert names["trainer"].current_epoch == 4
    exec(loaders, names)
    assert len(names["data"].train_dataloader()) == 8
    assert names["data"].val_dataloader() is names["val_loader"]
    exec(stream, names)
    assert len(names["data"].train_dataloader()) == 16
    exec(index, names)
    assert names["index"] == 7
