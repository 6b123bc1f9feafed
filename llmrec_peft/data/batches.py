"""Group rows of tokens by length, so that batches hold little padding."""

import numpy as np

PAD = -1  # segment of padding: no token sees it


def plan_micro_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Group rows so that each group, padded to its longest, holds at most `max_tokens` tokens.

    Rows of similar length are grouped, longest first. A row longer than `max_tokens` forms a group of its own.

    Args:
        lengths: int [rows], tokens of each row.
        max_tokens: tokens of a padded group.

    Returns:
        Row numbers of each group; every row is in exactly one group.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups, start = [], 0
    while start < len(order):
        rows = max(1, max_tokens // max(1, int(lengths[order[start]])))
        groups.append(order[start : start + rows])
        start += rows
    return groups
