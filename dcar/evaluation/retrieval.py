"""The nearest training caption: what a picture from memory would be for a prompt."""

from collections.abc import Sequence

import numpy as np


class Retrieval:
    """Finds the caption that has most words in common with a prompt, by cosine.

    Words weigh by how rare they are in the captions given first.
    """

    def __init__(self, captions: Sequence[str]):
        bags = [words_of(caption) for caption in captions]
        self.column = {w: i for i, w in enumerate(sorted({w for bag in bags for w in bag}))}
        counts = np.zeros((len(bags), len(self.column)), np.float32)
        for row, bag in enumerate(bags):
            counts[row, [self.column[word] for word in bag]] = 1
        self.weight = np.log(len(bags) / counts.sum(0)).astype(np.float32)
        self.matrix = _normed(counts * self.weight)

    def nearest(self, captions: Sequence[str]) -> list[int]:
        """Of each caption, the number of the training caption; the first of equals."""
        queries = np.zeros((len(captions), len(self.column)), np.float32)
        for row, caption in enumerate(captions):
            known = [self.column[word] for word in words_of(caption) if word in self.column]
            queries[row, known] = self.weight[known]
        return (_normed(queries) @ self.matrix.T).argmax(1).tolist()


def words_of(caption: str) -> set[str]:
    return set(caption.lower().replace(",", " ").split())


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
