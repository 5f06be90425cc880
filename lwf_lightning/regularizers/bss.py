"""Batch Spectral Shrinkage."""

from __future__ import annotations

import torch
from torch import Tensor

from lwf_lightning.regularizers.base import FeaturePenalty, check_strength


class BatchSpectralShrinkage(FeaturePenalty):
    """Shrinks the smallest singular values of the batch's features (Chen et al., NeurIPS 2019).

    strength * sum of the ``count`` smallest squared singular values of the matrix of features.
    They are the smallest eigenvalues of its Gram matrix, which are cheaper, in float64: in float32
    what is 0.0001 of the largest singular value is lost in it.

    Args:
        strength: eta of the paper, above 0.
        count: How many singular values (k of the paper), at least 1 and at most the number of
            texts and the hidden size.

    Example:
        >>> BatchSpectralShrinkage(strength=1.0)(torch.diag(torch.tensor([3.0, 2.0, 5.0])))
        tensor(4.)
    """

    def __init__(self, strength: float = 1e-3, count: float = 1) -> None:
        if count < 1 or not float(count).is_integer():
            raise ValueError(f"count must be a whole number from 1, got {count}")
        self.strength, self.count = check_strength(strength), int(count)

    def __call__(self, features: Tensor) -> Tensor:
        """See :class:`FeaturePenalty`; at least 0, or not finite as a feature.

        Raises:
            ValueError: If there are fewer singular values than ``count``.
        """
        if self.count > min(features.shape):
            raise ValueError(
                f"bss: {features.shape[0]} texts with {features.shape[1]} features each have "
                f"{min(features.shape)} singular values, but count is {self.count}: raise "
                "data.init_args.batch_size or lower count in model.init_args.regularizer_options"
            )
        dtype = torch.promote_types(features.dtype, torch.float32)
        features = features.double()
        if features.shape[0] > features.shape[1]:
            features = features.T  # the smaller Gram matrix: the other has zeros besides
        with torch.autocast(features.device.type, enabled=False):
            gram = features @ features.T
            if not bool(torch.isfinite(gram).all()):  # of which eigenvalues would be an exception
                return gram.sum().to(dtype)
            values: Tensor = torch.linalg.eigvalsh(gram)
        return (self.strength * values[: self.count].clamp(min=0).sum()).to(dtype)
