"""The weights that another project's module has before training (theta_base)."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lwf_lightning.forgetting.weights import copy_weights, trainable_parameters


class BaseWeights:
    """Copies what trains once the module is ready, and before a checkpoint is restored.

    The module's own setup comes after that of callbacks, and may still freeze weights, add an
    adapter or load a base model. No hook of Lightning lies between it and the checkpoint.

    Args:
        module: Holds its language model as ``model``.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._weights: dict[str, Tensor] = {}
        register: Any = module.register_load_state_dict_pre_hook
        self._hook: RemovableHandle | None = register(self._copy)

    def _copy(self, module: Any, *_: object) -> None:
        self._weights = copy_weights(module.model)

    def restored(self) -> None:
        """Says that the weights loaded last were those of a checkpoint."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def keep(self, module: Any) -> None:
        """Says that the module is ready: what is loaded from now on is no base."""
        if self._hook is not None:  # no checkpoint was restored
            self._copy(module)
            self.restored()

    def placed(self, module: Any) -> dict[str, Tensor]:
        """The weights, where and as the strategy has the module's when training begins."""
        self.keep(module)
        parameters = trainable_parameters(module.model)
        return {name: self._weights[name].to(p) for name, p in parameters.items()}
