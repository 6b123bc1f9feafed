"""Token sequences of many texts in one flat, memory-mapped array."""

import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.errors import DataError, output_errors

CHUNK = 32_768  # texts that are Python objects at one time


class TokenTable:
    """Tokens of texts numbered 0..n-1.

    Attributes:
        tokens: int32 [all tokens], memory-mapped.
        offsets: int64 [n + 1]; text i is tokens[offsets[i]:offsets[i + 1]].
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
        self.tokens = tokens
        self.offsets = offsets

    @classmethod
    def build(cls, vocabulary: Vocabulary, chunks: Iterable[pa.Array], total: int, what: str) -> "TokenTable":
        """Tokenise chunks of texts; equal texts of a chunk are tokenised once.

        Args:
            vocabulary: tokenises, and removes the tokens that no text may contain.
            chunks: Arrow string arrays, `total` texts in all.
            total: number of texts, for the progress bar.
            what: name on the progress bar.
        """
        lengths = []
        # The memory map keeps the file open, so that the file object can be closed at once.
        place = f"a file of tokens in {tempfile.gettempdir()}"
        full = output_errors(DataError, place, "make room, or set TMPDIR to a directory with free space")
        with full, tempfile.TemporaryFile(prefix="llmrec-tokens-") as file:
            with tqdm(total=total, desc=f"tokenising {what}", unit="text", disable=total < 4 * CHUNK) as bar:
                for chunk in chunks:
                    encoded = pc.dictionary_encode(chunk)
                    flat, offsets = vocabulary.tokens(encoded.dictionary.to_pylist())
                    picked = np.asarray(encoded.indices)
                    sizes = np.diff(offsets)[picked]
                    flat[ranges(offsets[picked], sizes)].tofile(file)
                    lengths.append(sizes)
                    bar.update(len(chunk))
            file.flush()
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths or [np.empty(0, np.int64)]))])
            offsets = offsets.astype(np.int64)
            shape = (int(offsets[-1]),)
            tokens = np.memmap(file, np.int32, mode="r", shape=shape) if shape[0] else np.empty(0, np.int32)
        return cls(tokens, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Indices of the runs starts[i] .. starts[i] + sizes[i], one after another, int64."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
