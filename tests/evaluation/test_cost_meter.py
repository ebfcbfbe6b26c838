"""FLOPs by part against torch's own counter; bytes against tensors whose sizes are known."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dcar.evaluation.cost_meter import (
    BACKWARD,
    CONVOLUTION_RATE,
    COPIES,
    HALF_RATE,
    OTHER,
    SINGLE_RATE,
    Flops,
    Meter,
)

MIB = 2**20


def wanted(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


class Twice(nn.Module):
    """Two linear layers; activations of the second are recomputed where asked for."""

    def __init__(self, *, recompute: bool):
        super().__init__()
        self.first, self.second, self.recompute = nn.Linear(8, 8), nn.Linear(8, 4), recompute

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden)
        if self.recompute:
            return checkpoint(self._rest, hidden, use_reentrant=False)
        return self._rest(hidden)

    def _rest(self, hidden: Tensor) -> Tensor:
        return self.second(self.second(hidden).repeat(1, 2)).relu()


PRODUCTS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: F.linear(wanted(5, 6), wanted(7, 6), wanted(7)),
    "linear of data": lambda: F.linear(torch.randn(5, 6), wanted(7, 6)),
    "convolution": lambda: F.conv2d(wanted(2, 3, 8, 8), wanted(5, 3, 3, 3), stride=2, padding=1),
    "first convolution": lambda: F.conv2d(torch.randn(2, 3, 8, 8), wanted(5, 3, 3, 3)),
    "matmul": lambda: wanted(4, 5, 6) @ wanted(4, 6, 7),
    "matmul with broadcast": lambda: torch.matmul(wanted(4, 5, 6), wanted(6, 7)),
    "bmm": lambda: torch.bmm(wanted(4, 5, 6), wanted(4, 6, 7)),
    "addmm": lambda: torch.addmm(wanted(7), wanted(5, 6), wanted(6, 7)),
    "attention": lambda: F.scaled_dot_product_attention(
        wanted(2, 3, 5, 8), wanted(2, 3, 7, 8), wanted(2, 3, 7, 8)
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_and_its_gradients_count_as_torch_counts_them(name: str) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
        PRODUCTS[name]().sum().backward()
    meter = Meter()
    with meter.running():
        meter.backward(PRODUCTS[name]().sum())
    ours = sum(flops.total for flops in meter.flops.values())
    recomputed = 2 * 2 * 3 * 5 * 7 * 8 if name == "attention" else 0  # scores, by fused kernels
    assert ours - recomputed == theirs.get_total_flops() > 0


def test_a_grouped_convolution_counts_its_own_channels_alone() -> None:
    meter = Meter()
    with meter.running():
        F.conv2d(wanted(2, 8, 4, 4), wanted(8, 1, 3, 3), padding=1, groups=8)
    assert meter.flops[OTHER, CONVOLUTION_RATE].forward == 2 * (2 * 8 * 4 * 4) * 9


def test_without_gradients_there_is_no_backward_work() -> None:
    meter = Meter()
    with meter.running(), torch.no_grad():
        F.linear(wanted(5, 6), wanted(7, 6))
    assert meter.flops[OTHER, SINGLE_RATE] == Flops(forward=2 * 5 * 6 * 7)


def test_work_is_counted_under_the_name_of_the_module_that_does_it() -> None:
    first, second, meter = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)), Meter()
    with meter.watch({"first": [first], "second": [second]}), meter.running():
        second(first(first(torch.randn(5, 6))))
    once = 2 * 5 * 6 * 6
    assert meter.flops["first", SINGLE_RATE].forward == 2 * once
    assert meter.flops["second", SINGLE_RATE].forward == once
    with meter.running():
        first(torch.randn(5, 6))  # no longer watched
    assert meter.flops[OTHER, SINGLE_RATE].forward == once


def test_recomputed_activations_are_told_from_forward_work() -> None:
    both = {}
    for recompute in (False, True):
        network, meter = Twice(recompute=recompute), Meter()
        with meter.watch({"network": [network]}), meter.running():
            meter.backward(network(torch.randn(5, 8)).sum())
        both[recompute] = meter.flops["network", SINGLE_RATE]
        assert meter.part == OTHER
    first, second = 2 * 5 * 8 * 8, 2 * 5 * 8 * 4
    assert both[False] == Flops(forward=first + 2 * second, backward=first + 4 * second)
    assert both[True].forward == both[False].forward
    assert both[True].backward == both[False].backward
    assert 0 < both[True].recompute <= 2 * second


def test_half_precision_has_its_own_rate() -> None:
    meter = Meter()
    with meter.running(), torch.autocast("cpu", dtype=torch.bfloat16):
        F.linear(wanted(5, 6), wanted(7, 6))
    assert set(meter.flops) == {(OTHER, HALF_RATE)}


def test_the_peak_is_what_is_held_at_once_and_forgets_what_is_freed() -> None:
    meter = Meter()
    with meter.running():
        kept = torch.zeros(MIB // 4)
        for _ in range(3):
            passing = torch.zeros(2 * MIB // 4)
            del passing
        view = kept[1:]
    assert meter.peak_bytes == 3 * MIB and meter.peak == {OTHER: 3 * MIB}
    assert view.untyped_storage().nbytes() == MIB


def test_tensors_of_before_are_not_counted_nor_are_views_of_them() -> None:
    weight, meter = torch.zeros(MIB // 4), Meter()
    with meter.running():
        weight.view(2, -1).t().add_(1)
    assert meter.peak_bytes == 0


def test_a_tensor_at_the_address_of_one_of_before_is_counted() -> None:
    """Else the plan's largest batch hangs on what addresses the allocator gives out."""
    meter = Meter()
    for _ in range(8):
        before = torch.zeros(1000)
        with meter.running():
            before.add_(1)
        del before
    with meter.running():
        after = [torch.zeros(1000) for _ in range(8)]
    assert meter.peak_bytes == sum(tensor.nbytes for tensor in after)


def test_bytes_are_those_of_the_part_that_made_them_and_gradients_of_the_backward_pass() -> None:
    network, meter = nn.Linear(512, 512, bias=False), Meter()
    with meter.watch({"network": [network]}), meter.running():
        hidden = network(torch.zeros(512, 512))
        assert meter.peak == {OTHER: MIB, "network": MIB}
        meter.backward(hidden.sum())
    assert meter.peak["network"] == MIB and meter.peak[BACKWARD] >= MIB


def test_weights_that_autocast_copies_are_named() -> None:
    network, meter = nn.Linear(1024, 512, bias=False), Meter()
    with meter.running(), torch.autocast("cpu", dtype=torch.bfloat16):
        network(torch.zeros(1, 1024))
    assert meter.peak[COPIES] == MIB


@pytest.mark.parametrize(("as_cuda", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_norms_of_half_inputs_take_the_bytes_that_they_take_on_a_gpu(as_cuda, dtype) -> None:
    norm, meter = nn.LayerNorm(8), Meter(as_cuda=as_cuda)
    with meter.running(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype == dtype
