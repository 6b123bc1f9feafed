"""One adapter in memory, ready to share a base with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.evaluation.calibration import Calibration
from llmrec_peft.scoring.adapter_layers import AdapterLayer


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One version of the adapter of one bundle, with its head, calibration and domain.

    Attributes:
        directory: directory of the bundle.
        version: digest of the manifest; another digest is another version.
        vocabulary: the domain's tokens.
        head: float32 [labels, hidden].
        layers: mapping from a module's path in the stock classifier to the layers that change its output, in order.
        size: bytes of all tensors.
    """

    directory: Path
    version: str
    vocabulary: Vocabulary
    calibration: Calibration
    head: torch.Tensor
    layers: Mapping[str, list[AdapterLayer]]
    size: int

    @property
    def domain(self) -> Domain:
        """The domain that it was trained on."""
        return self.vocabulary.domain

    @property
    def labels(self) -> list[str]:
        """Label names in class order."""
        return self.domain.labels

    def calibrate(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities float64 [n, labels] of logits [n, labels]."""
        return self.calibration.apply(logits)
