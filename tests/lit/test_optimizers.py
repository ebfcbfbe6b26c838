"""Muon and AdamW as one optimizer: steps like torch's, one state, and it resumes."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from dcar.errors import CheckpointError
from dcar.lit import optimizers
from dcar.lit.optimizers import MuonAdamW, orthogonalized
from dcar.lit.stepping import parameter_groups
from tests.toys import ToyData, toy_masked_generator, toy_trainer, weights

muon = partial(MuonAdamW, lr=0.1, aside=["embedding"], weight_decay=0.2)


class Network(nn.Module):
    """Two matrices for Muon; a kernel, an embedding, a norm and biases for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 6)
        self.other = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.kernel = nn.Conv1d(6, 2, 1)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        hidden = self.norm(self.inner(embedded) * self.other(embedded))
        return self.kernel(hidden.mT)


def take_steps(network: nn.Module, optimizers: list[Any], count: int) -> None:
    for step in range(count):
        ids = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(step))
        network.zero_grad()
        network(ids).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (1, 6, 40)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(
    shape: tuple[int, int, int],
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    u, lengths, v = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalized(matrices, torch.float32) @ v.mT
    kept = found.diagonal(dim1=1, dim2=2)
    large = lengths > 0.05 * lengths.amax(1, keepdim=True)
    assert ((kept > 0.6) & (kept < 1.3))[large].all()
    assert (found - kept.diag_embed()).abs().max() < 1e-3
    assert orthogonalized(torch.zeros(shape), torch.float32).abs().max() == 0


@pytest.mark.parametrize("at_once", [1, 2**24])  # one by one, and both in one product
def test_steps_are_those_of_torch_s_two_optimizers(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
    together, apart = Network(), Network()
    take_steps(together, [muon(parameter_groups([together]))], 3)
    inner = [apart.inner.weight, apart.other.weight]
    both = [
        Muon(inner, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        AdamW(
            [
                {"params": [apart.embedding.weight, apart.kernel.weight], "weight_decay": 0.2},
                {"params": [p for p in apart.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=0.1,
            betas=(0.9, 0.95),
        ),
    ]
    take_steps(apart, both, 3)
    start = Network().state_dict()
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        moved = (theirs - start[name]).norm()
        assert moved > 0.01 and (ours - theirs).norm() < 0.05 * moved, name  # torch's is in bf16


def test_one_schedule_sets_the_rates_of_both() -> None:
    network = Network()
    optimizer = muon(parameter_groups([network]))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(network.state_dict())
    take_steps(network, [optimizer], 1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_loaded_state_goes_on_as_if_never_saved() -> None:
    network = Network()
    optimizer = muon(parameter_groups([network]))
    take_steps(network, [optimizer], 2)
    resumed = copy.deepcopy(network)
    loaded = muon(parameter_groups([resumed]))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(network, [optimizer], 2)
    take_steps(resumed, [loaded], 2)
    for (name, ours), theirs in zip(resumed.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    kept = {tuple(state) for state in loaded.state_dict()["state"].values()}
    assert kept == {("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")}


def test_a_copy_goes_on_by_itself() -> None:
    network = Network()
    optimizer = muon(parameter_groups([network]))
    take_steps(network, [optimizer], 2)
    twin, (copied,) = copy.deepcopy((network, [optimizer]))
    take_steps(network, [optimizer], 2)
    take_steps(twin, [copied], 2)
    for (name, ours), theirs in zip(twin.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_group_that_comes_later_is_refused() -> None:
    optimizer = muon(parameter_groups([Network()]))
    with pytest.raises(ValueError, match="built with"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))]})


def test_all_weights_may_be_matrices() -> None:
    matrix = nn.Parameter(torch.eye(3))
    optimizer = MuonAdamW([{"params": [("matrix", matrix)]}], lr=0.1)
    matrix.grad = torch.ones(3, 3)
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and not torch.equal(matrix, torch.eye(3))


def test_without_a_matrix_for_muon_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aside \['weight'\] leaves no matrix"):
        MuonAdamW(parameter_groups([Network()]), lr=0.1, aside=["weight"])


def test_a_training_resumes_bit_by_bit(tmp_path: Path) -> None:
    optimizer = partial(MuonAdamW, lr=1e-2, aside=["token_embedding", "transformer.output"])

    def trained(steps: int, **more: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = toy_masked_generator(optimizer=optimizer)
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = toy_trainer(steps, callbacks=[saving], enable_checkpointing=True)
        trainer.fit(module, datamodule=ToyData(), **more)
        return weights(module)

    whole = trained(4)
    with pytest.raises(CheckpointError, match=r"optimizer has groups of .* AdamW of .*optimizer="):
        other = toy_masked_generator()  # by AdamW
        toy_trainer(4).fit(other, datamodule=ToyData(), ckpt_path=tmp_path / "step=2.ckpt")
    resumed = trained(4, ckpt_path=tmp_path / "step=2.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
