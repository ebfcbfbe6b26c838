"""Where a training's checkpoints come from: what it writes into them, and `--exp=lineage`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lightning import LightningDataModule
from omegaconf import DictConfig, OmegaConf

from dcar.lit.lineage import Link, Record, chain, run_lineage
from experiments.names import find
from experiments.run import RunOptions

SHORT = 12  # digits of a digest
NAMED_CHANGES = 8
HOW = {
    "resumed": "resumed from",
    "init_from": "started with the weights of",
    "exported": "made of",
}


def lineage_of(
    config: DictConfig,
    *,
    resumed: Path | None,
    datamodule: LightningDataModule,
    precision: str,
    world_size: int,
) -> dict[str, Any]:
    """`run_lineage` of a training experiment: its parent and inputs are those its config names.

    Fine-tunings have no `module.init_from`: theirs is the experiment's own, which names a model.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    module = plain["module"]
    init_from = module.get("init_from")
    if "init_from" not in module and plain.get("init_from") and not resumed:
        init_from = find(plain["init_from"], plain["outputs"], key="init_from")
    tokenizer_from = module.get("tokenizer_from")
    return run_lineage(
        plain,
        resumed=resumed,
        init_from=init_from,
        inputs={"tokenizer_from": tokenizer_from} if tokenizer_from else {},
        datamodule=datamodule,
        precision=precision,
        world_size=world_size,
    )


def _code(record: Record) -> str:
    code = record["code"]
    if code["commit"] is None:
        return f"version {code['version']}, in no repository"
    changes = " with changes" if code["dirty"] else ""
    return f"version {code['version']}, commit {code['commit'][:SHORT]}{changes}"


def _data(record: Record) -> str:
    data = record["data"]
    if data is None:
        return "not of shards"
    unlisted = f", {data['unlisted']} of them in no manifest" if data["unlisted"] else ""
    size = f"{data['samples']:,} samples, shards: {data['shards']}"
    return f"{data['sha256'][:SHORT]} ({size}{unlisted})"


def _run(record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    processes = f"{record['world_size']} process" + ("" if record["world_size"] == 1 else "es")
    return f"seed {record['seed']}, {processes}, {record['precision']}, {versions}"


def _time(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _when(record: Record) -> str:
    started = f"run started {_time(record['started'])}"
    return f"{_time(record['saved'])} ({started})" if "saved" in record else started


def _changed(changes: list[str]) -> str:
    more = len(changes) - NAMED_CHANGES
    return "; ".join(changes[:NAMED_CHANGES]) + (f"; and {more} more" if more > 0 else "")


def rows(link: Link) -> Iterator[tuple[str, str]]:
    """(label, words) of one checkpoint."""
    record = link.record
    is_folder = record["module"] == "model folder"
    yield "step", f"{record['step']} {'as a' if is_folder else 'of'} {record['module']}"
    if link.how:
        yield "file", link.standing
    yield "sha256", link.sha256
    if "config_sha256" not in record:
        yield "lineage", "none: it was written without, so what came before is not known"
        return
    yield "exp", str(record["exp"])
    yield "config", record["config_sha256"][:SHORT]
    yield "code", _code(record)
    yield "data", _data(record)
    yield "run", _run(record)
    yield "when", _when(record)
    for key, other in record["inputs"].items():
        step = f"step {other['step']} of {other['module']}, sha256 {other['sha256'][:SHORT]}"
        yield key, f"{other['path']} ({step})"
    if record.get("changed"):
        yield "changed", f"since its parent: {_changed(record['changed'])}"


def describe(links: list[Link]) -> Iterator[str]:
    """Lines of text, one block a checkpoint, the given one first."""
    for link in links:
        yield f"{HOW[link.how]} {link.path}" if link.how else link.path
        for label, words in rows(link):
            yield f"  {label:<15}{words}"
        yield ""
    last = links[-1].record
    if "config_sha256" in last and last["parent"] is None:
        yield "started from random weights"


def lineage(config: DictConfig, options: RunOptions) -> list[Link]:
    """Print the chain, from the given checkpoint back. Raises CheckpointError for none."""
    links = chain(find(str(config.ckpt), str(config.outputs), key="ckpt", models_first=False))
    for line in describe(links):
        print(line)
    return links
