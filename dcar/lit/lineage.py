"""Where a checkpoint comes from: its parents, settings, code and data, as plain data inside it."""

import hashlib
import json
import os
import pickle
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch

from dcar.data.shard_set import ShardSet
from dcar.data.shards import read_manifest
from dcar.data.storage import name_of
from dcar.errors import CheckpointError
from dcar.models.checkpoints import (
    file_digest,
    known_digests,
    model_folder,
    read_checkpoint,
)
from dcar.models.weights_io import SHIPPED

CODE = Path(__file__).parents[2]
# Keys, wherever they stand, whose values may differ from machine to machine: the record names the
# experiment and the number of processes by themselves, and data are told by their own hash.
MACHINE_KEYS = {
    *("exp", "outputs", "output_dir", "data_root", "loggers", "progress"),
    *("cache", "shard_cache", "num_workers"),
    *("accelerator", "devices", "num_nodes", "strategy"),
}
PLACES = ("output_dir", "outputs", "data_root")  # folders whose own place does not matter

Record = Mapping[str, Any]


def utc_now() -> str:
    """The time as it is written into records: to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def digest_of(data: Any) -> str:
    """sha256 of plain data, by its JSON with sorted keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_files(path: str | Path) -> str:
    """sha256 of a checkpoint, as it is known of it where one is; of all files of a folder."""
    path = Path(path)
    if path.is_dir():
        return digest_of({file.name: digest_of_files(file) for file in path.iterdir()})
    known = known_digests(path)
    return known[0] if len(known) == 1 else file_digest(path)  # two: it is being replaced


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without what belongs to one machine: MACHINE_KEYS, and places of folders.

    Paths below the output folders, the data's root or the code start with `<outputs>` and the like.
    """
    named = {str(config[key]): f"<{key}>" for key in PLACES if config.get(key)}
    places = sorted({str(CODE): "<code>", **named}.items(), key=lambda item: -len(item[0]))

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {str(k): v for k, v in value.items() if k not in MACHINE_KEYS}
            return {key: convert(item) for key, item in kept.items()}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        if isinstance(value, str):
            inside = (p for p in places if value == p[0] or value.startswith(f"{p[0]}/"))
            place, name = next(inside, ("", ""))
            return name + value.removeprefix(place)
        return value

    return convert(config)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}.{key}".lstrip("."))


def _shown(value: Any) -> str:
    """A value in words; a digest by its first digits."""
    return value[:12] if re.fullmatch("[0-9a-f]{40,64}", str(value)) else str(value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`max_steps: 3 -> 6` for each key whose value differs, those nearest the top first."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(before.keys() | after.keys(), key=lambda key: (key.count("."), key))
    values = ((key, before.get(key, "none"), after.get(key, "none")) for key in keys)
    return [f"{key}: {_shown(was)} -> {_shown(now)}" for key, was, now in values if was != now]


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(CODE), *arguments]
    try:  # without the lock, which would get in the way of the user's own git
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def code_version() -> dict[str, Any]:
    """The package's version and, where the code lies in its repository, the commit.

    dirty: whether `dcar` or `experiments` differ from the commit. None without a repository.
    """
    try:
        package: str | None = version("dcar-lightning")
    except PackageNotFoundError:  # used from its folder
        package = None
    commit = _git("rev-parse", "HEAD") if (CODE / ".git").exists() else None
    status = _git("status", "--porcelain", "--", "dcar", "experiments") if commit else None
    dirty = None if status is None else bool(status)
    return {"version": package, "commit": commit, "dirty": dirty}


def data_facts(sets: Iterable[ShardSet]) -> dict[str, Any]:
    """sha256 over the manifest entries of all shards and of caption shards, wherever they lie.

    shards, samples: their number. unlisted: shards without a manifest, told by name and number of
    samples alone.
    """
    entries, shards, samples, unlisted = [], 0, 0, 0
    for data in sets:
        for url, entry, count in zip(data.urls, data.entries, data.counts, strict=True):
            entries.append(asdict(entry) if entry else {"name": name_of(url), "samples": count})
            shards, samples, unlisted = shards + 1, samples + count, unlisted + (entry is None)
        for folder in data.caption_folders:
            entries += [asdict(entry) for entry in read_manifest(folder).values()]
    entries.sort(key=lambda entry: json.dumps(entry, sort_keys=True))
    return {
        "sha256": digest_of(entries),
        "shards": shards,
        "samples": samples,
        "unlisted": unlisted,
    }


@dataclass(frozen=True)
class Origin:
    """What a checkpoint or model folder says of itself. lineage: {} where it was written without.

    sha256: as `digest_of_files` gives it; for a folder that of all its files together.
    """

    path: str
    sha256: str
    module: str
    step: int | None
    lineage: dict[str, Any]

    @property
    def reference(self) -> dict[str, Any]:
        """What others keep of it."""
        return {name: getattr(self, name) for name in ("path", "sha256", "module", "step")}

    @property
    def record(self) -> dict[str, Any]:
        """Its own part of a chain: without the whole config, and without its ancestors."""
        own = {k: v for k, v in self.lineage.items() if k not in ("config", "ancestors")}
        return {"module": self.module, "step": self.step, **own}


def _header(path: Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors. Raises CheckpointError if it is none."""
    try:
        header = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        return read_checkpoint(path)  # which says what is wrong with it
    return header if isinstance(header, dict) and "dcar" in header else read_checkpoint(path)


def read_origin(path: str | Path) -> Origin:
    """Of a checkpoint or model folder; one that comes with the package is told by its name.

    Raises CheckpointError saying what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        header = _header(path)
        name, lineage = header["dcar"]["module"], header["dcar"].get("lineage") or {}
        return Origin(str(path), digest_of_files(path), name, int(header["global_step"]), lineage)
    try:
        lineage = json.loads((path / "config.json").read_text()).get("lineage") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no model folder: {error}") from error
    step = (lineage.get("parent") or {}).get("step")
    shown = path.name if path.resolve().parent == SHIPPED.resolve() else str(path)
    return Origin(shown, digest_of_files(path), "model folder", step, lineage)


def _with_parent(parent: Origin | None, how: str) -> dict[str, Any]:
    if parent is None:
        return {"parent": None, "ancestors": []}
    ancestors = [parent.record, *parent.lineage.get("ancestors", [])]
    return {"parent": {"how": how, **parent.reference}, "ancestors": ancestors}


def _compared(lineage: Record) -> dict[str, Any]:
    inputs = {key: other["sha256"] for key, other in lineage["inputs"].items()}
    data = (lineage["data"] or {}).get("sha256")
    parts = ("code", "versions", "world_size", "precision")
    return {part: lineage[part] for part in parts} | {"inputs": inputs, "data": data}


def _changes(old: Record, new: Record) -> list[str]:
    """How a resumed run's settings, code, inputs and data differ from those before."""
    settings = differences(old["config"], new["config"])
    return settings + differences(_compared(old), _compared(new))


def run_lineage(
    config: Mapping[str, Any],
    *,
    resumed: str | Path | None = None,
    init_from: str | Path | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    datamodule: Any = None,
    precision: str,
    world_size: int,
) -> dict[str, Any]:
    """What every checkpoint of one training run says of where it comes from: plain data.

    Call it before training starts, while the files that the run goes on from are still there.
    config: of the experiment, resolved, plain data. resumed: the checkpoint that is gone on from;
    it is the parent, else `init_from` is. inputs: other weights that are used, by setting.
    The records of all ancestors are copied into `ancestors`, nearest first, as files do not last.
    Raises CheckpointError for a parent or input that cannot be read.
    """
    how, path = ("resumed", resumed) if resumed else ("init_from", init_from)
    parent = read_origin(path) if path else None
    train_stream = getattr(datamodule, "train_stream", None)
    settings = portable(config)
    lineage = {
        "exp": config.get("exp"),
        "started": utc_now(),
        "seed": config.get("seed"),
        "world_size": world_size,
        "precision": precision,
        "code": code_version(),
        "versions": {"torch": str(torch.__version__), "lightning": lightning.__version__},
        "config_sha256": digest_of(settings),
        "config": settings,
        "data": data_facts(train_stream().sets) if train_stream else None,
        "inputs": {key: read_origin(other).reference for key, other in (inputs or {}).items()},
        **_with_parent(parent, how),
    }
    before = parent.lineage if parent and how == "resumed" else {}
    return lineage | {"changed": _changes(before, lineage) if before else []}


def model_lineage(checkpoint: str | Path) -> dict[str, Any]:
    """What a model folder made of a checkpoint says: the checkpoint's record, one step on."""
    parent = read_origin(checkpoint)
    own = {k: v for k, v in parent.lineage.items() if k not in ("config", "changed")}
    return own | {"saved": utc_now(), **_with_parent(parent, "exported")}


@dataclass(frozen=True)
class Link:
    """One checkpoint of a chain. how: what its child did with it, None for the first.

    standing: `here`, `kept as PATH`, `overwritten since` or `no longer there`. record: of
    `run_lineage`, with module and step; little more than these where it was written without.
    """

    path: str
    sha256: str
    how: str | None
    standing: str
    record: Record


def _standing(path: Path, sha256: str, folders: Sequence[Path]) -> str:
    if path.exists() and digest_of_files(path) == sha256:
        return "here"
    for folder in folders:
        for other in sorted(folder.glob("*.ckpt")):
            if digest_of_files(other) == sha256:
                return f"kept as {other}"
    return "overwritten since" if path.exists() else "no longer there"


def chain(path: str | Path) -> list[Link]:
    """A checkpoint or model folder and what it descends from, as far back as is known.

    The records are those inside the given file; whether the ancestors' files still lie where they
    lay is looked up, also among the other checkpoints of their folders.
    Raises CheckpointError where the first cannot be read.
    """
    origin = read_origin(path)
    links = [Link(origin.path, origin.sha256, None, "here", origin.record)]
    for record in origin.lineage.get("ancestors", []):
        parent = links[-1].record["parent"]
        file = model_folder(parent["path"])
        standing = _standing(file, parent["sha256"], [file.parent, Path(path).parent])
        links.append(Link(parent["path"], parent["sha256"], parent["how"], standing, record))
    return links
