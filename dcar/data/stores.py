"""Stores behind fsspec: which URLs may be opened, one file system a process, retries, and errors
that say what went wrong without showing a password."""

import functools
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn

from dcar.errors import DataError, MissingExtraError

SCHEMES = ("file", "s3", "gs", "http", "https", "hf")
OPENED = (*SCHEMES, "memory")  # memory: inside this process, harmless; what tests write to
WEB = ("http", "https")  # stores that can neither list nor write
TIMEOUT, ATTEMPTS, BACKOFF, LONGEST_WAIT = 60.0, 5, 0.5, 30.0  # seconds, but for the attempts
GONE, REFUSED, TRY_AGAIN = (404, 410), (401, 403), (408, 425, 429)  # HTTP status
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError)

Result = TypeVar("Result")


def shown(text: str | Path) -> str:
    """What may be printed: no user, password or signed query in any URL that `text` holds."""
    text = re.sub(r"://[^/\s]*@", "://***@", str(text))
    return re.sub(r"(://[^\s'\"?]*\?)(?=[^\s'\"]*=)[^\s'\"]*", r"\1***", text)


def scheme_of(url: str | Path) -> str:
    """What stands before the colon of a URL, "" for a path, even with a Windows drive letter."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", str(url))
    return match[1].lower() if match else ""


def is_remote(url: str | Path) -> bool:
    return scheme_of(url) not in ("", "file")


def check_scheme(url: str | Path, schemes: Sequence[str] = OPENED) -> None:
    """Raises ValueError for a URL that is not of one of `schemes`."""
    scheme, rest = scheme_of(url), str(url).partition(":")[2]
    if scheme == "pipe" and "pipe" not in schemes:
        raise ValueError(f"{shown(url)!r} runs a shell; only schemes that name 'pipe' allow it")
    if scheme and scheme not in schemes:
        raise ValueError(f"{shown(url)!r}: scheme {scheme!r} is none of {', '.join(schemes)}")
    if is_remote(url) and scheme != "pipe" and not rest.startswith("//"):
        raise ValueError(f"{shown(url)!r} lacks the '//' of a URL (pathlib.Path drops one '/')")


def _silence(seconds: float) -> Any:
    """The limit on a connection that brings nothing; none on the whole, shards are large."""
    from aiohttp import ClientTimeout  # comes with fsspec[http], s3fs and gcsfs

    return ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


def _configured(scheme: str, option: str) -> dict[str, Any]:
    """What the user's fsspec configuration says; an argument of ours would replace it whole."""
    return fsspec.config.conf.get(scheme, {}).get(option, {})


def _s3_options(timeout: float, once: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"connect_timeout": timeout, "read_timeout": timeout}
    if once:
        config["retries"] = {"total_max_attempts": 1}
    return {
        "config_kwargs": config | _configured("s3", "config_kwargs"),
        "use_listings_cache": False,  # other machines write, too
    }


def _web_options(timeout: float, once: bool) -> dict[str, Any]:
    client = {
        "timeout": _silence(timeout),
        "trust_env": True,  # HTTPS_PROXY and its kin
        "headers": {"Accept-Encoding": "identity"},  # so that Content-Length is the file's size
    }
    return {"client_kwargs": client | _configured("http", "client_kwargs")}


def _google_options(timeout: float, once: bool) -> dict[str, Any]:
    return {"requests_timeout": _silence(timeout), "use_listings_cache": False}


_OPTIONS: dict[str, Callable[[float, bool], dict[str, Any]]] = {
    "s3": _s3_options,
    "gs": _google_options,
    "http": _web_options,
    "https": _web_options,
}


def _keys() -> tuple[tuple[str, str], ...]:
    """What the environment says now of keys and endpoints."""
    prefixes = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST")
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(prefixes)))


@functools.cache
def _filesystem(
    scheme: str, timeout: float, once: bool, keys: tuple[tuple[str, str], ...], process: int
) -> fsspec.AbstractFileSystem:
    # In a forked process the parent's stay referenced here: to close one would wait for a thread
    # that is not there.
    try:
        options = _OPTIONS[scheme](timeout, once) if scheme in _OPTIONS else {}
        made = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        extra = f"pip install 'dcar-lightning[remote]' ({error})"
        raise MissingExtraError(
            f"{scheme}:// needs a package that is not installed: {extra}"
        ) from error
    if scheme == "s3" and once:
        made.retries = 1
    return made


def filesystem(
    url: str | Path, *, timeout: float = TIMEOUT, once: bool = True
) -> fsspec.AbstractFileSystem:
    """The fsspec file system behind a URL; one for each process, as none survives a fork.

    Keys and endpoints are what the libraries find by themselves. s3: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE and ~/.aws; AWS_ENDPOINT_URL or
    AWS_ENDPOINT_URL_S3 for another store than Amazon's. gs: GOOGLE_APPLICATION_CREDENTIALS. hf:
    HF_TOKEN. All: FSSPEC_<SCHEME>_<OPTION>, such as FSSPEC_S3_ENDPOINT_URL or FSSPEC_S3_ANON=true,
    if it is set before Python starts.

    timeout: seconds without a byte after which a connection has failed (hf has its own,
    HF_HUB_DOWNLOAD_TIMEOUT). once: the library does not try again by itself; gs and hf always do,
    a bounded number of times.
    Raises ValueError for a scheme that is not allowed, ImportError naming the extra to install.
    """
    check_scheme(url)
    return _filesystem(scheme_of(url), timeout, once, _keys(), os.getpid())


if hasattr(os, "register_at_fork"):
    # fsspec talks to stores from a thread of its own, which a forked process does not have. It
    # forgets the thread by itself, but not the lock, which another thread may have held.
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of aiohttp, gcsfs or huggingface_hub, which name it thus."""
    places = ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code"))
    found = (str(getattr(place, name, "")) for place, name in places)
    return next((int(code) for code in found if code.isdigit()), None)


def _unmasked(error: Exception) -> BaseException:
    """fsspec's http calls any failure a missing file; the cause says what it was."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or _status(cause) in GONE:
        return error
    packages = {kind.__module__.split(".")[0] for kind in type(cause).__mro__}
    return cause if packages & {"aiohttp", "asyncio"} else error


def is_missing(error: Exception, url: str | Path) -> bool:
    """Whether a store's error says that nothing is at `url`.

    A public bucket answers 403 over http for what is not there, to those who may not list it.
    """
    cause = _unmasked(error)
    hidden = scheme_of(url) in WEB and _status(cause) in REFUSED
    return hidden or isinstance(cause, FileNotFoundError) or _status(cause) in GONE


def _is_final(error: BaseException) -> bool:
    """Whether trying again is no use."""
    status = _status(error)
    if status is not None:
        return status < 500 and status not in TRY_AGAIN
    return isinstance(error, FINAL) or type(error).__name__ in NO_KEYS


def _explained(error: BaseException, url: str | Path, attempts: int) -> Exception:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in GONE:
        return FileNotFoundError(f"no file at {shown(url)}")
    words = str(getattr(error, "message", None) or error)
    if isinstance(error, TimeoutError):
        words = words or "nothing came in time"
    kind = f"HTTP {status}" if status else type(error).__name__
    reason = words if type(error) is OSError else f"{kind}: {words}"
    if isinstance(error, PermissionError) or status in REFUSED:
        return DataError(f"{shown(url)}: access refused ({shown(reason)})")
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return DataError(f"{shown(url)}: given up after {times}: {shown(reason)}")


def with_retries(
    action: Callable[[], Result],
    url: str | Path,
    *,
    attempts: int = ATTEMPTS,
    backoff: float = BACKOFF,
) -> Result:
    """What `action` returns, tried up to `attempts` times if it fails in a way that may pass.

    backoff: seconds before the second attempt, doubled each time, times a random 0.5 to 1.5.
    Raises FileNotFoundError where nothing is at `url`, DataError naming it after the last attempt.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except (ImportError, DataError):
            raise
        except Exception as error:  # each library has its own kinds
            failure = _unmasked(error)
        if attempt == attempts or _is_final(failure):
            break
        jitter = random.SystemRandom().uniform(0.5, 1.5)  # the seeded generator stays untouched
        time.sleep(min(backoff * 2 ** (attempt - 1), LONGEST_WAIT) * jitter)
    raise _explained(failure, url, attempt)  # without its cause, which may show a signed URL
