"""Configuration keys of earlier versions: still read, with a warning that gives the new name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from typing import Any

from llmrec_peft.errors import ConfigError

_log = logging.getLogger(__name__)

RENAMED = {
    "answers": "teacher_outputs",
    "student.heads_kept": "student.attention",
}
"""From the old name of a key or section to its new name, in the same section."""
RENAMED_VALUES = {"model.head_init": {"words": "label_words"}}
"""From a present key to its values: the old name of each, and its new name."""


def new_name(key: str, known: Collection[str], where: str) -> str:
    """The present name of a dotted key; `known` holds the keys and sections of the configuration."""
    for old, new in RENAMED.items():
        if (key == old or key.startswith(f"{old}.")) and new in known:
            _log.warning("%s: key %s is now called %s; rename it", where, old, new)
            return new + key[len(old) :]
    return key


def with_new_names(content: dict[str, Any], known: Collection[str] | None = None, where: str = "") -> dict[str, Any]:
    """The content of a configuration file by the present names of its keys and values.

    Args:
        content: nested mappings; left as they are.
        known: keys and sections of the configuration; None to rename every key of the table, without a warning.
        where: names the file in messages.

    Raises:
        ConfigError: a key is given by its old and by its new name.
    """
    renamed = copy.deepcopy(content)
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        node: Any = renamed
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name not in node or (known is not None and new not in known):
            continue
        if known is not None:
            new_name(old, known, where)
        last = new.rsplit(".", 1)[-1]
        if last in node:
            raise ConfigError(f"{where}: {old} is the old name of {new}, and both are given; remove {old}")
        node[last] = node.pop(name)
    for key, values in RENAMED_VALUES.items():
        *sections, name = key.split(".")
        node = renamed
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(name), str):
            node[name] = values.get(node[name], node[name])
    return renamed
