"""Targets of streams as prompts of their own, which are what the peers of streams read."""

import dataclasses

import numpy as np
import torch

from llmrec_peft import Domain
from llmrec_peft.data.layout import Stream
from llmrec_peft.data.streams import StreamDataset
from llmrec_peft.data.vocabulary import Vocabulary


class TargetPrompts(torch.utils.data.Dataset):
    """Targets of a stream data set, by their numbers [n], each as a prompt with its whole history.

    Attributes:
        lengths: int64 [n], tokens of each.
    """

    def __init__(self, streams: StreamDataset, numbers: np.ndarray) -> None:
        windows = np.searchsorted(streams.target_offsets, numbers, "right") - 1
        made = {window: streams[int(window)] for window in np.unique(windows)}
        self.prompts = [
            made[window].independent(int(number - streams.target_offsets[window]), streams.vocabulary.suffix)
            for window, number in zip(windows, numbers, strict=True)
        ]
        self.lengths = np.array([len(prompt.input_ids) for prompt in self.prompts])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> Stream:
        return self.prompts[number]


def texts_of(vocabulary: Vocabulary, prompts: list[Stream]) -> list[str]:
    """The texts of prompts, without what the tokenizer itself puts around a text."""
    start, end = len(vocabulary.prefix), len(vocabulary.suffix)
    inner = [prompt.input_ids[start : len(prompt.input_ids) - end].tolist() for prompt in prompts]
    return vocabulary.tokenizer.batch_decode(inner, clean_up_tokenization_spaces=False)


def draw_spread_over_users(streams: StreamDataset, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` targets at random, in turns over the users, so that they come from as many as there are."""
    order = np.random.default_rng(seed).permutation(streams.num_targets)
    users = streams.log.user_codes[streams.target_rows[order]]
    by_user, counts = np.argsort(users, kind="stable"), np.bincount(users)
    turns = np.empty(len(order), np.int64)
    turns[by_user] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort(turns, kind="stable")][:count]


def domain_with_windows(path: str, context: int, targets: int, max_length: int | None = None) -> Domain:
    """A domain file with other windows; the domain's own where `targets` is 0."""
    domain = Domain.from_yaml(path)
    changes = {"context": context, "targets": targets} if targets else {}
    changes |= {"max_length": max_length} if max_length else {}
    return dataclasses.replace(domain, stream=dataclasses.replace(domain.stream, **changes))
