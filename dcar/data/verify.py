"""Every altered or unusable shard of a folder, named: one task a shard, over several processes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from dcar.data.distributors import Processes, Tick
from dcar.data.shard_check import (
    LISTED,
    ShardCheck,
    ShardFile,
    check_shard,
    open_tar,
    tar_samples,
)
from dcar.data.shards import (
    MANIFEST,
    ShardEntry,
    read_facts,
    read_manifest,
    read_sizes,
    read_splits,
    split_of,
)
from dcar.data.storage import exists, join, list_files, name_of, open_read, parent
from dcar.data.wording import amount

SMALL = 64 * 2**20  # bytes that one process looks through while others would start

ShardTask = tuple[str, ShardEntry | None, np.ndarray | None]  # url, manifest's word, sizes


class _Looked(Protocol):
    """What a task over one shard returns, whatever else."""

    samples: int
    size: int


Looked = TypeVar("Looked", bound=_Looked)


def quiet(samples: int, size: int) -> None:
    """For nobody who waits."""


def shard_urls(folder: str | Path) -> list[str]:
    """The shards that lie in a folder itself, by name."""
    inside = parent(join(folder, "x"))  # as `parent` spells it: `./a`, `a//b` and `file:` are many
    return [u for u in list_files(folder) if u.endswith(".tar") and parent(u) == inside]


def splits_of(folder: str | Path) -> dict[str, str]:
    """Split of each shard that is there or in the manifest; raises as `read_splits` does."""
    return {name_of(u): split_of(name_of(u)) for u in shard_urls(folder)} | read_splits(folder)


def _find_repeated(folder: str, checks: Sequence[ShardCheck]) -> None:
    """Keys that come again in a split, in the same shard or another, are problems of the latter."""
    if not checks:
        return
    hashes = np.concatenate([check.keys for check in checks])
    starts = np.cumsum([0, *(len(check.keys) for check in checks)])
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    for number, check in enumerate(checks):
        mine = again[(again >= starts[number]) & (again < starts[number + 1])]
        owners = np.searchsorted(starts, first[inverse[mine]], side="right") - 1
        keys = _keys_at(join(folder, check.name), mine - starts[number]) if len(mine) else []
        for key, owner in zip(keys, owners.tolist(), strict=False):
            check.add("duplicate key", key, f"first in {checks[owner].name}")


def _keys_at(url: str, positions: np.ndarray) -> Iterator[str]:
    wanted = set(positions.tolist())
    with open_read(url) as stream, open_tar(ShardFile(stream)) as tar:
        samples = islice(tar_samples(tar, ShardCheck(""), deep=False), max(wanted) + 1)
        for position, sample in enumerate(samples):
            if position in wanted:
                yield str(sample["__key__"])


def over_processes(
    function: Callable[..., Looked],
    tasks: Sequence[ShardTask],
    processes: int | None,
    tick: Tick,
) -> Iterator[Looked]:
    """Results of `function(*task)` as they are finished.

    processes: 1 is this one; None is one a core, and 1 where starting them would take longer.
    Raises DataError when a process is killed.
    """
    if processes is None and sum(entry.bytes if entry else SMALL for _, entry, _ in tasks) < SMALL:
        processes = 1
    pool = Processes(processes)
    if pool.workers > 1 and len(tasks) > 1:
        yield from cast(Iterator[Looked], pool.run(cast(Any, function), tasks, tick))
        return
    samples = size = 0
    for task in tasks:
        result = function(*task)
        samples, size = samples + result.samples, size + result.size
        tick(samples, size)
        yield result


def wants_captions(folder: str | Path, captioned: bool | None) -> bool | None:
    """`captioned` where it is given; False where the folder was built without captions."""
    if captioned is not None:
        return captioned
    source = read_facts(folder).get("build", {}).get("source", {})
    return False if source.get("captioned") is False else None


@dataclass(frozen=True)
class Report:
    """What `verify` found, shard by shard in the order of their names."""

    folder: str
    has_manifest: bool
    checks: list[ShardCheck]

    @property
    def counts(self) -> Counter[str]:
        """Problems by reason, most frequent first."""
        total: Counter[str] = Counter()
        for check in self.checks:
            total.update(check.counts)
        return Counter(dict(total.most_common()))

    @property
    def altered(self) -> list[str]:
        """Names of the shards with any problem."""
        return [check.name for check in self.checks if check.counts]

    @property
    def summary(self) -> str:
        shards, samples = len(self.checks), sum(check.samples for check in self.checks)
        wrong, found = len(self.altered), self.counts.total()
        looked = f"{self.folder}: {amount(shards, 'shard')}, {amount(samples, 'sample')}"
        if not found:
            return f"{looked}, all well"
        return f"{looked}, {amount(found, 'problem')} in {amount(wrong, 'shard')}"

    def lines(self, listed: int = LISTED) -> Iterator[str]:
        """A heading for each reason and below it at most `listed` of its problems, one a line."""
        problems = [problem for check in self.checks for problem in check.problems]
        for reason, count in self.counts.items():
            mine = [problem for problem in problems if problem.reason == reason]
            names = {problem.shard for problem in mine}
            yield f"{reason}: {count} in {amount(len(names), 'shard')}"
            yield from (f"  {problem}" for problem in mine[:listed])
            if count > listed:
                yield f"  ... and {count - min(listed, len(mine))} more"


def verify(
    folder: str | Path,
    *,
    deep: bool = True,
    captioned: bool | None = None,
    processes: int | None = None,
    tick: Tick = quiet,
) -> Report:
    """Look at every shard of a folder, local or remote, and at its manifest where there is one.

    deep: also open every sample. captioned: whether words are required; None: of every sample
    without a class or tokens. processes: as for `over_processes`. tick: is told now and then how
    many samples and bytes have been looked at.
    Raises FileNotFoundError for a folder without shards and without a manifest, DataError for a
    manifest or sizes.npz that cannot be read; whatever else is wrong stands in the report.
    """
    present = {name_of(url): url for url in shard_urls(folder)}
    manifest, sizes = read_manifest(folder), read_sizes(folder)
    listed = exists(join(folder, MANIFEST))
    if not present and not manifest:
        raise FileNotFoundError(f"no shard (*.tar) in {folder}")
    tasks = [(url, manifest.get(name), sizes.get(name)) for name, url in present.items()]
    check = partial(check_shard, deep=deep, captioned=wants_captions(folder, captioned))
    checks = list(over_processes(check, tasks, processes, tick))
    for found in checks:
        if listed and found.name not in manifest:
            found.add("not in the manifest")
    for name in manifest.keys() - present.keys():
        checks.append(ShardCheck(name))
        checks[-1].add("missing")
    checks.sort(key=lambda check: check.name)
    splits = splits_of(folder)
    for split in sorted(set(splits.values())):
        _find_repeated(str(folder), [check for check in checks if splits[check.name] == split])
    return Report(str(folder), listed, checks)
