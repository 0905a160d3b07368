"""One bucket or folder, through obstore: blocking calls, for threads. Needs obstore: `pip install 'kvferry[object]'`.

Owns when an object ends: in a bucket its metadata says so (`kvfend`, Unix time in seconds); a file's time of
modification is its end, of one without an end that of the year 2100. What has ended is not there, and its space is
freed by the bucket's lifecycle rule or whoever deletes old files.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from kvcore.errors import ConfigError
from kvstore.tiers.base import TierOutcome
from kvstore.tiers.objects.place import ObjectPlace

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta, PutMode
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, ObjectStore, RetryConfig, S3Config

END_NAME = "kvfend"
"""Of an object's metadata: letters alone, as every provider takes them."""
_NUMBER = re.compile(r"\d{1,15}(\.\d{1,9})?")
_WITHOUT_END = 4_102_444_800  # 1 January 2100
_FAILURES = (BaseError, OSError, ValueError, NotImplementedError)
_SECRETS = ("AWS_", "AZURE_", "GOOGLE_")
_FULL = ("No space left", "quota exceeded", "StorageFull", "QuotaExceeded", "InsufficientStorage")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")
_WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "301 Moved")
_METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What is known of an object before it is read."""

    num_bytes: int
    end: float | None
    """Unix time; None: it has none."""


class BucketError(Exception):
    """A call failed. Its text is for people and holds no credential; `outcome` is what it means for a chunk."""

    def __init__(self, text: str, outcome: TierOutcome) -> None:
        super().__init__(text)
        self.outcome = outcome


class Bucket:
    """Blocking; each call ends within about `call_s`. All methods raise FileNotFoundError for what is not there, and
    BucketError for what failed."""

    def __init__(self, place: ObjectPlace, call_s: float) -> None:
        """Raises ConfigError for a place that cannot be opened; a server that is away is none."""
        self.place = place
        self._conditional = True
        try:
            self._store = _open(place, call_s)
        except _FAILURES as error:
            raise ConfigError(f"tiers.object: {place.shown}: {_first_line(error)}") from None

    def __repr__(self) -> str:
        return f"<Bucket {self.place.shown}>"

    def head(self, path: str) -> StoredObject:
        """Whether an object is there."""
        try:
            return self._known(self._store.get(path, options={"head": True}))
        except _FAILURES as error:
            raise self._told(error) from None

    def get(self, path: str, num_bytes: int) -> tuple[StoredObject, memoryview | None]:
        """An object and its bytes; without them if it is not `num_bytes` long: then they are not read."""
        try:
            result = self._store.get(path)
            known = self._known(result)
            return known, memoryview(result.bytes()) if known.num_bytes == num_bytes else None
        except _FAILURES as error:
            raise self._told(error) from None

    def get_front(self, path: str, num_bytes: int) -> bytes | None:
        """The first bytes of an object; None where the server gives no part of one."""
        try:
            return bytes(self._store.get_range(path, start=0, end=num_bytes))
        except _FAILURES:
            return None

    def put(self, path: str, value: memoryview, *, end: float | None, overwrite: bool = False) -> bool:
        """Write an object; False: there is one, and `overwrite` is not set. A server that knows no conditional put
        overwrites in any case."""
        mode: PutMode = "overwrite" if overwrite or not self._conditional else "create"
        try:
            if self.place.folder is None:
                kept = {} if end is None else {END_NAME: f"{end:.3f}"}
                self._store.put(path, value, mode=mode, use_multipart=False, attributes=kept)
            else:
                self._store.put(path, value, mode=mode, use_multipart=False)
                os.utime(self.place.folder / path, (end or _WITHOUT_END,) * 2)
        except AlreadyExistsError:
            return False
        except _FAILURES as error:
            if mode == "create" and _knows_no_condition(error):
                self._conditional = False
                return self.put(path, value, end=end, overwrite=True)
            raise self._told(error) from None
        return True

    def set_end(self, path: str, end: float | None) -> None:
        """Give an object that is there another end. In a bucket it is read and written anew: no other way is common."""
        if self.place.folder is not None:
            os.utime(self.place.folder / path, (end or _WITHOUT_END,) * 2)
            return
        _, value = self.get(path, self.head(path).num_bytes)
        if value is not None:
            self.put(path, value, end=end, overwrite=True)

    def delete(self, *paths: str) -> None:
        """Remove objects. One that is not there is none the less."""
        try:
            self._store.delete(list(paths))
        except FileNotFoundError:
            if len(paths) > 1:  # some stores end there
                for path in paths:
                    self.delete(path)
        except _FAILURES as error:
            raise self._told(error) from None

    def pages(self, folder: str, most: int) -> Iterator[list[tuple[str, int]]]:
        """Path and bytes of the objects below `folder` (empty: of all), `most` at a time."""
        try:
            for page in self._store.list(folder or None, chunk_size=most):
                yield [(one["path"], one["size"]) for one in page]
        except FileNotFoundError:
            return
        except _FAILURES as error:
            raise self._told(error) from None

    def _known(self, result: "GetResult") -> StoredObject:
        meta: ObjectMeta = result.meta
        if self.place.folder is None:
            text = str(dict(result.attributes).get(END_NAME, ""))
            return StoredObject(meta["size"], float(text) if _NUMBER.fullmatch(text) else None)
        return StoredObject(meta["size"], meta["last_modified"].timestamp())

    def _told(self, error: Exception) -> Exception:
        text = str(error)
        if isinstance(error, FileNotFoundError) and not any(word in text for word in _NO_BUCKET):
            return error
        outcome = TierOutcome.FULL if any(word in text for word in _FULL) else TierOutcome.UNAVAILABLE
        return BucketError(f"{self.place.shown}: {said(error)}", outcome)


def _open(place: ObjectPlace, call_s: float) -> "ObjectStore":
    time_limit = timedelta(seconds=call_s)
    client: ClientConfig = {"allow_http": True, "timeout": time_limit, "connect_timeout": time_limit}
    retry: RetryConfig = {"max_retries": 0, "retry_timeout": time_limit}
    prefix = place.prefix or None
    if place.folder is not None:
        return LocalStore(place.folder, mkdir=True)
    if place.scheme == "s3":
        aws: S3Config = {}
        if place.endpoint:
            aws["endpoint"] = place.endpoint
        if place.region:
            aws["region"] = place.region
        return S3Store(place.bucket, prefix=prefix, config=aws, client_options=client, retry_config=retry)
    if place.scheme == "az":
        azure: AzureConfig = {"endpoint": place.endpoint} if place.endpoint else {}
        return AzureStore(place.bucket, prefix=prefix, config=azure, client_options=client, retry_config=retry)
    google: GCSConfig = {"base_url": place.endpoint} if place.endpoint else {}
    return GCSStore(place.bucket, prefix=prefix, config=google, client_options=client, retry_config=retry)


def said(error: Exception) -> str:
    """What an error of obstore means, in words. Addresses and bodies of answers, which may hold a signature or a token,
    are not in it."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status code: (\d{3} [A-Z][A-Za-z ]+)", text)
    answer = f"it answers {status[1].strip() if status else 'with an error'}{f', {code[1]}' if code else ''}"
    if any(server in text for server in _METADATA_SERVERS):
        return "no credentials are set in the environment, and this machine has no role that gives any"
    if any(word in text for word in _NO_BUCKET):
        return "there is no such bucket"
    if any(word in text for word in _WRONG_REGION):
        return f"{answer}; set tiers.object.region to the bucket's"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return f"it refuses the credentials of the environment: {answer}"
    if status or code:
        return answer
    if "TimedOut" in text or "kind: Timeout" in text:
        return "it did not answer in time"
    if "dns error" in text:
        return "its name is not known here"
    if system := re.search(r'([A-Z][\w -]+?) \(os error \d+\)|code: \d+,\s+kind: \w+,\s+message: "([^"]+)"', text):
        return (system[1] or system[2]).strip()
    return "it cannot be reached"


def _first_line(error: Exception) -> str:
    """Of what a configuration lacks, without any value of the environment's."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for name, value in os.environ.items():
        if name.upper().startswith(_SECRETS) and value:
            text = text.replace(value, f"${name}")
    return text


def _knows_no_condition(error: Exception) -> bool:
    return isinstance(error, NotImplementedError | NotSupportedError) or "501 Not Implemented" in str(error)
