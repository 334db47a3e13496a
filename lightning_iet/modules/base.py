"""What both diffusion modules share: losses, optimizer, average of the weights, random numbers, checkpoints."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_iet.functional.checks import check_at_least, check_number
from lightning_iet.functional.diffusion import FlowWeighting, mean_loss
from lightning_iet.functional.parameter_groups import ParameterGroups, adapted_layer
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.adapters import (
    Selection,
    describe_selection,
    differing_options,
    fold_adapters,
    parameter_groups,
    select_parameters,
)
from lightning_iet.modules.noise_processes import NoiseProcess, noise_process
from lightning_iet.modules.pretrained import check_same_architecture
from lightning_iet.utilities.random import seed_rng


class ExponentialMovingAverage(AveragedModel):
    r"""Keeps :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta` of a network, from the first step on.

    ``AveragedModel.update_parameters`` asks a tensor on the device in every step whether this is the first update, and
    walks through both networks: a wait for the device, and as much time as the arithmetic. This average starts as a
    copy, so that no update is special, and the tensors are listed once.

    Args:
        network: What is trained.
        decay: :math:`d`, in [0, 1).
        trainable_only: Whether only parameters that require gradients are averaged, so that frozen weights have no
            second copy: with adapters, the average is as small as they are. Otherwise the whole network is copied.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1, bias=False))
        >>> average = ExponentialMovingAverage(network, decay=0.5, trainable_only=True)
        >>> before = network[1].weight.item()
        >>> with torch.no_grad():
        ...     _ = network[1].weight.add_(1)
        >>> average.follow(network)
        >>> average.update()
        >>> round(average.weights()["1.weight"].item() - before, 6), len(average.weights())
        (0.5, 1)
    """

    def __init__(self, network: nn.Module, *, decay: float, trainable_only: bool = False) -> None:
        trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        averaged = nn.ParameterList(trainable.values()) if trainable_only else network
        super().__init__(averaged, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.requires_grad_(False)
        self.names = list(trainable) if trainable_only else None
        self._followed: tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]] | None = None

    def follow(self, network: nn.Module | None) -> None:
        """List the tensors of the network that :meth:`update` reads, once they are on their device; ``None`` = none."""
        if network is None:
            self._followed = None
        elif self.names is None:
            buffers = list(zip(self.module.buffers(), network.buffers(), strict=True))
            self._followed = list(self.module.parameters()), list(network.parameters()), buffers
        else:
            self._followed = list(self.module.parameters()), [network.get_parameter(name) for name in self.names], []

    @torch.no_grad()
    def update(self) -> None:
        """Average in the weights of one optimizer step; buffers are copied.

        Raises:
            RuntimeError: If no network is followed.
        """
        if self._followed is None:
            raise RuntimeError("ExponentialMovingAverage.update expected a network. Call `follow(network)` before.")
        averaged, current, buffers = self._followed
        average: Any = self.multi_avg_fn
        average(averaged, current, self.n_averaged)
        for copied, buffer in buffers:
            copied.copy_(buffer)
        self.n_averaged += 1

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged parameters by the names that they have in the network."""
        if self.names is None:
            return dict(self.module.named_parameters())
        return dict(zip(self.names, self.module.parameters(), strict=True))

    def call(self, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the network with the averaged weights in place of its own."""
        if self.names is None:
            return self(*args, **kwargs)
        return functional_call(network, self.weights(), args, kwargs)


def averaged_network(network: nn.Module, ema: ExponentialMovingAverage | None) -> nn.Module:
    """Return a network with its averaged weights and without adapters; a copy, unless it is at hand.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1, bias=False))
        >>> average = ExponentialMovingAverage(network, decay=0.5, trainable_only=True)
        >>> start = network[1].weight.item()
        >>> _ = network[1].weight.data.fill_(3.0)
        >>> averaged_network(network, average)[1].weight.item() == start
        True
        >>> averaged_network(network, None) is network
        True
    """
    if ema is not None and ema.names is None:
        return ema.module
    if ema is None and adapted_layer(network) is None:
        return network
    own = copy.deepcopy(network)
    if ema is not None:
        own.load_state_dict(ema.weights(), strict=False)
    fold_adapters(own)
    return own


class DenoisingModule(pl.LightningModule):
    """Base of the diffusion modules: trains ``unet``, with an average of its weights and one loss for each sample.

    A subclass sets ``unet``, ``scheduler`` and, by :meth:`average_weights`, ``ema`` in its constructor, and defines
    ``forward``, ``training_step``, :meth:`inputs`, :meth:`specification` and :meth:`constructor_arguments`.

    Args:
        optimizer: Makes the optimizer from the parameters.
        warmup_steps: Optimizer steps over which the learning rate rises linearly, ≥ 0.
        ema_decay: Decay of the average, in [0, 1); 0 = none is kept.
        guidance_scale: Of the images that are sampled.

    Raises:
        ValueError: For values out of range.
    """

    unet: Any
    scheduler: Any
    flow_weighting: FlowWeighting | None = None
    ema: ExponentialMovingAverage | None

    def __init__(
        self, *, optimizer: OptimizerCallable, warmup_steps: int, ema_decay: float, guidance_scale: float
    ) -> None:
        super().__init__()
        check_number("ema_decay", ema_decay, "[0, 1)", "0.9999 is usual; 0 = no average.")
        check_at_least(0, warmup_steps=warmup_steps)
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.ema_decay = ema_decay
        self.guidance_scale = guidance_scale
        self.selection: Selection | None = None
        self.norm_lr_scale = 1.0
        self._process: NoiseProcess | None = None
        self.loss_reducer: Callable[[Tensor, Tensor], Tensor] = mean_loss

    def average_weights(self, *, trainable_only: bool = False) -> None:
        """Keep an average of the weights as ``ema``; call it when all parameters of ``unet`` are in place."""
        self.ema = None
        if self.ema_decay:
            self.ema = ExponentialMovingAverage(self.unet, decay=self.ema_decay, trainable_only=trainable_only)

    def select_parameters(
        self,
        selection: Selection,
        *,
        network: nn.Module | None = None,
        bases: Path | None = None,
        norm_lr_scale: float = 1e-2,
    ) -> tuple[ParameterGroups, frozenset[str]]:
        """Add adapters to ``unet`` and freeze the rest; the average starts anew, of what trains alone.

        :class:`~lightning_iet.callbacks.ParameterSelection` calls it before training starts.

        Args:
            selection: What trains.
            network: The denoiser within ``unet``, if that is a wrapper around it; ``None`` = ``unet``. Groups and
                names are its own.
            bases: Folder for SV-DIFF's decompositions, see :func:`~lightning_iet.modules.adapters.add_svdiff`.
            norm_lr_scale: Factor of the learning rate of SV-DIFF's shifts of norms.

        Returns:
            See :func:`~lightning_iet.modules.adapters.select_parameters`.

        Raises:
            ValueError: If the selection does not fit ``unet``, or there is another one already.
        """
        if self.selection is None:
            self._selected = select_parameters(self.unet if network is None else network, selection, bases=bases)
            self.selection, self.norm_lr_scale = selection, norm_lr_scale
            self.average_weights(trainable_only=True)
        elif self.selection != selection:
            raise ValueError(
                f"{type(self).__name__} expected one selection of parameters, but got a second one, of the family "
                f"'{selection.family}' after '{self.selection.family}'. Start from a module without."
            )
        return self._selected

    @property
    def trained_part(self) -> str:
        """What of the network trains, in a line; empty if everything does."""
        if self.selection is None:
            return ""
        groups, trained = self._selected
        return describe_selection(groups, self.selection, sum(groups.numel[name] for name in trained))

    @property
    def process(self) -> NoiseProcess:
        """How the module is trained and sampled with ``scheduler``.

        Raises:
            ValueError: If it has no noise schedule to train with.
        """
        if self._process is None or self._process.scheduler is not self.scheduler:
            self._process = noise_process(self.scheduler, flow_weighting=self.flow_weighting)
        return self._process

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps of training."""
        return int(self.scheduler.config.num_train_timesteps)

    # --- losses ----------------------------------------------------------------------------------------------------

    def losses(
        self, images: Tensor, timesteps: Tensor, noise: Tensor, condition: Any = None, *, use_ema: bool = False
    ) -> Tensor:
        """Return the loss of each sample.

        Args:
            images: What noise is added to, about [-1, 1] or of unit variance, shape ``(B, C, H, W)``.
            timesteps: 0 … T - 1, shape ``(B,)``.
            noise: Gaussian noise, shape ``(B, C, H, W)``.
            condition: As for ``forward``.
            use_ema: Whether the averaged weights predict.

        Returns:
            Shape ``(B,)``.
        """

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            return self(noisy, times, condition, use_ema=use_ema)

        return self.process.losses(predict, images, timesteps, noise)

    def reduced(self, losses: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Reduce and log the losses of a step, shape ``(B,)``; return what ``training_step`` returns."""
        loss = self.loss_reducer(losses, timesteps)
        mean = losses.detach().mean()
        self.log("train/loss", mean, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(losses))
        return {"loss": loss, "sample_loss": losses, "timesteps": timesteps}

    def inputs(self, batch: Any, *, training: bool) -> tuple[Tensor, Any]:
        """Return images and conditions of a batch, as :meth:`losses` takes them, without randomness unless training."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Log the loss of held-out images, always with the same noise, so that epochs compare."""
        self._log_held_out_loss("val/loss", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Log the same of test images."""
        self._log_held_out_loss("test/loss", batch, batch_idx)

    def _log_held_out_loss(self, name: str, batch: Any, batch_idx: int) -> None:
        images, condition = self.inputs(batch, training=False)
        generator = torch.Generator().manual_seed(batch_idx)
        timesteps = torch.randint(self.num_timesteps, (len(images),), generator=generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator).to(images)
        loss = self.losses(images, timesteps, noise, condition, use_ema=True).mean()
        self.log(name, loss, prog_bar=True, batch_size=len(images), sync_dist=True)

    # --- optimizer and average --------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Make the optimizer over those parameters of ``unet`` that require gradients, and the warm-up."""
        groups = parameter_groups(self.unet, norm_lr_scale=self.norm_lr_scale)
        if len(groups) == 1:
            optimizer = self.optimizer(groups[0]["params"])
        else:
            optimizer = self.optimizer([{"params": group["params"]} for group in groups])
        for group, options in zip(groups, optimizer.param_groups, strict=True):
            options["lr"] = options["lr"] * group["lr_scale"]
        if not self.warmup_steps:
            return optimizer
        # LinearLR starts at a factor > 0: step 1 of n has 1/n of the rate.
        warmup = LinearLR(optimizer, start_factor=1 / self.warmup_steps, total_iters=self.warmup_steps - 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before each optimizer step, with a fused optimizer under ``precision="bf16-mixed"`` too.

        Lightning refuses fused optimizers whenever precision is mixed, since they undo the scaling of gradients
        themselves, after the clipping. In bfloat16 nothing is scaled.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then update the average: together, so that nothing sees one without the other."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update()

    def on_fit_start(self) -> None:
        """List the tensors to average."""
        if self.ema is not None:
            self.ema.follow(self.unet)

    def on_fit_end(self) -> None:
        """Drop the list."""
        if self.ema is not None:
            self.ema.follow(None)

    def on_train_start(self) -> None:
        """Seed the random generators from (seed of the run, rank, steps so far).

        Lightning seeds all processes alike, so that under plain DDP all would use the same timesteps and noise for
        their different images; and it does not save the state of generators, so that a run that is resumed again and
        again would train on the same numbers for ever. The first process of a new run stays as it was seeded. Under
        shards every step is seeded anyway.
        """
        if self.trainer.global_rank or self.trainer.global_step:
            seed = derive_seed(torch.initial_seed() % 2**63, self.trainer.global_rank, self.trainer.global_step)
            seed_rng(seed)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def specification(self) -> dict[str, Any]:
        """Return what builds the module again, of plain types: ``module``, its class, and constructor arguments."""
        raise NotImplementedError

    @classmethod
    def constructor_arguments(cls, specification: dict[str, Any], path: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that build a module from a checkpoint; those that are given win.

        ``specification`` is what :meth:`specification` returned, empty where the checkpoint has none; the path is for
        messages.
        """
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the module again."""
        checkpoint["specification"] = self.specification() | self._selection_specification()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Select the parameters that the checkpoint's run selected, unless training resumes.

        Raises:
            ValueError: If training is to resume with another selection.
        """
        saved = checkpoint.get("specification", {}).get("selection")
        own = self._selection_specification().get("selection")
        if saved == own:
            return
        trainer: Any = self._trainer
        if own is None and (trainer is None or trainer.state.fn != "fit"):
            options = dict(saved)
            scale = options.pop("norm_lr_scale")
            self.select_parameters(Selection(**options), norm_lr_scale=scale)
            return
        if saved is not None and own is not None:
            raise ValueError(
                f"The checkpoint expected the selection of the run that wrote it, but got another one: "
                f"{differing_options(saved, own)}. Use the same options."
            )
        there, here = ("everything" if found is None else f"a part ('{found['family']}')" for found in (saved, own))
        raise ValueError(
            f"The checkpoint expected a module of which {there} is trained, but got one of which {here} is. Use the "
            "selection of the run that wrote it."
        )

    def _selection_specification(self) -> dict[str, Any]:
        if self.selection is None:
            return {}
        return {"selection": self.selection.specification() | {"norm_lr_scale": self.norm_lr_scale}}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights.

        Raises:
            ValueError: If they are of another architecture, in one line.
        """
        if strict:
            check_same_architecture(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a module as its checkpoint specifies it.

        Args:
            checkpoint_path: The file.
            map_location: As for ``torch.load``.
            **kwargs: Arguments of the constructor that win over those of the checkpoint.
        """
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        specification = dict(checkpoint.get("specification", {}))
        specification.pop("selection", None)  # on_load_checkpoint takes it, once the module is there
        arguments = cls.constructor_arguments(specification, checkpoint_path, kwargs)
        inherited: Any = super().load_from_checkpoint
        # Lightning's wrapper of it reads the source of the whole call stack, a tenth of a second and more.
        return inherited.__func__(cls, checkpoint_path, map_location, weights_only=True, **arguments)
