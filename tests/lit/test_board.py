"""TensorBoard on a disk that fills up: the log ends, the training does not."""

import logging
from pathlib import Path

from dcar.lit.board import TensorBoardLogger


def test_an_error_of_the_disk_is_said_once_and_ends_the_log_alone(tmp_path: Path, caplog) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logger.log_metrics({"a": 1.0}, step=1)
    events = logger.experiment.file_writer.event_writer.inner

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    events.add_event = events.flush = events.close = full
    with caplog.at_level(logging.ERROR, "dcar"):
        for step in range(2, 5):
            logger.log_metrics({"a": 1.0}, step=step)
            logger.experiment.add_text("b", "words", step)
            logger.save()
        logger.finalize("success")
    assert caplog.text.count("No space left on device") == 1
