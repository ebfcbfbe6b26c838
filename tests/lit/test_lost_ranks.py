"""A process that is gone is told apart from everything else that may go wrong."""

import pytest
import torch.distributed as dist

from dcar.errors import LostRankError
from dcar.lit.lost_ranks import NamesLostRanks, is_lost_rank

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[10.0.0.2]:39140. This is typically caused by a remote worker crashing."
)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError(GLOO), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_the_transport_s_errors_mean_a_lost_process(error: BaseException, lost: bool) -> None:
    assert is_lost_rank(error) is lost


class Lightning:
    """The strategy behind ours."""

    def __init__(self) -> None:
        self.told: list[BaseException] = []

    def on_exception(self, exception: BaseException) -> None:
        self.told.append(exception)


class Strategy(NamesLostRanks, Lightning):
    pass


def test_the_sentence_says_what_happened_and_how_to_go_on() -> None:
    error, strategy = RuntimeError(GLOO), Strategy()
    with pytest.raises(LostRankError, match="process of this training was lost.*--ckpt=auto") as e:
        strategy.on_exception(error)
    assert str(e.value).endswith("Connection closed by peer [10.0.0.2]:39140.)")
    assert e.value.__cause__ is error
    assert strategy.told == [error]


def test_any_other_error_stays_as_it_is() -> None:
    strategy = Strategy()
    strategy.on_exception(KeyError("image"))
    assert len(strategy.told) == 1
