"""Request rows by arm and load -> a statistic as it was measured, and in resamples of the prompts and the rounds.

Requests of one prompt resemble each other, and so do those of one round, so that no interval may draw single rows:
prompts are drawn, and rounds apart from them (Owen, "The pigeonhole bootstrap", 2007). The draws are the same for
every statistic, arm and load, so what is computed of several of them holds together sample by sample.

# S samples, the first of them what was measured   P prompts   R rounds   N requests
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]  # one row of records.REQUESTS
Figure = Callable[[Row], float | None]

MIN_PROMPTS = 5  # fewer give no interval
NUM_RESAMPLES = 1000


class Drawn(NamedTuple):
    """A statistic in every sample [S], and of how many prompts it is."""

    found_S: np.ndarray
    num_prompts: int

    @property
    def point(self) -> float:
        """As measured."""
        return float(self.found_S[0])

    @property
    def interval(self) -> list[float] | None:
        """The 95% interval; None where there are fewer than MIN_PROMPTS prompts, or it is lacking in most samples."""
        drawn_S = self.found_S[1:][~np.isnan(self.found_S[1:])]
        if self.num_prompts < MIN_PROMPTS or len(drawn_S) < NUM_RESAMPLES / 2:
            return None
        # Of samples as they are: a break-even beyond what was measured is infinite, and has no middle with another.
        low, high = np.percentile(drawn_S, [2.5, 97.5], method="inverted_cdf")
        return [float(low), float(high)]


class Samples:
    """All rows of a benchmark, and the draws that its intervals share."""

    def __init__(self, rows: list[Row], seed: int = 0) -> None:
        self._rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            self._rows[row["arm"], row["load"]].append(row)
        self._prompts, self._rounds = (
            {number: place for place, number in enumerate(sorted({row[key] for row in rows}))}
            for key in ("prompt", "round")
        )
        # Two streams: more rounds must not change which prompts are drawn.
        draws = zip((self._prompts, self._rounds), np.random.SeedSequence(seed).spawn(2), strict=True)
        self._drawn = [_draws(len(places), np.random.default_rng(own)) for places, own in draws]

    def rows(self, arm: str, load: str) -> list[Row]:
        return self._rows.get((arm, load), [])

    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, _ in self._rows))

    def loads(self, *arms: str) -> set[str]:
        """Loads at which every one of the arms was measured."""
        return set.intersection(*({load for name, load in self._rows if name == arm} for arm in arms))

    def grid(self, rows: list[Row], figure: Figure) -> np.ndarray:
        """Values of good requests by prompt and round [P, R], nan where there is none.

        A prompt sent twice in a round counts once, with its mean.
        """
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        for row in rows:
            if row["error"] is None and (value := figure(row)) is not None:
                found[self._prompts[row["prompt"]], self._rounds[row["round"]]].append(value)
        values_PR = np.full((len(self._prompts), len(self._rounds)), np.nan)
        for place, values in found.items():
            values_PR[place] = np.mean(values)
        return values_PR

    def percentile(self, values_PR: np.ndarray, percent: float) -> np.ndarray:
        """[S], of the values that there are."""
        return np.concatenate([_percentile(drawn_SN, percent) for drawn_SN in self._parts(values_PR)])

    def total(self, values_PR: np.ndarray) -> np.ndarray:
        """[S], of the values that there are."""
        return np.concatenate([np.nansum(drawn_SN, axis=1) for drawn_SN in self._parts(values_PR)])

    def _parts(self, values_PR: np.ndarray) -> Iterator[np.ndarray]:
        """[S, P * R], some samples at a time, so that thousands of prompts fit into memory."""
        prompts_SP, rounds_SR = self._drawn
        for part in np.array_split(np.arange(len(prompts_SP)), 20):
            yield values_PR[prompts_SP[part, :, None], rounds_SR[part, None, :]].reshape(len(part), -1)

    def quotient(
        self, load: str, figure: Figure, percent: float = 50, rows: list[Row] | None = None
    ) -> Drawn | None:
        """Baseline over medusa of one percentile, over the (round, prompt) pairs that both answered.

        rows: those of both arms at the load, unless given. None where no pair has the figure.
        """
        both = rows if rows is not None else [*self.rows("baseline", load), *self.rows("medusa", load)]
        before_PR, after_PR = (
            self.grid([row for row in both if row["arm"] == arm], figure) for arm in ("baseline", "medusa")
        )
        lacking_PR = np.isnan(before_PR) | np.isnan(after_PR)
        if lacking_PR.all():
            return None
        before_PR[lacking_PR] = after_PR[lacking_PR] = np.nan
        return Drawn(
            self.percentile(before_PR, percent) / self.percentile(after_PR, percent), num_prompts(before_PR)
        )


def num_prompts(values_PR: np.ndarray) -> int:
    """Prompts that have a value in any round."""
    return int(np.count_nonzero(~np.isnan(values_PR).all(axis=1)))


def _draws(count: int, generator: np.random.Generator) -> np.ndarray:
    """[S, count] indices; the first line takes each once."""
    drawn = (
        generator.integers(count, size=(NUM_RESAMPLES, count)) if count else np.zeros((NUM_RESAMPLES, 0), int)
    )
    return np.concatenate([np.arange(count)[None], drawn])


def _percentile(drawn_SN: np.ndarray, percent: float) -> np.ndarray:
    """numpy's nanpercentile along the last axis, ten times faster: nan is sorted to the end and not counted."""
    sorted_SN = np.sort(drawn_SN, axis=1)
    place_S = np.maximum(np.count_nonzero(~np.isnan(sorted_SN), axis=1) - 1, 0) * percent / 100
    below_S, above_S = np.floor(place_S).astype(int), np.ceil(place_S).astype(int)
    lines = np.arange(len(sorted_SN))
    share_S = place_S - below_S
    return np.asarray((1 - share_S) * sorted_SN[lines, below_S] + share_S * sorted_SN[lines, above_S])
