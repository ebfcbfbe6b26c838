"""Stores: what is opened at all, what is tried again, what an error shows, what survives a fork."""

import multiprocessing
import random
import sys
import traceback
from pathlib import Path

import fsspec
import pytest

from dcar.data.stores import (
    check_scheme,
    filesystem,
    is_remote,
    scheme_of,
    shown,
    with_retries,
)
from dcar.errors import DataError
from tests.servers import FaultyServer

URL = "s3://bucket/a.tar"


class Failing:
    """Raises what it was given, one after the other, then returns "done"."""

    def __init__(self, *errors: Exception):
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class StatusError(Exception):
    """As aiohttp's ClientResponseError: the answer's status beside the words."""

    def __init__(self, status: int):
        super().__init__(f"{status}, url='https://h/a.tar?sig=abc'")
        self.status = status


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("https://h/a.tar", "https://h/a.tar"),
        ("https://ann:pa%40ss@h/a.tar", "https://***@h/a.tar"),
        ("https://ann:p@ss@h/a.tar", "https://***@h/a.tar"),
        ("https://h/a.tar?X-Amz-Signature=abc&x=1", "https://h/a.tar?***"),
        ("s3://b/train-?.tar", "s3://b/train-?.tar"),
        ("hf://datasets/ann/set@main/a.tar", "hf://datasets/ann/set@main/a.tar"),
        ("pipe:curl 'https://ann:pass@h/a?k=v' | cat", "pipe:curl 'https://***@h/a?***' | cat"),
        ("/data/a@b?c=d.tar", "/data/a@b?c=d.tar"),
    ],
)
def test_what_is_shown_of_a_url_holds_no_secret(url, printed):
    assert shown(url) == printed


def test_a_drive_letter_is_no_scheme():
    assert [scheme_of(url) for url in ("C:\\data", "c:/data", "/a:b", "a/b", URL, "HTTPS://h")] == [
        *("", "", "", "", "s3", "https")
    ]
    assert not is_remote("C:/data") and not is_remote("file:///a") and is_remote("pipe:cat a")


@pytest.mark.parametrize(
    "url", ["ftp://h/a.tar", "simplecache::s3://b/a.tar", "zip://a.tar", "c++:a"]
)
def test_a_scheme_that_is_not_listed_is_refused_by_name(url):
    with pytest.raises(ValueError, match=f"scheme '{scheme_of(url)[:3]}.*none of file, s3, gs"):
        check_scheme(url)


def test_pipe_is_refused_unless_it_is_named():
    with pytest.raises(ValueError, match="runs a shell"):
        check_scheme("pipe:cat a.tar")
    check_scheme("pipe:cat a.tar", ("file", "pipe"))


def test_a_url_that_went_through_a_path_is_refused():
    with pytest.raises(ValueError, match="'s3:/bucket/a.tar' lacks the '//'"):
        check_scheme(Path(URL))


def test_what_may_pass_is_tried_again_and_only_so_often():
    action = Failing(ConnectionResetError(), StatusError(503), StatusError(429))
    assert with_retries(action, URL, attempts=4, backoff=0) == "done"
    action = Failing(*(StatusError(503) for _ in range(9)))
    with pytest.raises(DataError, match="^s3://bucket/a.tar: given up after 3 attempts: HTTP 503"):
        with_retries(action, URL, attempts=3, backoff=0)
    assert action.calls == 3


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FileNotFoundError("x"), FileNotFoundError, "no file at s3://bucket/a.tar"),
        (StatusError(404), FileNotFoundError, "no file at s3://bucket/a.tar"),
        (PermissionError("wrong key"), DataError, "access refused .PermissionError: wrong key"),
        (StatusError(401), DataError, "access refused .HTTP 401"),
        (StatusError(400), DataError, "given up after 1 attempt: HTTP 400"),
        (ValueError("bad bucket"), DataError, "given up after 1 attempt: ValueError: bad bucket"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(error, kind, words):
    action = Failing(error)
    with pytest.raises(kind, match=words):
        with_retries(action, URL, backoff=60)
    assert action.calls == 1


def test_a_missing_package_is_no_fault_of_the_store():
    with pytest.raises(ImportError, match="s3fs"):
        with_retries(Failing(ImportError("s3fs")), URL, backoff=60)


def test_the_trace_of_an_error_shows_no_signature():
    error = StatusError(403)
    with pytest.raises(DataError) as caught:
        with_retries(Failing(error), "https://h/a.tar?sig=abc")
    trace = "".join(traceback.format_exception(caught.value))
    assert "https://h/a.tar?***: access refused" in trace
    assert str(error) not in trace


def test_waiting_leaves_the_seeded_generator_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    with_retries(Failing(OSError(), OSError()), URL, backoff=0.001)
    assert random.random() == expected


def _cat(url: str, results: multiprocessing.SimpleQueue) -> None:
    try:
        results.put(filesystem(url).cat_file(url))
    except Exception as error:
        results.put(repr(error))


def test_a_forked_process_does_not_use_its_parents_connections(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"shard")
    fork = multiprocessing.get_context("fork")
    with FaultyServer(tmp_path) as server:
        url, results = server.url("a.tar"), fork.SimpleQueue()
        assert filesystem(url).cat_file(url) == b"shard"
        child = fork.Process(target=_cat, args=(url, results))
        with fsspec.asyn.get_lock():  # as if another thread was about to use it, too
            child.start()
        child.join(timeout=20)
        child.kill()
        assert child.exitcode == 0 and results.get() == b"shard"
        assert filesystem(url) is filesystem(url)
        assert filesystem(url).cat_file(url) == b"shard"  # and the parent goes on


def test_new_keys_in_the_environment_are_taken_up(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")
    old = filesystem(URL)
    assert filesystem(URL) is old
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "new")
    assert filesystem(URL) is not old


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match="^gs:// needs .*: pip install 'dcar-lightning.remote.'"):
        filesystem("gs://bucket/a.tar")
