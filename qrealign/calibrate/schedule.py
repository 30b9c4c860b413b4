"""Which samples meet in which step, and how fast parameters move: all from the seed, so a resumed run repeats it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence


def stratified_batches(
    malicious: Sequence[int], benign: Sequence[int], *, batch_size: int, malicious_share: float, seed: int
) -> Iterator[list[int]]:
    """Yield endless batches of sample indices, each with the same share of malicious samples.

    A class is reshuffled whenever it has been used up. With a batch of one the classes alternate so that every stretch
    of steps holds the share.
    """
    rng = random.Random(seed)
    malicious_pool, benign_pool = _Pool(malicious, rng), _Pool(benign, rng)
    owed = 0.0
    while True:
        owed += batch_size * malicious_share
        count = min(batch_size, int(owed + 0.5)) if malicious else 0
        count = count if benign else batch_size
        owed -= count
        batch = [malicious_pool.draw() for _ in range(count)] + [benign_pool.draw() for _ in range(batch_size - count)]
        rng.shuffle(batch)
        yield batch


class _Pool:
    """Draws without replacement, and starts over when empty."""

    def __init__(self, items: Sequence[int], rng: random.Random) -> None:
        self.items, self.rng, self.left = list(items), rng, list[int]()

    def draw(self) -> int:
        if not self.left:
            self.left = list(self.items)
            self.rng.shuffle(self.left)
        return self.left.pop()


def warm_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Return the learning-rate factor of `step`: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def block_epochs(index: int, num_blocks: int, base: float) -> float:
    """Return the epochs of a block: half the base up to the middle block, one and a half times after it.

    Source: the release of arXiv 2601.08089 (5 and 15 of a base of 10).
    """
    return base * (0.5 if index <= num_blocks // 2 else 1.5)


class Plateau:
    """Tells when a loss has stopped falling.

    Args:
        least: share of the lowest loss so far by which the next has to be lower; 0 never stops.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self.lowest = math.inf

    def reached(self, loss: float) -> bool:
        """Take the loss of another epoch and return whether it is too close to the lowest before it, or above."""
        before, self.lowest = self.lowest, min(self.lowest, loss)
        return self.least > 0 and math.isfinite(before) and loss > before - self.least * abs(before)
