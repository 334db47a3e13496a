"""Fine-tuning of text-to-image models."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_iet.data.augmentation import every_image
from lightning_iet.data.samples import is_index
from lightning_iet.functional.checks import check_at_least, check_number
from lightning_iet.functional.diffusion import FlowWeighting
from lightning_iet.functional.parameter_groups import ParameterGroups
from lightning_iet.modules.adapters import Selection, add_lora, fold_adapters
from lightning_iet.modules.base import DenoisingModule
from lightning_iet.modules.encoders import (
    CaptionEncoder,
    Conditions,
    LatentEncoder,
    check_captioned,
    fingerprint,
)
from lightning_iet.modules.noise_processes import Sampler, rebuilt, sample_images
from lightning_iet.modules.pipelines import open_pipeline
from lightning_iet.modules.pretrained import check_same_architecture


class TextToImageModule(DenoisingModule):
    r"""Fine-tunes the U-Net of a Stable-Diffusion-class pipeline, in full or by adapters (LoRA).

    With random latents :math:`z` of an image, encoded by the pipeline's autoencoder, and its caption :math:`c`, the
    loss of a sample is :math:`l = \mathrm{mean}_{CHW} (f(z_t, t, c) - y)^2`, where y is the noise or the velocity, as
    the pipeline was trained (with betas, flow matching or EDM).
    Losses stay per sample until ``self.loss_reducer(sample_loss, timesteps)``, the place of
    :class:`~lightning_iet.callbacks.AntiGradientControl` (published with threshold 0.8 for this).

    Autoencoder and text encoders stay as they are, in evaluation mode. They, and with LoRA the U-Net's own weights,
    are in memory once, however many shards there are, and are not saved: a checkpoint holds what is trained, its
    average, and the name of the pipeline that it belongs to.

    Batches are ``(images (B, 3, H, W) in [0, 1], captions, …)``.

    Args:
        pretrained: A folder, a single ``.safetensors`` file in the original form, or a hub id (downloaded unless
            cached), of a ``StableDiffusionPipeline`` (1.x, 2.x) or ``StableDiffusionXLPipeline``.
        synthetic: Put a tiny pipeline with random weights in its place, to try a run without the real one.
        image_size: Height and width of the images in pixels, multiples of the autoencoder's scale (8). Default: what
            the pipeline samples.
        lora_rank: Rank of adapters, which are then all that is trained; ``None`` = train the whole U-Net.
        lora_alpha: Their strength is ``lora_alpha / lora_rank``; ``None`` = 1.
        lora_targets: Ends of names of the layers that get adapters. Default: all attention layers.
        optimizer: Makes the optimizer. Default: AdamW with learning rate 2.5e-6, published for IET-AGC.
        warmup_steps: Optimizer steps (of each shard), n, over which the learning rate rises linearly from 1/n.
        ema_decay: Decay of the exponential moving average of what is trained, in [0, 1); 0 = none is kept.
        caption_dropout: Share of captions that training leaves out, so that guidance keeps working. *(our choice: 0.1,
            as Stable Diffusion itself was trained; the publication says nothing of it)*
        flow_weighting: Of pipelines with a flow-matching scheduler, as for
            :class:`~lightning_iet.modules.DiffusionModule`.
        cache_latents: Keep the latents of training images: ``"none"``, ``"memory"``, or a folder. An
            image that is sometimes mirrored is kept twice; one that is never the same twice is refused, where batches
            hold the index of each sample behind the caption, before or behind other integers such as labels.
        cache_text: The same for captions.
        gradient_checkpointing: Save memory at the cost of a second forward pass.
        sample_prompts: What :meth:`sample` shows by default, in turn: captions, or one, or ``"train"`` for those of the
            training images, the usual test for memorization (Somepalli et al., https://arxiv.org/abs/2305.20086).
            Default: no caption.
        guidance_scale: Of :meth:`sample`, see :func:`~lightning_iet.functional.diffusion.guide`; 1 = no guidance.

    Raises:
        FileNotFoundError: If there is no such pipeline.
        ValueError: If it is of another class or incomplete, or for values out of range.

    Example:
        >>> module = TextToImageModule(synthetic=True, image_size=32, lora_rank=2)
        >>> sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        1920
        >>> module.sample(2, prompts=["a dog", "a cat"], num_inference_steps=2).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        synthetic: bool = False,
        image_size: int | tuple[int, int] | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2.5e-6),
        warmup_steps: int = 0,
        ema_decay: float = 0.9999,
        caption_dropout: float = 0.1,
        flow_weighting: FlowWeighting | None = None,
        cache_latents: str = "none",
        cache_text: str = "none",
        gradient_checkpointing: bool = False,
        sample_prompts: Sequence[str] | Literal["train"] | None = None,
        guidance_scale: float = 7.5,
    ) -> None:
        super().__init__(
            optimizer=optimizer, warmup_steps=warmup_steps, ema_decay=ema_decay, guidance_scale=guidance_scale
        )
        check_number("caption_dropout", caption_dropout, "[0, 1)", "0.1 is usual; 0 = captions are always given.")
        check_at_least(1, optional=True, lora_rank=lora_rank)
        pipeline = open_pipeline(pretrained, synthetic=synthetic, image_size=image_size)
        self.unet = pipeline.unet.train()  # which comes in evaluation mode, and Lightning leaves modes alone
        self.latents = LatentEncoder(pipeline.vae, cache=cache_latents)
        self.captions = CaptionEncoder(pipeline, cache=cache_text)
        # Latents are not clipped, whatever a scheduler that was made for images says.
        self.scheduler = rebuilt(pipeline.scheduler, clip_sample=False)
        self.flow_weighting = flow_weighting
        _ = self.process  # which refuses a scheduler that it cannot train with
        self.image_shape = _image_shape(image_size, unet=self.unet, scale=self.latents.scale)
        self.unet.requires_grad_(True)
        if lora_rank is not None:
            add_lora(self.unet, rank=lora_rank, alpha=lora_alpha, targets=lora_targets)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.average_weights(trainable_only=True)
        self.caption_dropout = caption_dropout
        self.sample_prompts = sample_prompts
        self._pipeline = pipeline
        if self.latents.cache is not None:
            # Only then: Lightning warns of this hook wherever there is a data module.
            self.on_before_batch_transfer = self._look_up  # type: ignore[method-assign]
            warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")
        self._specification: dict[str, Any] = {
            "module": "TextToImageModule",
            "pretrained": None if pretrained is None else str(pretrained),
            "synthetic": synthetic,
            "image_size": list(self.image_shape[1:]),
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "lora_targets": list(lora_targets),
            "warmup_steps": warmup_steps,
            "ema_decay": ema_decay,
            "caption_dropout": caption_dropout,
            "flow_weighting": flow_weighting,
            "sample_prompts": sample_prompts if isinstance(sample_prompts, str | None) else list(sample_prompts),
            "guidance_scale": guidance_scale,
        }
        self._note_frozen()

    def _note_frozen(self) -> None:
        """List the weights that a checkpoint leaves out, and fingerprint them."""
        frozen = {
            name: parameter
            for name, parameter in self.named_parameters()
            if not parameter.requires_grad and not name.startswith("ema.")
        }
        self._frozen_names = frozenset(frozen)
        self._specification["frozen"] = fingerprint(frozen)

    def select_parameters(
        self,
        selection: Selection,
        *,
        network: nn.Module | None = None,
        bases: Path | None = None,
        norm_lr_scale: float = 1e-2,
    ) -> tuple[ParameterGroups, frozenset[str]]:
        """Add adapters to ``unet`` and freeze the rest, see :class:`~lightning_iet.modules.base.DenoisingModule`.

        Raises:
            ValueError: Also if the module was made with ``lora_rank``.
        """
        if self._specification["lora_rank"] is not None:
            raise ValueError(
                f"Argument `lora_rank` expected None beside a selection of parameters, but got "
                f"{self._specification['lora_rank']} and the family '{selection.family}'. Use --selection.family lora "
                "with --selection.lora_rank, or no selection."
            )
        selected = super().select_parameters(selection, network=network, bases=bases, norm_lr_scale=norm_lr_scale)
        self._note_frozen()
        return selected

    # --- training --------------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions, *, use_ema: bool = False) -> Tensor:
        """Predict from noisy latents.

        Args:
            latents: Noisy latents, shape ``(B, c, h, w)``.
            timesteps: 0 … T - 1, shape ``(B,)`` or ``()``.
            conditions: Captions as ``self.captions`` encodes them.
            use_ema: Whether the averaged weights predict (if any are kept).

        Returns:
            The prediction, shape ``(B, c, h, w)``.
        """
        height, width = (side * self.latents.scale for side in latents.shape[-2:])
        arguments = conditions.arguments(height, width) | {"return_dict": False}
        if use_ema and self.ema is not None:
            return self.ema.call(self.unet, latents, timesteps, **arguments)[0]
        return self.unet(latents, timesteps, **arguments)[0]

    def inputs(self, batch: Any, *, training: bool) -> tuple[Tensor, Conditions]:
        """Return latents and conditions of a batch; in training, latents are random and some captions left out.

        Raises:
            ValueError: If the batch is not ``(images, captions, …)``.
        """
        check_captioned(batch)
        latents = self.latents(batch[0], at_mean=not training)
        conditions = self.captions(batch[1], keep=training and self.training)
        if training and self.caption_dropout:
            dropped = torch.rand(len(latents), device=latents.device) < self.caption_dropout
            conditions = conditions.replaced(dropped, self.captions.null())
        return latents, conditions

    def training_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Take one step; return ``loss`` with the losses and timesteps of its samples."""
        latents, conditions = self.inputs(batch, training=True)
        timesteps = self.process.draw(len(latents), device=latents.device)
        return self.reduced(self.losses(latents, timesteps, torch.randn_like(latents), conditions), timesteps)

    def on_fit_start(self) -> None:
        """List the tensors to average, and encode the empty caption."""
        super().on_fit_start()
        train = getattr(getattr(self.trainer, "datamodule", None), "train_set", None)
        # A batch tells groups of near-duplicates that count as one by their numbers, and shows different images.
        self.latents.num_images = len(every_image(train)) if hasattr(train, "__len__") else 0
        self.captions.null()  # now: a training step in evaluation mode must change nothing
        # Lightning warns of modules in evaluation mode, in which frozen networks have to be.
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")

    def _look_up(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace training images by their latents, where the cache has them."""
        if not self.training:
            return batch
        check_captioned(batch)
        images, captions, *others = batch
        return [self.latents.look_up(images, *filter(is_index, others)), captions, *others]

    # --- sampling --------------------------------------------------------------------------------------------------

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        start: int = 0,
        batch_size: int = 16,
        sampler: Sampler = "ddim",
        num_inference_steps: int = 50,
        use_ema: bool = True,
        progress: Callable[[int], object] | None = None,
        prompts: Sequence[str] | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Sample images. Image i depends on ``(seed, start + i)`` and its prompt, not on batches or processes.

        Args:
            num: Number of images.
            seed: Seed of the run of images.
            start: Number of the first image.
            batch_size: Images at once.
            sampler: ``"ddim"`` (deterministic given the first noise), ``"ddpm"`` (ancestral), or ``"own"``, the
                pipeline's.
            num_inference_steps: Denoiser calls per image, at most T.
            use_ema: Whether the averaged weights are used (if any are kept).
            progress: Called with the number of images finished, after each batch.
            prompts: Captions; image number i has ``prompts[i % len(prompts)]``. Default: ``sample_prompts``.
            guidance_scale: See :func:`~lightning_iet.functional.diffusion.guide`; ``None`` = the module's.

        Returns:
            Images in [0, 1] on the CPU, shape ``(num, 3, H, W)``.

        Raises:
            ValueError: For a number of images or steps out of range, or if the training captions are wanted and there
                is no training.
        """
        prompt_of = self._prompts(prompts)
        return sample_images(
            partial(self, use_ema=use_ema),
            self.process.sampler(sampler),
            self._latent_shape,
            num,
            module=self,
            conditions=lambda numbers: self.captions([prompt_of(number) for number in numbers]),
            add_null=lambda conditions: conditions.behind(self.captions.null()),
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            decode=self.latents.decode,
            seed=seed,
            start=start,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            progress=progress,
        )

    def pipeline(self, *, use_ema: bool = True, sampler: Sampler | None = None) -> Any:
        """Return the model as a pipeline of the class that it came from, for whoever does not have this package.

        Adapters are worked into the weights *(our choice: it loads without peft)*. With the same seeds it samples the
        images of :meth:`sample`, to rounding: image i with ``torch.Generator().manual_seed(derive_seed(seed, i))``.

        Args:
            use_ema: Whether it gets the averaged weights (if any are kept).
            sampler: Its scheduler: ``"ddim"`` (the default), ``"ddpm"`` or ``"own"``.

        Returns:
            A pipeline with weights of its own, on the CPU in float32; ``save_pretrained`` writes it.
        """
        parts = copy.deepcopy(self._pipeline.components)
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.cpu().float().eval().requires_grad_(False)
        unet = parts["unet"]
        if use_ema and self.ema is not None:
            unet.load_state_dict(self.ema.weights(), strict=False)
        fold_adapters(unet)
        _, height, width = self._latent_shape
        unet.register_to_config(sample_size=height if height == width else (height, width))
        parts["scheduler"] = self.process.sampler(sampler or "ddim")
        options = {  # of the class, beside its parts
            name: self._pipeline.config[name]
            for name in ("requires_safety_checker", "force_zeros_for_empty_prompt")
            if name in self._pipeline.config
        }
        pipeline = type(self._pipeline)(**parts, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        scale = self.latents.scale
        return self.unet.config.in_channels, self.image_shape[1] // scale, self.image_shape[2] // scale

    def _prompts(self, prompts: Sequence[str] | None) -> Callable[[int], str]:
        """The caption of each image, by its number."""
        if prompts is None and self.sample_prompts == "train":
            samples = getattr(getattr(getattr(self, "_trainer", None), "datamodule", None), "train_set", None)
            if samples is None:
                raise ValueError(
                    "Argument `prompts` expected captions, but got none, and `sample_prompts` is 'train', whose images "
                    "are at hand while training only. Give captions."
                )
            samples = every_image(samples)
            return lambda number: str(samples[number % len(samples)][1])
        given = self.sample_prompts if prompts is None else prompts
        texts = [""] if given is None else [given] if isinstance(given, str) else list(given)
        if not texts:
            raise ValueError("Argument `prompts` expected at least one caption, but got none.")
        return lambda number: texts[number % len(texts)]

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def specification(self) -> dict[str, Any]:
        """Return the arguments of the constructor, and a fingerprint of the frozen weights."""
        return dict(self._specification)

    @classmethod
    def constructor_arguments(cls, specification: dict[str, Any], path: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that build the module; ``pretrained=`` says where its pipeline has moved to.

        Raises:
            ValueError: For a checkpoint of another module.
        """
        if specification.get("module") != "TextToImageModule":
            raise ValueError(
                f"Argument `checkpoint_path` expected a checkpoint of a TextToImageModule, but got '{path}' of "
                f"{specification.get('module', 'another module')}."
            )
        return {name: value for name, value in specification.items() if name not in ("module", "frozen")} | given

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all weights but the frozen ones."""
        weights = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self._frozen_names:
            weights.pop(prefix + name, None)
        return weights

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: If weights are missing or too many, or their shapes differ.
        """
        if strict:
            check_same_architecture(state_dict, self.state_dict())
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if name not in self._frozen_names]
        return type(result)(missing, result.unexpected_keys)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the weights meet the same frozen ones that they were trained with.

        Raises:
            ValueError: If they do not.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("specification", {})
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            if name in saved and saved[name] != self._specification[name]:
                raise ValueError(
                    f"The checkpoint expected `{name}` {saved[name]}, but got {self._specification[name]}. Use the "
                    "settings of the run that wrote it."
                )
        if saved.get("frozen") not in (None, self._specification["frozen"]):
            raise ValueError(
                f"The checkpoint expected the frozen weights of '{saved.get('pretrained')}', with which it was "
                f"trained, but got others, of '{self._specification['pretrained']}'. Give the same pipeline as "
                "`pretrained`."
            )


def _image_shape(image_size: int | tuple[int, int] | None, *, unet: Any, scale: int) -> tuple[int, int, int]:
    """Shape ``(3, H, W)`` of the images, of the denoiser's own size by default; ``scale`` = pixels a row of latents."""
    if image_size is None:
        own = unet.config.sample_size
        height, width = (own, own) if isinstance(own, int) else own
        return 3, height * scale, width * scale
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < scale or height % scale or width % scale:
        raise ValueError(
            f"Argument `image_size` expected multiples of {scale}, the pixels for each row of the autoencoder's "
            f"latents, but got {height} × {width}."
        )
    return 3, height, width
