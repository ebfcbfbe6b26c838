"""Files by path and URL: found, listed, read, and written whole or not at all."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from dcar.data.storage import (
    exists,
    expand,
    join,
    list_files,
    name_of,
    open_read,
    parent,
    read_bytes,
    remove,
    write_atomically,
)
from dcar.data.stores import filesystem
from dcar.errors import DataError
from tests.servers import Fault, FaultyServer, shared_s3_server


def touch(folder: Path, *names: str) -> list[str]:
    """Files that hold their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return [str(folder / name) for name in names]


def write(url: str | Path, data: bytes) -> None:
    with write_atomically(url) as file:
        file.write(data)


def write_and_fail(url: str | Path) -> NoReturn:
    with write_atomically(url) as file:
        file.write(b"half")
        raise KeyboardInterrupt


@pytest.fixture
def folder(monkeypatch, tmp_path) -> str:
    """An empty folder of a real S3 store, with the right keys in the environment."""
    server = shared_s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket}/{tmp_path.name}"


@pytest.fixture
def wrong_key(folder, monkeypatch) -> str:
    """The same, with a secret that the store does not know."""
    write(f"{folder}/a.tar", b"shard")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    return folder


def test_braces_and_globs_become_local_files(tmp_path):
    files = touch(tmp_path, "train-000.tar", "train-001.tar", "val-000.tar")
    assert expand(f"{tmp_path}/{{val,train}}-000.tar") == [files[2], files[0]]
    assert expand(tmp_path / "train-*.tar") == files[:2]
    assert expand([files[1], f"{tmp_path}/*-000.tar"]) == [files[1], files[0], files[2]]
    assert expand(f"file://{tmp_path}/train-*.tar") == files[:2]


def test_a_file_of_several_patterns_comes_once(tmp_path):
    files = touch(tmp_path, "a-0.tar", "a-1.tar")
    assert expand([files[1], f"{tmp_path}/a-*.tar", files[0]]) == [files[1], files[0]]


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    (file,) = touch(tmp_path, "[a].tar")
    assert expand(file) == [file]


@pytest.mark.parametrize("name", ["none-*.tar", "none.tar", "a-{0..1}.tar", ""])
def test_a_pattern_without_a_file_is_named(tmp_path, name):
    touch(tmp_path, "a-0.tar")
    wanted = name.replace("{0..1}", "1")
    with pytest.raises(FileNotFoundError, match=f"no file at .*{wanted.replace('*', '.')}"):
        expand(f"{tmp_path}/{name}")


def test_remote_names_are_taken_at_their_word_and_braces_expanded():
    urls = ["gs://b/a.tar", "hf://datasets/ann/set/a-{0..1}.tar", "https://h/a.tar?sig=1*2"]
    assert expand(urls) == [
        "gs://b/a.tar",
        "hf://datasets/ann/set/a-0.tar",
        "hf://datasets/ann/set/a-1.tar",
        "https://h/a.tar?sig=1*2",
    ]


def test_a_glob_on_a_web_server_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="cannot list its files; write the names with braces"):
        expand("https://host/train-*.tar")


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "ftp://h/a.tar", "{s3,ftp}://b/a.tar"])
def test_only_listed_schemes_are_expanded(url):
    with pytest.raises(ValueError, match="runs a shell|'ftp' is none of"):
        expand(url)


def test_a_command_that_is_allowed_stays_as_it_is():
    assert expand("pipe:cat *-{0..1}.tar", schemes=("pipe",)) == [
        "pipe:cat *-0.tar",
        "pipe:cat *-1.tar",
    ]


def test_a_windows_path_is_a_path():
    with pytest.raises(FileNotFoundError, match="no file at C:"):
        expand("C:/data/train.tar")


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("a/b/c.tar", "a/b", "c.tar"),
        ("c.tar", ".", "c.tar"),
        ("/c.tar", "/", "c.tar"),
        (Path("a/c.tar"), "a", "c.tar"),
        ("file:///a/c.tar", "/a", "c.tar"),
        ("s3://bucket/a/c.tar", "s3://bucket/a", "c.tar"),
        ("s3://bucket/c.tar", "s3://bucket", "c.tar"),
        ("https://h/a/c.tar?sig=x/y", "https://h/a", "c.tar"),
    ],
)
def test_a_url_is_taken_apart_and_joined_again(url, folder, name):
    assert (parent(url), name_of(url)) == (folder, name)
    joined = join(folder, name)
    assert (parent(joined), name_of(joined)) == (folder, name)


def test_files_below_a_folder_are_listed_in_order_through_links(tmp_path):
    touch(tmp_path, "set/b.tar", "set/a/c.tar", "elsewhere/d.tar")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    found = list_files(tmp_path / "set")
    assert found == [str(tmp_path / "set" / name) for name in ("a/c.tar", "b.tar", "linked/d.tar")]
    with pytest.raises(FileNotFoundError, match="no folder at .*none"):
        list_files(tmp_path / "none")


def test_a_folder_in_place_of_its_shards_gets_a_hint(tmp_path):
    touch(tmp_path, "set/a.tar")
    with pytest.raises(FileNotFoundError, match=r"it is a folder; its shards are .*/set/\*\.tar"):
        expand(tmp_path / "set")


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    touch(tmp_path, "set/a/1.jpg", "set/b/2.jpg")
    scandir = os.scandir

    def failing(place):  # as a file server that is away, or a folder of another user
        if str(place).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PermissionError, match=r"set/b"):
        list_files(tmp_path / "set")


def test_a_link_to_a_folder_that_it_lies_in_is_not_followed(tmp_path):
    touch(tmp_path, "set/a/1.jpg", "set/b/2.jpg")
    folder = tmp_path / "set"
    (folder / "self").symlink_to(".")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "other").symlink_to(folder / "b")
    (folder / "b" / "other").symlink_to(folder / "a")
    (folder / "twice").symlink_to(folder / "b")
    found = [name.removeprefix(f"{folder}/") for name in list_files(folder)]
    assert found == [
        "a/1.jpg",
        "a/other/2.jpg",
        "b/2.jpg",
        "b/other/1.jpg",
        "twice/2.jpg",
        "twice/other/1.jpg",
    ]


def test_a_local_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "a.tar"
    with write_atomically(target) as file:
        file.write(b"whole")
        file.flush()
        assert not target.exists()
    assert read_bytes(target) == b"whole"
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(target)
    assert read_bytes(target) == b"whole"
    assert os.listdir(target.parent) == ["a.tar"]


def test_removing_twice_is_no_error(tmp_path):
    write(tmp_path / "a.tar", b"x")
    remove(tmp_path / "a.tar")
    remove(tmp_path / "a.tar")
    assert not exists(tmp_path / "a.tar")


def test_a_web_server_is_only_read(tmp_path):
    (file,) = touch(tmp_path, "a.tar")
    with FaultyServer(tmp_path) as server:
        with open_read(server.url("a.tar")) as opened:
            opened.seek(2)
            assert opened.read() == b"tar"
        with pytest.raises(ValueError, match="can only be read"):
            write(server.url("b.tar"), b"x")
        with pytest.raises(ValueError, match="cannot list"):
            list_files(server.url(""))


def test_a_busy_server_is_asked_again(tmp_path):
    touch(tmp_path, "a.tar", "b.tar")
    with FaultyServer(tmp_path) as server:
        server.faults["a.tar"] = server.faults["b.tar"] = Fault(unavailable=1)
        assert read_bytes(server.url("a.tar")) == b"a.tar"
        assert exists(server.url("b.tar"))  # 503 does not mean that it is not there


def test_what_is_missing_is_not_asked_for_again(tmp_path):
    touch(tmp_path, "private.tar")
    with FaultyServer(tmp_path) as server:
        server.faults["private.tar"] = Fault(refused=9)
        for look in (read_bytes, open_read):
            with pytest.raises(FileNotFoundError, match=f"no file at {server.url('none.tar')}"):
                look(server.url("none.tar"))
        assert not exists(server.url("none.tar"))
        assert not exists(server.url("private.tar"))  # all a public bucket says of a missing file
        with pytest.raises(DataError, match="access refused .HTTP 403"):
            read_bytes(server.url("private.tar"))


def test_a_store_finds_lists_reads_and_removes(folder):
    for name in ("train-000.tar", "train-001.tar", "sub/val-000.tar"):
        write(join(folder, name), name.encode())
    assert list_files(folder) == [
        f"{folder}/sub/val-000.tar",
        f"{folder}/train-000.tar",
        f"{folder}/train-001.tar",
    ]
    assert expand(f"{folder}/{{sub/val,train}}-*.tar") == list_files(folder)
    with open_read(f"{folder}/train-000.tar") as file:
        file.seek(6)
        assert file.read(3) == b"000"
    assert read_bytes(f"{folder}/sub/val-000.tar") == b"sub/val-000.tar"
    assert exists(f"{folder}/train-001.tar") and exists(folder)
    remove(f"{folder}/train-001.tar")
    remove(f"{folder}/train-001.tar")
    assert not exists(f"{folder}/train-001.tar")
    with pytest.raises(FileNotFoundError, match="no file at s3://.*/none-.*tar"):
        expand(f"{folder}/none-*.tar")
    with pytest.raises(FileNotFoundError, match="no files below s3://.*/none"):
        list_files(f"{folder}/none")


def test_a_signed_address_is_read_and_its_folder_is_not_mistaken_for_broken(folder):
    write(f"{folder}/a.tar", b"shard")
    url = filesystem(folder).sign(f"{folder}/a.tar", expiration=100)
    assert url.startswith("http://127.0.0.1") and "Signature=" in url
    assert read_bytes(*expand(url)) == b"shard"
    assert not exists(join(parent(url), "manifest.json"))


def test_a_file_in_a_store_appears_whole_or_not_at_all(folder):
    with write_atomically(f"{folder}/a.tar") as file:
        file.write(b"whole")
        file.flush()
        assert not exists(f"{folder}/a.tar")
    assert read_bytes(f"{folder}/a.tar") == b"whole"
    for name in ("a.tar", "b.tar"):
        with pytest.raises(KeyboardInterrupt):
            write_and_fail(f"{folder}/{name}")
    assert list_files(folder) == [f"{folder}/a.tar"]
    assert read_bytes(f"{folder}/a.tar") == b"whole"


@pytest.mark.parametrize("look", [read_bytes, open_read, exists, list_files, remove])
def test_a_wrong_key_is_refused_at_once(wrong_key, look):
    with pytest.raises(DataError, match=f"^{wrong_key}/a.tar: access refused"):
        look(f"{wrong_key}/a.tar")


def test_a_wrong_key_cannot_list_or_write(wrong_key):
    with pytest.raises(DataError, match=r"^s3://.*\*.tar: access refused"):
        expand(f"{wrong_key}/*.tar")
    with pytest.raises(DataError, match=r"^s3://.*/b.tar: access refused"):
        write(f"{wrong_key}/b.tar", b"x")
