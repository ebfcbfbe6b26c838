"""What a training says where one of its processes is gone and the others waited for it in vain."""

import torch.distributed as dist

from dcar.errors import LostRankError

# gloo raises a bare RuntimeError: these are the words of its transport, and of its time limit
GLOO = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch says that another process is gone, rather than what is wrong."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in GLOO)


class NamesLostRanks:
    """Before a strategy of Lightning's: raises LostRankError in place of the transport's error."""

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)  # type: ignore[misc]
        if is_lost_rank(exception):
            reason = " ".join(str(exception).split()).split(" This is typically")[0]
            raise LostRankError(
                "a process of this training was lost: it has ended or did not answer in time; its "
                f"own output says why. Go on with --ckpt=auto. ({reason})"
            ) from exception
