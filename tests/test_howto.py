"""What the how-to pages show works."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional as F

from lightning_iet import DiffusionModule, DigitsDataModule
from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.modules.adapters import fold_adapters

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
EXAMPLE = ROOT / "examples" / "existing_project"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "howto" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


# --- plain PyTorch ---------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t):
        return self.weight * x


def test_the_loop_in_plain_pytorch_is_agc():
    namespace = {}
    exec(blocks("plain-pytorch.md", "python")[0], namespace)
    alphas_cumprod = torch.linspace(0.9, 0.1, 3, dtype=torch.float64)
    batches = torch.rand(30, 4, 1, 2, 2, dtype=torch.float64)
    model, by_hand = Denoiser(), Denoiser()
    torch.manual_seed(0)
    bank = namespace["train"](model, torch.optim.SGD(model.parameters(), lr=0.1), batches, alphas_cumprod)

    torch.manual_seed(0)
    means, skipped = [0.0] * 3, 0
    for images in batches:
        t, noise, losses = torch.randint(3, (4,)), torch.randn_like(images), []
        for image, eps, step in zip(images, noise, t, strict=True):
            signal = alphas_cumprod[step]
            losses.append(((by_hand(signal.sqrt() * image + (1 - signal).sqrt() * eps, None) - eps) ** 2).mean())
        kept = [loss for loss, step in zip(losses, t.tolist(), strict=True) if loss >= 0.5 * means[step]]
        for loss, step in zip(losses, t.tolist(), strict=True):
            means[step] = 0.8 * means[step] + 0.2 * loss.item()
        skipped += 4 - len(kept)
        gradient = torch.autograd.grad(sum(kept) / len(kept), by_hand.weight)[0] if kept else 0
        by_hand.weight.data -= 0.1 * gradient
    assert skipped > 5
    torch.testing.assert_close(model.weight, by_hand.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(bank.double(), torch.tensor(means, dtype=torch.float64), rtol=1e-5, atol=0)


def test_continuous_times_in_plain_pytorch():
    namespace = {}
    exec(blocks("plain-pytorch.md", "python")[1], namespace)
    bins = namespace["t"].tolist()
    assert bins == sorted(bins)
    assert bins[1] == bins[2]
    assert bins[0] < bins[1] < bins[3] == 999
    assert namespace["bank"].count_nonzero() == 3


# --- an existing project ---------------------------------------------------------------------------------------------


def changed():
    """The example's text before and after its diff, applied hunk by hunk."""
    before = after = (EXAMPLE / "train.py").read_text()
    hunks = re.split(r"^@@.*@@\n", (EXAMPLE / "agc.diff").read_text(), flags=re.MULTILINE)[1:]
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        assert after.count(old) == 1
        after = after.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))
    return before, after


def test_the_diff_changes_two_lines():
    before, after = (text.splitlines() for text in changed())
    assert len(after) == len(before) + 1
    assert len(set(after) - set(before)) == 2
    shown = blocks("existing-project.md", "diff")[0].splitlines()
    made = [line for line in (EXAMPLE / "agc.diff").read_text().splitlines() if re.match(r"[+-](?![+-])", line)]
    assert shown == made


@pytest.mark.parametrize("version", [0, 1], ids=["before", "after"])
def test_the_example_runs(tmp_path, monkeypatch, version):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(changed()[version])
    spec = importlib.util.spec_from_file_location("train", tmp_path / "train.py")
    project = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(project)
    monkeypatch.setattr(project.Digits.__init__, "__defaults__", (512,))
    trainer = project.main(["--epochs", "1"])
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, AntiGradientControl)]
    assert len(callbacks) == version
    for agc in callbacks:
        assert agc.run_statistics.seen.sum() == 1797
        assert "denoiser `model` (UNet), timesteps from its argument `time`" in agc.losses.description


# --- fine-tuning -----------------------------------------------------------------------------------------------------


CALLBACK, PLAIN, SEARCH = blocks("fine-tune-without-memorising.md", "python")


@pytest.fixture
def unet():
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip


def assert_singular_values_alone_have_changed(before, after):
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before if name.endswith("bias"))
    name = "mid_block.resnets.0.conv1.weight"
    left, _, right = torch.linalg.svd(before[name].flatten(1), full_matrices=False)
    moved = left.T @ (after[name] - before[name]).flatten(1) @ right.T
    assert moved.diagonal().abs().min() > 1e-5
    torch.testing.assert_close(moved, moved.diagonal().diag(), rtol=0, atol=1e-6)


def test_a_callback_selects_what_trains(tmp_path, monkeypatch, unet):
    monkeypatch.chdir(tmp_path)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    module, datamodule = DiffusionModule(unet, ema_decay=0), DigitsDataModule(20, batch_size=10)
    exec(CALLBACK, {"module": module, "datamodule": datamodule})
    fold_adapters(module.unet)
    assert_singular_values_alone_have_changed(before, module.unet.state_dict())


def test_a_selection_in_plain_pytorch(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}

    def train(optimizer):
        noisy, noise = torch.randn(2, 4, 1, 8, 8)
        F.mse_loss(unet(noisy, 5).sample, noise).backward()
        optimizer.step()

    exec(PLAIN.replace("...  #", "train(optimizer)  #"), {"unet": unet, "train": train})
    assert_singular_values_alone_have_changed(before, unet.state_dict())


def test_a_search_from_python_prints_its_mask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(SEARCH, {})
    mask, rule = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert re.fullmatch("[01]{3}", mask)
    assert mask.count("1") == 1  # more exceeds the control, and less has no better quality
    assert rule == "control"
    assert (tmp_path / "search" / "report.html").is_file()
