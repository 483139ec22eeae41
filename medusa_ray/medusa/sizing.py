"""Measured step times and acceptance -> how many nodes of a tree pay at the present load.

A tree's paths are ordered best first, so every prefix of its nodes is a tree, and choosing a size is a slice. One
sequence alone leaves a processor idle, and many nodes cost it little; thirty-two do not, and the best tree may be none.
"""

from bisect import bisect_left

from medusa_ray.medusa.tree import Tree

HYSTERESIS = 1.05  # another size must be so much better, or noise would make sizes flap
MEMORY = 400  # row-steps over which acceptance is averaged
PRIOR = 20  # row-steps that the first estimate counts for
REVIEW_EVERY = (
    8  # steps; choosing costs some hundredths of a millisecond, which a small base's steps would feel
)
STEPS_BESIDE = 64  # over which the time beside what was measured is averaged
PROBE_EVERY = 128  # steps between two with the whole tree: what is never tried is never learnt

StepTimes = dict[int, dict[int, float]]  # rows -> nodes -> seconds of a step


class TreeSizer:
    """Picks a size for each step, and learns from each what was accepted."""

    def __init__(self, tree: Tree, times: StepTimes) -> None:
        """times: of every size that may be picked, the root counted, at some numbers of rows."""
        self.times, self.rows = times, sorted(times)
        self.sizes = sorted(times[self.rows[0]])
        self.size = self.sizes[-1]
        self._walks = [
            walked[: depth + 1] for walked, depth in zip(tree.walk_ND.tolist(), tree.depths, strict=True)
        ]
        # Of each node: how often the base agrees with all of its walk. To begin with, any guess but a first is poor.
        self.chances = [1.0, *(0.5 ** (len(path) + sum(path)) for path in tree.paths)]
        self._num_seen = [PRIOR] * len(tree)
        self._num_steps, self._load = 0, (0, 0.0)
        self._beside_s = 0.0  # what a step takes beside what was measured: Python's part, most of all

    def pick(self, num_rows: int, share: float = 1.0) -> int:
        """Nodes of the next step, the root counted. share: of the rows, those that want guesses."""
        self._num_steps += 1
        if self._num_steps % PROBE_EVERY == 0:
            return self.sizes[-1]
        if (num_rows, share) != self._load or self._num_steps % REVIEW_EVERY == 0:
            self._load, best = (num_rows, share), self.best(num_rows, share)
            if self.rate(num_rows, best, share) > HYSTERESIS * self.rate(num_rows, self.size, share):
                self.size = best
        return self.size

    def best(self, num_rows: int, share: float = 1.0) -> int:
        """The size that gives most tokens per second."""
        return max(self.sizes, key=lambda size: self.rate(num_rows, size, share))

    def rate(self, num_rows: int, size: int, share: float = 1.0) -> float:
        """Tokens per second that a sequence is expected to get, on the average of those with guesses and without."""
        return (1 - share + share * self.tokens(size)) / self.seconds(num_rows, size)

    def tokens(self, size: int) -> float:
        """Tokens that a step of a sequence is expected to commit."""
        return sum(self.chances[:size])

    def seconds(self, num_rows: int, size: int) -> float:
        """Time that a step is expected to take."""
        return self._measured(num_rows, size) + self._beside_s

    def _measured(self, num_rows: int, size: int) -> float:
        """On the line between the numbers of rows that were measured."""
        place = min(max(bisect_left(self.rows, num_rows), 1), len(self.rows) - 1)
        if len(self.rows) == 1:
            return self.times[self.rows[0]][size]
        low, high = self.rows[place - 1], self.rows[place]
        share = (num_rows - low) / (high - low)
        return (1 - share) * self.times[low][size] + share * self.times[high][size]

    def took(self, num_rows: int, size: int, seconds: float) -> None:
        """Takes in the time of a whole step."""
        beside_s = max(seconds - self._measured(num_rows, size), 0)
        self._beside_s += (beside_s - self._beside_s) / STEPS_BESIDE

    def learn(self, size: int, ends: list[int]) -> None:
        """Takes in a step of `size` nodes whose rows ended their walks at these nodes."""
        hits = [0] * size
        for end in ends:
            for node in self._walks[end]:
                hits[node] += 1
        for node in range(1, size):
            self._num_seen[node] = min(self._num_seen[node] + len(ends), MEMORY)
            weight = min(1.0, len(ends) / self._num_seen[node])
            self.chances[node] += weight * (hits[node] / len(ends) - self.chances[node])


def doublings(largest: int) -> list[int]:
    """1, 2, 4, 8 ... and the largest itself."""
    return [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest] if largest else []
