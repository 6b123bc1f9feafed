"""The teacher of a distillation: a bundle or a merged model, described before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.data.domain import Domain
from llmrec_peft.models.base import load_config, resolve_base


@dataclass(frozen=True)
class Teacher:
    """A teacher by its manifest; no weights are held.

    Attributes:
        directory: directory of the bundle or merged model.
        manifest: its behavior.json.
        base: base of a bundle; None for the one that the manifest names.
        trust_remote_code: allow the base's own code to run.
    """

    directory: str
    manifest: dict[str, Any]
    base: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def open(cls, directory: str, base: str | None = None, trust_remote_code: bool = False) -> Teacher:
        """Read the manifest. Raises BundleError if it is missing or invalid."""
        return cls(directory, read_manifest(directory), base, trust_remote_code)

    def domain(self, *, unlabelled: bool = False) -> Domain:
        """The teacher's domain; `unlabelled` leaves rows without a label out, so that its predictions can replace them.

        A domain would otherwise refuse a log with such rows.
        """
        domain = Domain.of_manifest(self.manifest["domain"], source=f"teacher {self.directory}")
        return replace(domain, label=replace(domain.label, missing="leave_out")) if unlabelled else domain

    @property
    def source(self) -> str:
        """Directory or Hub id that holds the teacher's model configuration and tokenizer."""
        if self.manifest.get("kind") == "merged":
            return self.directory
        options = self.manifest["model_options"]
        return resolve_base(self.base) if self.base else resolve_base(options["base"], options.get("gguf_file"))

    def model_config(self) -> Any:
        """Transformers' configuration of the teacher's model."""
        return load_config(self.source, trust_remote_code=self.trust_remote_code)

    def depth(self) -> int:
        """Number of the teacher's layers."""
        return int(self.model_config().get_text_config().num_hidden_layers)

    @property
    def attention(self) -> str:
        """Attention kernel that a student of the teacher's layers needs: layers without sdpa run eager."""
        stated = self.manifest.get("attn") or self.manifest.get("model_options", {}).get("attn")
        return "eager" if stated == "eager" else "sdpa"

    def load(self, device: torch.device) -> Bundle:
        """Load the weights onto a device."""
        bundle = load_trained(self.directory, LoadOptions(base=self.base, trust_remote_code=self.trust_remote_code))
        bundle.classifier.to(device)
        return bundle
