"""Feature networks for tests."""

import warnings

import torch
from torch import nn


class Means(nn.Module):
    """The mean of each channel."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


class InceptionFile(nn.Module):
    """What clean-fid's TorchScript file offers: ``layers`` from normalised 299x299 images to features."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, images):
        return self.layers((images - 128) / 128)


def save_torchscript(module, path, example=None):
    """Save a network as TorchScript, by tracing if there is an example, and return the path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
        scripted = (
            torch.jit.script(module) if example is None else torch.jit.trace(module.eval(), example, check_trace=False)
        )
        torch.jit.save(scripted, str(path))
    return path


def random_inception(path):
    """Write a file like ``inception-2015-12-05.pt``: as many features, of random weights, in far fewer layers.

    All features but the first 64 are 0: what is calculated of all 2,048 then takes no seconds.
    """
    blocks = [
        nn.Conv2d(3, 16, kernel_size=7, stride=4),
        nn.ReLU(),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 64, kernel_size=3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.ConstantPad1d((0, 2048 - 64), 0.0),
    ]
    return save_torchscript(InceptionFile(nn.Sequential(*blocks)), path, torch.zeros(1, 3, 299, 299))
