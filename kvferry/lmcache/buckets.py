"""Buckets and folders as LMCache's users write them -> `tiers.object`. Pure."""

import re
from typing import TypedDict
from urllib.parse import urlsplit

_AWS = re.compile(r"(?P<bucket>.+)\.s3[.-](?P<region>[a-z0-9-]+)\.amazonaws\.com")
_NOT_THERE = "there are no directory buckets (S3 Express) here; nearest: an ordinary bucket, s3://BUCKET"


class ObjectSection(TypedDict, total=False):
    """A part of `tiers.object`."""

    url: str
    endpoint: str
    region: str


def bucket_section(url: str, region: object, *, encrypted: bool) -> ObjectSection:
    """Of `s3://BUCKET.s3.REGION.amazonaws.com`, of `s3://BUCKET.HOST:PORT` of another provider, which is asked by path
    here, or of `fs://[HOST:PORT]/FOLDER`. `region`: of `extra_config.s3_region`. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme == "fs":
        if "," in parts.path:
            raise ValueError("several folders; nearest: one that all nodes see, fs:///FOLDER")
        return {"url": f"file://{parts.path}"}
    section: ObjectSection = {} if region is None else {"region": str(region)}
    host = parts.netloc
    if ".s3express-" in host:
        raise ValueError(_NOT_THERE)
    if aws := _AWS.fullmatch(host):
        return {"region": aws["region"], **section, "url": f"s3://{aws['bucket']}{parts.path.rstrip('/')}"}
    bucket, dot, server = host.partition(".")
    if dot and "@" not in host:
        section["endpoint"] = f"http{'s' if encrypted else ''}://{server}"
        host = bucket
    return {**section, "url": f"s3://{host}{parts.path.rstrip('/')}"}
