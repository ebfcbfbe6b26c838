"""FSDP2: the generator's weights, gradients, optimizer state and average in pieces over the ranks.

Checkpoints are whole and the same as those of any other strategy.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from dcar.lit.lost_ranks import NamesLostRanks
from dcar.models.generator import HybridGenerator


def own_piece(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, for which all ranks must ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, in pieces like those of `sharded`."""
    if not isinstance(sharded, DTensor):
        return tensor
    on_device = tensor.to(sharded.to_local().device)
    return distribute_tensor(on_device, sharded.device_mesh, sharded.placements, src_data_rank=None)


def _units(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def is_sharded(network: nn.Module) -> bool:
    return bool(_units(network))


def _whole_on_cpu(value: Any, *, on_this_rank: bool = True) -> Any:
    """Every rank takes part; one that does not need the whole gets empty tensors."""

    def whole_piece(piece: DTensor) -> Tensor:
        tensor = piece.full_tensor()
        return tensor.cpu() if on_this_rank else torch.empty(0)

    return tree_map_only(DTensor, whole_piece, value)


def whole_state(module: nn.Module, *, on_this_rank: bool = True) -> dict[str, Any]:
    """`module.state_dict()`, put together on the CPU where the module is sharded.

    To save it, only the rank that writes should have it: the ranks of a node share its memory.
    """
    state = module.state_dict()
    return _whole_on_cpu(state, on_this_rank=on_this_rank) if is_sharded(module) else state


def load_whole(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`module.load_state_dict` of whole tensors, whether or not the module is sharded."""
    own = module.state_dict()
    pieces = {name: piece_like(t, own[name]) if name in own else t for name, t in state.items()}
    module.load_state_dict(pieces, strict=strict)


def shard_network(network: nn.Module, mesh: DeviceMesh, *, module_name: str) -> None:
    """Split the parameters of the generator's network over the ranks of `mesh`, in place.

    A unit, which is put together while it computes, is a block of the transformer, the keys and
    values that it takes from the captions, the residual head, the text encoder, or what is left.
    Raises ValueError for the network of a `module_name` that trains something else.
    """
    generator: Any = dict(network.named_children()).get("generator")
    if not isinstance(generator, HybridGenerator):
        raise ValueError(
            f"trainer.strategy=fsdp2 splits the network of MaskedARGenerator; {module_name} "
            "trains with trainer.strategy=ddp"
        )
    blocks = list(generator.transformer.blocks)
    # computed for all blocks before the first one runs
    keys_values = [block.get_submodule("cross_attention.key_value") for block in blocks]
    head = [generator.residual_head] if generator.residual_head is not None else []
    for unit in (*keys_values, *blocks, *head, generator):
        # in pieces again after any forward pass, one without a backward pass after it included
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for unit in head:
        register_fsdp_forward_method(unit, "loss")
    register_fsdp_forward_method(generator, "losses")
    _prefetch([generator, *head, *reversed(blocks), *reversed(keys_values), generator])
    for name, part in network.named_children():
        if name != "generator":
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _prefetch(backward_order: Sequence[Any]) -> None:
    """Each unit asks for the next one's weights while its own backward pass runs.

    Left alone, FSDP2 goes by the forward passes since the last backward pass, those of validation
    among them: ranks with different numbers of these would wait for different units.
    """
    for unit, following in zip(backward_order[:-1], backward_order[1:], strict=True):
        unit.set_modules_to_backward_prefetch([following])


@torch.no_grad()
def hold_whole(network: nn.Module) -> None:
    """Put every parameter together and keep it so: forward passes then wait for no other rank."""
    for unit in _units(network):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def hold_pieces(network: nn.Module) -> None:
    """Back to pieces after `hold_whole`; nothing where the network is in pieces or not sharded."""
    for unit in _units(network):
        unit.reshard()
        unit.set_reshard_after_forward(True, recurse=False)


class ShardedStrategy(NamesLostRanks, ModelParallelStrategy):
    """Trains `MaskedARGenerator` with FSDP2 on all ranks.

    Validation runs on whole weights: ranks have different numbers of batches, and only the first
    one draws pictures. Raises ValueError naming any other module. timeout: of a collective, after
    which a rank that is waited for counts as lost.
    """

    def __init__(self, *, ranks: int, timeout: timedelta):
        super().__init__(
            data_parallel_size=ranks,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """On every rank, through the same plugin as with any other strategy."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = cast(nn.Module, self.lightning_module)
        return whole_state(module, on_this_rank=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_whole(cast(nn.Module, self.lightning_module), checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return _whole_on_cpu(optimizer.state_dict(), on_this_rank=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_in_pieces(state, optimizer))

    def on_validation_start(self) -> None:
        hold_whole(cast(nn.Module, self.lightning_module))

    def on_validation_end(self) -> None:
        hold_pieces(cast(nn.Module, self.lightning_module))


def _in_pieces(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state of whole tensors, those of a parameter's shape split as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))
    entries = {
        number: {
            name: piece_like(value, of_number[number])
            if isinstance(value, Tensor) and value.shape == of_number[number].shape
            else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return state | {"state": entries}
