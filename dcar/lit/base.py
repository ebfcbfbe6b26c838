"""What every training module shares beside its steps: random draws, weights, checkpoints."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dcar.data.batches import in_unit_range
from dcar.errors import CheckpointError
from dcar.lit.compilation import compile_backend, compile_parts
from dcar.lit.lineage import utc_now
from dcar.lit.sharding import is_sharded, shard_network, whole_state
from dcar.lit.stepping import SteppingModule, parameter_groups, take_settings
from dcar.models.checkpoints import load_strictly, read_checkpoint
from dcar.models.draws import Draws


def train_only(network: nn.Module, parts: Iterable[str]) -> None:
    """Freeze every child of `network` but `parts`; frozen children also leave training mode.

    Raises ValueError for a part that `network` does not have.
    """
    children = dict(network.named_children())
    unknown = sorted(set(parts) - set(children))
    if unknown:
        raise ValueError(f"trainable names {unknown}, but the network has {sorted(children)}")
    for name, child in children.items():
        child.requires_grad_(name in parts).train(name in parts)


class BaseModule(SteppingModule):
    """What the trainings share beside their steps: random numbers, weights, checkpoints.

    seed: of every random draw in training steps (together with epoch and batch index). compile:
    whether networks go through torch.compile, or the backend for it. The other arguments are those
    of `SteppingModule`.
    """

    val_names: tuple[str, ...]  # what the metrics of each validation set are logged under

    def __init__(self, *, seed: int = 0, compile: bool | str = False, **stepping: Any):
        super().__init__(**stepping)
        self.seed = seed
        self.backend = compile_backend(compile)
        self.plain_config: dict[str, Any] = {}  # set by the experiment, saved with the weights
        self.lineage: dict[str, Any] = {}  # set by the experiment, saved with the weights
        self.validated_step = -1

    def frozen(self) -> list[Any]:
        """Unregistered modules that must follow this one's device."""
        return []

    def configure_model(self) -> None:
        """Compile what takes the time, and split the network where the strategy asks for that."""
        if self.backend is not None:
            for module in (self, *(frozen.module for frozen in self.frozen())):
                compile_parts(module, backend=self.backend)
        if self.device_mesh is not None and not is_sharded(self.network):
            mesh = self.device_mesh["data_parallel"]
            shard_network(self.network, mesh, module_name=type(self).__name__)

    def setup(self, stage: str) -> None:
        """Raises ValueError where the data have more or fewer validation sets than names."""
        sets = getattr(self.trainer.datamodule, "val_streams", None)  # type: ignore[attr-defined]
        if sets and len(sets) != len(self.val_names):
            raise ValueError(
                f"data.val holds {list(sets)}, and module.val_names {list(self.val_names)}: give "
                "one name for each set"
            )
        for module in self.frozen():
            module.to(self.device)

    def on_validation_epoch_start(self) -> None:
        self.validated_step = self.global_step

    def draws(self, batch_idx: int, epoch: int | None = None) -> Draws:
        """The random numbers of one batch: a function of seed, epoch and place in the epoch."""
        epoch = self.current_epoch if epoch is None else epoch
        step, part = divmod(batch_idx, self.accumulate)
        return Draws(
            random.Random(f"{self.seed}/{epoch}/{step}").getrandbits(63),
            self.device,
            rank=self.global_rank,
            world=self.trainer.world_size,
            part=part,
            parts=self.accumulate,
        )

    @property
    def is_dry_run(self) -> bool:
        """One batch to see that everything fits together: what takes long is left out."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Pictures come to the device as bytes; from here on they are in [-1, 1]."""
        return in_unit_range(batch)

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        """Training batches from the start of the stream; the trainer's own position stays."""
        return self.trainer.datamodule.preview_batches()  # type: ignore[attr-defined]

    def load_network(
        self,
        path: str | Path,
        *,
        expected: tuple[str, ...],
        without: tuple[str, ...] = (),
        adapt: Callable[..., dict[str, Tensor]] = dict,
    ) -> dict[str, Tensor]:
        """Start from the (averaged) network of a checkpoint that one of `expected` modules wrote.

        without: parts of the network that stay as they are here, whatever the checkpoint holds.
        adapt: what makes this network's weights of the checkpoint's.
        Returns the checkpoint's whole state dict. Raises CheckpointError naming both modules where
        another one wrote it, and the differing keys where the architecture is another.
        """
        checkpoint = read_checkpoint(path)
        if checkpoint["dcar"]["module"] not in expected:
            raise CheckpointError(
                f"{path} was written by {checkpoint['dcar']['module']}; "
                f"{type(self).__name__} starts from {' or '.join(expected)}"
            )
        self.take_weights(adapt(checkpoint["network"]), source=path, without=without)
        return checkpoint["state_dict"]

    def take_weights(
        self, state: Mapping[str, Tensor], *, source: str | Path, without: tuple[str, ...] = ()
    ) -> None:
        """Weights of `source` for the whole network but for its parts `without`."""
        prefixes = tuple(f"{part}." for part in without)
        own = {k: v for k, v in self.network.state_dict().items() if k.startswith(prefixes)}
        given = {k: v for k, v in state.items() if not k.startswith(prefixes)}
        load_strictly(self.network, own | given, source=source)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dcar"] = {
            "module": type(self).__name__,
            "config": self.plain_config,
            "guard": self.guard.state_dict(),
            "lineage": self.lineage | {"saved": utc_now()} if self.lineage else {},
        }
        if "network" not in checkpoint:  # averaged, where averages exist
            checkpoint["network"] = whole_state(
                self.network, on_this_rank=self.trainer.is_global_zero
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settings of the optimizers are this run's, not the checkpoint's.

        Raises CheckpointError where an optimizer with other groups wrote the checkpoint.
        """
        schedules = checkpoint.get("lr_schedulers", [])
        for index, (part, saved) in enumerate(
            zip(self.optimized(), checkpoint.get("optimizer_states", []), strict=False)
        ):
            mine = self.optimizer_partial(parameter_groups(part))
            ours, theirs = (
                [len(group["params"]) for group in groups]
                for groups in (mine.param_groups, saved["param_groups"])
            )
            if ours != theirs:
                raise CheckpointError(
                    f"the checkpoint's optimizer has groups of {theirs} parameters, "
                    f"{type(mine).__name__} of {ours}: give the optimizer= that the run began with"
                )
            schedule = schedules[index] if index < len(schedules) else {}
            for change in take_settings(mine.param_groups, saved["param_groups"], schedule):
                rank_zero_info(f"from here on with {change}")
        self.guard.load_state_dict(checkpoint["dcar"]["guard"])
