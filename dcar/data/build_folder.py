"""The folder of a build: what tells an unfinished from a finished one, and what is swept away.

An unfinished build has `.build/settings.json`; a finished one has a manifest and nothing else.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from dcar.data.build_unit import Part, part_url, scan_url
from dcar.data.shards import MANIFEST, WORK, read_facts
from dcar.data.sources.source import Unit
from dcar.data.storage import (
    exists,
    is_remote,
    join,
    list_files,
    local_path,
    name_of,
    read_bytes,
    remove,
    write_atomically,
)
from dcar.errors import DataError

SETTINGS, UNITS = "settings.json", "units.json"


def changes(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each entry, at any depth, that is not the same in both."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from changes(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, old, new


def differences(old: Any, new: Any) -> list[str]:
    """One clause per entry that has changed."""
    return [f"{key} was {before}, is {now}" for key, before, now in changes(old, new)]


class BuildFolder:
    """`out` with shards named `<prefix>-...`, and the folder for what is needed until the end.

    settings: what decides the bytes of the result; versions: of the packages that do.
    """

    def __init__(
        self, out: str, prefix: str, *, settings: Mapping[str, Any], versions: Mapping[str, str]
    ):
        self.out, self.prefix, self.work = out, prefix, join(out, WORK)
        self.settings, self.versions = settings, versions
        self._opened = join(self.work, SETTINGS)

    def is_finished(self) -> bool:
        return exists(join(self.out, MANIFEST)) and not exists(self._opened)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One build at a time in a local folder; the lock goes when its process does."""
        if is_remote(self.out):
            yield
            return
        local_path(self.work).mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(join(self.work, "lock"), timeout=0):
                yield
        except Timeout as error:
            raise ValueError(f"out={self.out}: another build is at work in this folder") from error

    def finished_facts(self) -> dict[str, Any]:
        """The manifest's, of a finished build. Raises ValueError where it is another build's."""
        facts = read_facts(self.out)
        if "build" not in facts:
            raise ValueError(f"out={self.out} holds a {MANIFEST} that this command did not write")
        self._compare(facts["build"], self.settings, "a finished build")
        self.clear()
        return facts

    def open(self) -> None:
        """Begin a build or go on with it. Raises ValueError where it is another build's."""
        settings = {**self.settings, "versions": self.versions}
        if exists(self._opened):
            old = json.loads(read_bytes(self._opened))
            if differences(old, json.loads(json.dumps(settings))) and not self._is_begun():
                self._forget()  # nothing was built with those settings, which may have been wrong
                return self.open()
            self._compare(old, settings, "an unfinished build")
            self.sweep_partials()
            return
        if tars := [name for name in self.names() if name.endswith(".tar")]:
            self.clear()
            raise ValueError(
                f"out={self.out} holds {tars[0]}, which this command did not write; choose "
                "another folder"
            )
        self._save(SETTINGS, settings)

    def _is_begun(self) -> bool:
        """Whether an unfinished build has built anything yet."""
        return any(name.endswith(".tar") or f"{WORK}/parts/" in name for name in self.names())

    def _forget(self) -> None:
        """Removes what other settings have left, but the lock that this build holds."""
        for name in self.names():
            if name.startswith(f"{WORK}/") and not name.endswith("/lock"):
                remove(join(self.out, name))

    def close(self) -> None:
        """The manifest is written: the build is finished from the first line on."""
        remove(self._opened)
        self.clear()

    def clear(self) -> None:
        """Removes the work of a build that is finished or was never begun."""
        if not is_remote(self.out):
            shutil.rmtree(local_path(self.work), ignore_errors=True)
            return
        for name in self.names():
            if name.startswith(f"{WORK}/"):
                remove(join(self.out, name))

    def _compare(self, old: Any, new: Any, what: str) -> None:
        if clauses := differences(old, json.loads(json.dumps(new))):
            raise ValueError(
                f"out={self.out} holds {what} with other settings: {'; '.join(clauses)}. "
                "Use those settings, another folder, or delete this one to begin anew"
            )

    def _save(self, name: str, facts: Any) -> None:
        with write_atomically(join(self.work, name)) as file:
            file.write(json.dumps(facts, indent=1).encode())

    def check_units(self, units: Sequence[Unit]) -> None:
        """The input must not change between the parts of one build."""
        if not units:
            raise DataError("the source holds nothing to build from")
        listed = repr(list(units)).replace(self.work, "")  # the folder may be moved
        digest = hashlib.sha256(listed.encode()).hexdigest()
        found = {"units": len(units), "sha256": digest}
        if not exists(join(self.work, UNITS)):
            self._save(UNITS, found)
        elif (old := json.loads(read_bytes(join(self.work, UNITS)))) != found:
            raise DataError(
                f"the input has changed since the build in {self.out} was begun: it made "
                f"{old['units']} units then and makes {len(units)} of other content now. Put it "
                "back (skip_broken=true goes on without an archive that is broken), choose another "
                "folder, or delete this one to begin anew"
            )

    def names(self) -> list[str]:
        """Of all files below the folder, relative to it."""
        start = join(self.out, "x")[:-1]
        try:
            return [url.removeprefix(start) for url in list_files(self.out)]
        except FileNotFoundError:
            return []

    def sweep_partials(self) -> None:
        for name in self.names():
            if name_of(name).startswith(".") and name.endswith(".partial"):
                remove(join(self.out, name))

    def unscanned(self, units: Sequence[Unit]) -> list[Unit]:
        names = set(self.names())
        return [unit for unit in units if scan_url(WORK, unit) not in names]

    def unbuilt(self, units: Sequence[Unit]) -> list[Unit]:
        """Units without a part or its shards."""
        names = set(self.names())

        def is_built(unit: Unit) -> bool:
            return part_url(WORK, unit) in names and self._shards(unit) <= names

        return [unit for unit in units if not is_built(unit)]

    def remove_unknown(self, units: Sequence[Unit]) -> None:
        """Removes shards that no part speaks of: a unit that failed or was built again left them.

        units: all of the build, each with its part.
        """
        known = {name for unit in units for name in self._shards(unit)}
        for name in self.names():
            is_shard = name.startswith(f"{self.prefix}-") and name.endswith(".tar")
            if is_shard and name not in known:
                remove(join(self.out, name))

    def _shards(self, unit: Unit) -> set[str]:
        return {shard.name for shard in Part.load(part_url(self.work, unit)).shards}
