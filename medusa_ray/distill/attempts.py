"""What workers announced before they died -> which row ended them.

A worker announces a shard's rows before it generates them, in a small file beside the parts, and removes it with the
part written. A row that ends its process leaves the announcement behind: the next worker goes through the shard in
groups, the one after that through the fatal group row by row, and a row that was alone in so many deaths is set aside.
A lost node or a killed driver is nobody's fault, and counts for nothing.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import fsspec

from medusa_ray import parts, provenance

FOLDER = ".attempts"
DEATHS = 3  # of a row's worker while it generated nothing else
# Of a shard, those that wait beside it in a dying actor counted: one fatal row takes five, and may have company.
MOST_STARTS = 30


@dataclass(frozen=True)
class Announcement:
    run: str  # one driver's
    node: str
    rows: list[int] | None  # numbers in the shard; None for all at once


class Attempts:
    """The starts of one shard, this one included."""

    def __init__(self, folder: str, part: str, run: str, node: str, alive: Callable[[], set[str]]) -> None:
        """run, node: where this start runs. alive: the nodes that are there now."""
        self.folder, self.run, self.node = f"{folder}/{FOLDER}/{part}", run, node
        self.uri = f"{self.folder}/{time.time_ns():020}-{uuid.uuid4().hex}{parts.ATTEMPT}"
        earlier = self._read()
        self.num_earlier = len(earlier)
        deaths = _deaths(earlier, run, alive()) if earlier else []
        alone = Counter(death.rows[0] for death in deaths if death.rows and len(death.rows) == 1)
        self.fatal = {row: times for row, times in alone.items() if times >= DEATHS}
        self.is_careful = bool(deaths)
        groups = [death.rows for death in deaths if death.rows and len(death.rows) > 1]
        unexplained = [row for group in groups if not self.fatal.keys() & set(group) for row in group]
        # Those that were alone before come first: if one is to blame, nothing is lost that it would take along.
        self.suspects = [row for row in dict.fromkeys([*alone, *unexplained]) if row not in self.fatal]

    def groups(self, rows: list[int], size: int) -> Iterator[list[int]]:
        """The rows in the order in which to generate them, each group announced before it is yielded."""
        if not self.is_careful:
            self._announce(None)
            yield rows
            return
        suspects = [row for row in self.suspects if row in set(rows)]
        others = [row for row in rows if row not in set(suspects)]
        for group in [
            *([row] for row in suspects),
            *(others[i : i + size] for i in range(0, len(others), size)),
        ]:
            self._announce(group)
            yield group

    def end(self) -> None:
        """The part is written: nobody died of it in the end."""
        filesystem, path = fsspec.core.url_to_fs(self.folder)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    def _announce(self, rows: list[int] | None) -> None:
        provenance.write_json(self.uri, {"run": self.run, "node": self.node, "rows": rows})

    def _read(self) -> list[Announcement]:
        filesystem, path = fsspec.core.url_to_fs(self.folder)
        filesystem.invalidate_cache()
        if not filesystem.exists(path):
            return []
        files = sorted(file for file in filesystem.ls(path, detail=False) if file.endswith(parts.ATTEMPT))
        return [
            Announcement(**provenance.read_json(str(filesystem.unstrip_protocol(file)))) for file in files
        ]


def _deaths(earlier: list[Announcement], run: str, alive: set[str]) -> list[Announcement]:
    """Those that a shard's own rows may have caused, oldest first."""
    last_of = {announcement.run: number for number, announcement in enumerate(earlier)}
    return [
        announcement
        for number, announcement in enumerate(earlier)
        # The last of another run may have died with its driver, and nobody knows what became of a node that is gone.
        if announcement.node in alive and (announcement.run == run or number != last_of[announcement.run])
    ]
