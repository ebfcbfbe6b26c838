"""Aspect buckets: picture shapes of about one area, and which of them a picture fits best."""

import numpy as np


class Buckets:
    """Shapes whose edges are multiples of `multiple`, one for each shorter edge, and mirrored.

    area: side in pixels of the square among them; the others have the nearest area that there is.
    max_ratio: longer to shorter edge at most. Raises ValueError for impossible settings.
    shapes: (height, width), from the widest to the tallest.
    """

    def __init__(self, *, area: int, multiple: int = 32, max_ratio: float = 2.0):
        if multiple < 1 or area < multiple or area % multiple:
            raise ValueError(f"area {area} is not a multiple of multiple {multiple}")
        if not max_ratio >= 1:
            raise ValueError(f"max_ratio is {max_ratio}; it must be at least 1")
        side = area // multiple
        shapes = set()
        for shorter in range(1, side + 1):
            longer = round(side * side / shorter)
            if longer <= max_ratio * shorter:
                shapes |= {(shorter, longer), (longer, shorter)}
        self.shapes: list[tuple[int, int]] = [
            (height * multiple, width * multiple) for height, width in sorted(shapes)
        ]
        ratios = np.log([height / width for height, width in self.shapes])
        self._bounds = (ratios[1:] + ratios[:-1]) / 2

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """(n, 2) of (width, height) -> (n,) indices into `shapes`, the nearest by log ratio.

        A zero, the edge of a picture that could not be measured, counts as one.
        """
        edges = np.log(np.maximum(sizes, 1).astype(np.float64))
        return np.searchsorted(self._bounds, edges[:, 1] - edges[:, 0])
