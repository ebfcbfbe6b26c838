"""The table of devices is complete and of dense rates."""

import pytest

from dcar.evaluation.cost_devices import DEVICES


@pytest.mark.parametrize("name", DEVICES)
def test_half_precision_is_fastest_and_plain_fp32_slowest(name: str) -> None:
    device = DEVICES[name]
    assert device.half > device.convolution >= device.single > 0


def test_rates_are_dense_and_not_those_with_sparsity() -> None:
    assert DEVICES["a100_80"].half == 312 and DEVICES["h100"].half == pytest.approx(989, abs=1)


@pytest.mark.parametrize(("name", "printed"), [("h100", 80), ("a100_40", 40), ("rtx4090", 24)])
def test_memory_is_at_most_what_is_printed_on_the_box(name: str, printed: float) -> None:
    assert printed * 0.9 < DEVICES[name].memory_gib <= printed
