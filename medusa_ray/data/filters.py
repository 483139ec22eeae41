"""What a chat says -> whether it is left out, and numbers that tell whether another says nearly the same."""

import functools
import hashlib
import re
import unicodedata

import numpy as np

from medusa_ray.config import FilterConfig

REASONS = (
    "",
    "filtered: too few characters",
    "filtered: too many characters",
    "filtered: another script",
    "filtered: keep_pattern not found",
    "filtered: drop_pattern found",
    "filtered: equal to another",
    "filtered: nearly equal to another",
    "filtered: also in test or out_of_domain",
    "left out: weight",
    "left out: over num_train or num_test",
)
(KEPT, SHORT, LONG, SCRIPT, NOT_FOUND, FOUND, EQUAL, NEARLY, CONTAMINATED, WEIGHT, LIMIT) = range(
    len(REASONS)
)

GRAM_WORDS = 13  # as in the decontamination of GPT-3's data
SHINGLE_BYTES = 8
NUM_BANDS, ROWS_PER_BAND = (
    8,
    12,
)  # two chats share a band by 93% where 90% of their shingles agree, by 10% at 70%
SHINGLES_AT_A_TIME = 4096
_random = np.random.default_rng(0)  # the same numbers in every process
_FACTORS = _random.integers(0, 2**63, (NUM_BANDS * ROWS_PER_BAND, 1), np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, (NUM_BANDS * ROWS_PER_BAND, 1), np.uint64)


class Filters:
    """The filters that look at one chat alone."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.scripts = frozenset(script.upper() for script in config.scripts)
        self.keep = re.compile(config.keep_pattern) if config.keep_pattern else None
        self.drop = re.compile(config.drop_pattern) if config.drop_pattern else None

    def reason(self, text: str) -> int:
        """Place in REASONS of the first filter that leaves the text out, or KEPT."""
        if self.config.min_characters and len(text) < self.config.min_characters:
            return SHORT
        if self.config.max_characters and len(text) > self.config.max_characters:
            return LONG
        if self.scripts and script_share(text, self.scripts) < self.config.min_script_share:
            return SCRIPT
        if self.keep and not self.keep.search(text):
            return NOT_FOUND
        if self.drop and self.drop.search(text):
            return FOUND
        return KEPT


def script_share(text: str, scripts: frozenset[str]) -> float:
    """Share of the letters that are of the scripts; 1 where there are no letters."""
    letters = [character for character in text if character.isalpha()]
    return sum(_script(letter) in scripts for letter in letters) / len(letters) if letters else 1.0


@functools.lru_cache(2**16)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def bands(text: str) -> np.ndarray:
    """NUM_BANDS numbers, of which texts that are nearly equal share at least one: MinHash over runs of bytes."""
    raw = " ".join(text.lower().split()).encode(errors="replace").ljust(SHINGLE_BYTES, b"\0")
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(raw, np.uint8), SHINGLE_BYTES)
    shingles = np.unique(_mixed(np.ascontiguousarray(windows).view("<u8").ravel()))
    least = np.full(NUM_BANDS * ROWS_PER_BAND, 2**64 - 1, np.uint64)
    for start in range(0, len(shingles), SHINGLES_AT_A_TIME):
        hashes = shingles[start : start + SHINGLES_AT_A_TIME] * _FACTORS + _OFFSETS
        least = np.minimum(least, hashes.min(axis=1))
    banded = np.zeros(NUM_BANDS, np.uint64)
    for row in least.reshape(NUM_BANDS, ROWS_PER_BAND).T:
        banded = _mixed(banded ^ row)
    return banded


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on all of the number (splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def grams(text: str) -> list[int]:
    """A number for each run of GRAM_WORDS words, or for all of a shorter text."""
    words = re.findall(r"\w+", text.lower())
    runs = (words[i : i + GRAM_WORDS] for i in range(max(1, len(words) - GRAM_WORDS + 1))) if words else ()
    return [
        int.from_bytes(
            hashlib.blake2b(" ".join(run).encode(errors="replace"), digest_size=8).digest(), "little"
        )
        for run in runs
    ]
