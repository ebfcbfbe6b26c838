"""Optional packages; the exit code of each error is tested in experiments/test_run.py."""

import sys

import pytest

from dcar.errors import MissingExtraError, import_extra


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"LoRA needs peft: pip install '.*\[lora\]'$"):
        import_extra("peft", extra="lora", needs="LoRA needs peft")


def test_a_package_that_is_there_is_given_even_where_it_is_part_of_another() -> None:
    assert import_extra("email.mime", extra="x", needs="y") is sys.modules["email.mime"]
