"""SSCD similarity: what a copy-detection network says of generated images."""

from typing import Any

from torch import Tensor, nn

from lightning_iet.functional.sscd_similarity import check_threshold, similarity_summary
from lightning_iet.metrics.base import CosineMetric, TrainingSet
from lightning_iet.metrics.features import PathLike_


class SSCDSimilarity(CosineMetric):
    r"""95th percentile of the similarity to the nearest training image, and the share of images above a threshold.

    .. math:: s(\hat x) = \max_j \langle f(\hat x), f(x_j) \rangle

    with the descriptors of length one of SSCD, a network trained to recognise edited copies of photographs (Pizzi et
    al., CVPR 2022, arXiv:2202.10261; Somepalli et al., *Diffusion Art or Digital Forgery?*, CVPR 2023,
    arXiv:2212.03860, who call images above 0.5 copies).

    The network was trained on photographs. On small, grey or drawn images unrelated ones can have similarities above
    0.5: compare with as many held-out real images.

    Input of ``update`` and ``forward``:

    - ``generated``: images, shape ``(Q, C, H, W)``, uint8 or floating point in [0, 1].

    Output of ``compute`` and ``forward``:

    - ``"q0.95"``, in [-1, 1], and ``"share"``, in [0, 1]; 0-d tensors, NaN while there are no generated images.

    Args:
        train: the training set: a tensor ``(N, C, H, W)``, a map-style data set of images or of tuples that begin with
            one, or a data loader; uint8, or floating point in [0, 1].
        weights: SSCD's TorchScript file, see :class:`~lightning_iet.metrics.features.SSCDFeatures`; by default the path
            in the environment variable ``LIGHTNING_IET_SSCD``.
        threshold: the similarity above which an image counts as a copy.
        features: another network in SSCD's place: a name, a file, or a module.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if ``train`` is of another kind.
        ValueError: if ``train`` is empty, holds images of several sizes or values outside [0, 1]; if the file is no
            TorchScript file; if ``threshold`` lies outside [-1, 1].
        FileNotFoundError: if the file is missing; the message says where to get it.

    Example:
        >>> import torch
        >>> train = torch.eye(4).reshape(4, 1, 2, 2)
        >>> metric = SSCDSimilarity(train, features="pixels", threshold=0.6)
        >>> metric.update(torch.cat([0.5 * train[:1], torch.ones(3, 1, 2, 2)]))
        >>> metric.compute()["share"]
        tensor(0.2500)
    """

    higher_is_better = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    settings = ("features", "threshold")

    def __init__(
        self,
        train: TrainingSet,
        *,
        weights: PathLike_ | None = None,
        threshold: float = 0.5,
        features: PathLike_ | nn.Module = "sscd",
        **kwargs: Any,
    ) -> None:
        check_threshold(threshold)
        super().__init__(train, features=features, weights=weights, **kwargs)
        self.threshold = threshold

    def compute(self) -> dict[str, Tensor]:
        """Return percentile and share over all updates and processes."""
        return similarity_summary(1 - self.nearest(), threshold=self.threshold)
