"""The check of the bucket or folder of `tiers.object`: a small object is written there, read and removed."""

import secrets

from kvcore.errors import ConfigError
from kvferry.doctor.findings import Context, Finding
from kvstore.tiers.objects.place import ObjectPlace
from kvstore.tiers.objects.tier import open_bucket

_OBJECT = "tiers.object"


def check_objects(context: Context) -> list[Finding]:
    """Do what a node does, with an object of a few bytes. Blocking, for three calls of `tiers.object.timeout_s`."""
    config = context.config.tiers.object
    if config is None:
        return []
    from kvstore.tiers.objects.bucket import BucketError

    try:
        bucket = open_bucket(config)
    except ConfigError as error:
        return [Finding(_OBJECT, False, error.message, "correct tiers.object, or install what it needs")]
    path, wanted = f"kvferry-doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        bucket.put(path, memoryview(wanted), end=None)
        _, found = bucket.get(path, len(wanted))
        bucket.delete(path)
    except (BucketError, FileNotFoundError) as error:
        remedy = "correct tiers.object or the credentials in the environment; without it chunks are computed"
        detail = str(error) if isinstance(error, BucketError) else f"{bucket.place.shown}: it forgot what it was given"
        return [Finding(_OBJECT, False, detail, remedy)]
    if found is None or bytes(found) != wanted:
        return [Finding(_OBJECT, False, f"{bucket.place.shown}: it gave back other bytes", "name another place")]
    return [Finding(_OBJECT, True, f"{bucket.place.shown}: written, read and removed; {_room(bucket.place)}")]


def _room(place: ObjectPlace) -> str:
    """Who makes room there: not the tier."""
    if place.folder is not None:
        return "nothing is evicted there: delete old files from time to time"
    return "nothing is evicted there: give the bucket a lifecycle rule"
