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
    """Write a file like ``inception-2015-12-05.pt``, of the same architecture, with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    blocks = [
        inception.BasicConv2d(3, 32, kernel_size=3, stride=2),
        inception.BasicConv2d(32, 32, kernel_size=3),
        inception.BasicConv2d(32, 64, kernel_size=3, padding=1),
        nn.MaxPool2d(kernel_size=3, stride=2),
        inception.BasicConv2d(64, 80, kernel_size=1),
        inception.BasicConv2d(80, 192, kernel_size=3),
        nn.MaxPool2d(kernel_size=3, stride=2),
        inception.InceptionA(192, pool_features=32),
        inception.InceptionA(256, pool_features=64),
        inception.InceptionA(288, pool_features=64),
        inception.InceptionB(288),
        inception.InceptionC(768, channels_7x7=128),
        inception.InceptionC(768, channels_7x7=160),
        inception.InceptionC(768, channels_7x7=160),
        inception.InceptionC(768, channels_7x7=192),
        inception.InceptionD(768),
        inception.InceptionE_1(1280),
        inception.InceptionE_2(2048),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return save_torchscript(InceptionFile(nn.Sequential(*blocks)), path, torch.zeros(1, 3, 299, 299))
