"""Counts a training step without its arithmetic: FLOPs of every product, bytes of every tensor.

Works on torch's fake tensors, which have shapes and storages but no values, and on real ones.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

HALF = (torch.float16, torch.bfloat16)
OTHER = "losses"  # the part of everything that no watched module computes
BACKWARD = "backward"  # gradients and what only the backward pass holds
COPIES = "half-precision weights"  # autocast's, kept until the step is over
# Which peak rate of a device bounds a product: see dcar.evaluation.cost_devices.Device.
HALF_RATE, CONVOLUTION_RATE, SINGLE_RATE = "half", "convolution", "single"


@dataclass(frozen=True)
class Product:
    """2 FLOPs a multiply-add. Its gradient for each operand costs as much as the product itself."""

    flops: int
    gradients: int  # operands that want a gradient
    recomputed: bool = False  # fused attention makes its scores again in the backward pass


@dataclass
class Flops:
    forward: int = 0
    backward: int = 0
    recompute: int = 0  # forward once more, where activations are checkpointed

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute


def _wanting(*operands: Tensor) -> int:
    return sum(operand.requires_grad for operand in operands)


def _linear(out: Tensor, features: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [Product(2 * out.numel() * weight.shape[1], _wanting(features, weight))]


def _convolution(
    out: Tensor, features: Tensor, weight: Tensor, *_: Any, **__: Any
) -> list[Product]:
    return [Product(2 * out.numel() * weight.shape[1:].numel(), _wanting(features, weight))]


def _matmul(out: Tensor, left: Tensor, right: Tensor, **__: Any) -> list[Product]:
    return [Product(2 * out.numel() * left.shape[-1], _wanting(left, right))]


def _add_matmul(out: Tensor, _: Tensor, left: Tensor, right: Tensor, **__: Any) -> list[Product]:
    return _matmul(out, left, right)


def _attention(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> list[Product]:
    """Scores (.., N, L), then their sum over values (.., N, D)."""
    batch, length = query.shape[:-1].numel(), key.shape[-2]
    scores = _wanting(query, key)
    return [
        Product(2 * batch * length * query.shape[-1], scores, recomputed=scores > 0),
        Product(2 * batch * length * value.shape[-1], _wanting(value) + (scores > 0)),
    ]


PRODUCTS: dict[Callable[..., Any], Callable[..., list[Product]]] = {
    F.linear: _linear,
    F.conv2d: _convolution,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _add_matmul,
    torch.baddbmm: _add_matmul,
    F.scaled_dot_product_attention: _attention,
}
# CUDA's autocast runs these in fp32, the CPU's does not: with half inputs it keeps more bytes.
FP32_ON_CUDA = (F.layer_norm, F.group_norm)


class _Products(TorchFunctionMode):
    def __init__(self, meter: "Meter", *, as_cuda: bool):
        super().__init__()
        self.meter, self.as_cuda = meter, as_cuda

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.as_cuda and func in FP32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        out = func(*args, **kwargs)
        if func in PRODUCTS:
            for product in PRODUCTS[func](out, *args, **kwargs):
                self.meter.count(product, out.dtype, is_convolution=func is F.conv2d)
        return out


class _Storages(TorchDispatchMode):
    def __init__(self, meter: "Meter"):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.meter.ignore(tensor)
        out = func(*args, **kwargs)
        is_cast = func is torch.ops.aten._to_copy.default and out.dtype in HALF
        is_copy = is_cast and self.meter.was_there(args[0])
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.meter.hold(tensor, COPIES if is_copy else self.meter.part)
        return out


@dataclass
class Meter:
    """FLOPs by part and rate, and the bytes by part at the moment when most were held.

    A part is a name given to modules by `watch`. Tensors that were there before are not counted.
    as_cuda: autocast as on a GPU, where it differs from the CPU's (fake tensors are CPU tensors).
    """

    as_cuda: bool = False
    flops: dict[tuple[str, str], Flops] = field(default_factory=lambda: defaultdict(Flops))
    peak: dict[str, int] = field(default_factory=dict)
    part: str = OTHER
    _is_backward: bool = False
    _known: set[int] = field(default_factory=set)
    # kept, so that no storage made later has the address of one
    _there: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _total: int = 0
    _peak_total: int = 0

    @property
    def peak_bytes(self) -> int:
        return self._peak_total

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        with _Products(self, as_cuda=self.as_cuda), _Storages(self):
            yield self

    @contextmanager
    def watch(self, parts: dict[str, list[nn.Module]]) -> Iterator[None]:
        """Count what these modules compute under the names they are given."""
        handles = []
        for name, modules in parts.items():
            for module in modules:
                for inner in module.modules():  # recomputation starts inside
                    handles += self._watch(name, inner)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str, module: nn.Module) -> list[Any]:
        around: list[str] = []

        def enter(*_: Any) -> None:
            around.append(self.part)
            self.part = name

        def leave(*_: Any) -> None:
            self.part = around.pop()

        return [  # a recomputation stops half way, by an exception, where no more is needed
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    def backward(self, loss: Tensor) -> None:
        """Back-propagate; whatever is computed forwards meanwhile is recomputed activations."""
        self.part, before, self._is_backward = BACKWARD, self.part, True
        # `loss.backward()` is itself seen by the mode, which is off while one of its calls runs.
        Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True
        )
        self.part, self._is_backward = before, False

    def count(self, product: Product, dtype: torch.dtype, *, is_convolution: bool) -> None:
        rate = CONVOLUTION_RATE if is_convolution else SINGLE_RATE
        flops = self.flops[self.part, HALF_RATE if dtype in HALF else rate]
        if self._is_backward:
            flops.recompute += product.flops
            return
        flops.forward += product.flops
        if torch.is_grad_enabled():
            flops.backward += product.flops * (product.gradients + product.recomputed)

    def ignore(self, tensor: Tensor) -> None:
        """An input that no metered operation made was there before: weights, kept gradients."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._there[storage._cdata] = storage

    def was_there(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._there

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count the tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._known or identity in self._there or not size:
            return
        self._known.add(identity)
        self._held[part] += size
        self._total += size
        weakref.finalize(storage, self._release, identity, part, size).atexit = False
        if self._total > self._peak_total:
            self._peak_total, self.peak = self._total, dict(self._held)

    def _release(self, identity: int, part: str, size: int) -> None:
        self._known.discard(identity)
        self._held[part] -= size
        self._total -= size
