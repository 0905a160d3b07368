"""The one error tree of kvferry.

Every failure that crosses a package boundary is one of these. A class says once whether a retry elsewhere can
help (`retryable`), which HTTP status it becomes (`http_status`) and its machine-readable `code`. Third-party errors are
translated where the third party is called. Expected outcomes (a miss, a full segment) are values, never errors.
"""

from functools import cache
from typing import ClassVar


class KVFerryError(Exception):
    """Base of the tree. `message` names the thing, the place and what to do."""

    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(KVFerryError):
    """A configuration file, an override or a machine that cannot run what the configuration asks for."""

    code = "config_error"


class ModelLoadError(ConfigError):
    """The model folder is missing, incomplete or corrupt, or of an unsupported architecture."""

    code = "model_load_error"


class RecordsDamagedError(ConfigError):
    """The file of the records is not as we left it. Nothing is served from it: what is missing could not be told."""

    code = "records_damaged"


# --- what a client sent us -------------------------------------------------------------------------------------


class InvalidRequestError(KVFerryError):
    """The request is wrong and would be wrong again: `param` names the offending field."""

    http_status = 400
    code = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt plus completion do not fit the model's context."""

    code = "context_length_exceeded"

    @staticmethod
    def says(max_context: int) -> str:
        """How its message begins: OpenAI's and vLLM's own words, by which client libraries know it."""
        return f"This model's maximum context length is {max_context} tokens"


class ModelNotFoundError(InvalidRequestError):
    """The named model is not served here."""

    http_status = 404
    code = "model_not_found"


class ResponseNotFoundError(InvalidRequestError):
    """The named response is not kept here, or not for who asks."""

    http_status = 404
    code = "response_not_found"


class PayloadTooLargeError(InvalidRequestError):
    """The request body is over the configured bound."""

    http_status = 413
    code = "payload_too_large"


class ProofError(KVFerryError):
    """The request does not prove that it comes from a process of this cluster, or comes too late or again."""

    retryable = True
    http_status = 401
    code = "proof_refused"


class KeyRefusedError(KVFerryError):
    """The request has no API key, or one that does not hold."""

    http_status = 401
    code = "invalid_api_key"


class AdminKeyError(KVFerryError):
    """The request's API key is a tenant's, and only an admin's may ask this."""

    http_status = 403
    code = "admin_key_needed"


class RateLimitError(KVFerryError):
    """The tenant has asked as much as it may, or too many wrong keys came from the client's address. `retry_after_s`:
    when it may ask again. `kind`: of what it was too much, `requests` or `tokens`."""

    retryable = True
    http_status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, kind: str = "requests") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.kind = kind


class MediaTypeError(InvalidRequestError):
    """The request's body is in a form that the server does not read."""

    http_status = 415
    code = "unsupported_media_type"


class BodyLateError(InvalidRequestError):
    """The client did not send its whole request in time."""

    http_status = 408
    code = "body_late"


# --- the state of the system -----------------------------------------------------------------------------------


class OverloadedError(KVFerryError):
    """No room now: a queue, a pool or a cache is at its configured bound. Retry later or elsewhere."""

    retryable = True
    http_status = 503
    code = "overloaded"


class NoDescriptorsError(OverloadedError):
    """This process itself has no file descriptor left for a connection: nothing is known of the other side."""

    code = "no_descriptors"


class DeadlineExceededError(KVFerryError):
    """The time that the caller gave ran out."""

    retryable = True
    http_status = 504
    code = "deadline_exceeded"


class CancelledByPeerError(KVFerryError):
    """The request was aborted by its owner while it was running."""

    http_status = 499
    code = "cancelled"


class NodeUnavailableError(KVFerryError):
    """A node refused the connection, closed it early or is draining: another node can serve the request."""

    retryable = True
    http_status = 503
    code = "node_unavailable"


class NodeVersionError(KVFerryError):
    """A node speaks no version of the nodes' API that the router does: it is there, but cannot be used."""

    http_status = 503
    code = "node_version"


class ModelChangedError(KVFerryError):
    """An answer has begun, and no node is left with the weights and settings that it began with."""

    retryable = True
    http_status = 503
    code = "model_changed"


class FormCutError(KVFerryError):
    """An answer of a given form has begun and lost its decoder, and the servers that are left would begin it anew."""

    http_status = 503
    code = "form_cut"


class FormStuckError(InvalidRequestError):
    """No token can come next in the form that the client asked for, or finding one takes more than a grammar may."""

    code = "form_stuck"


class StoppingError(KVFerryError):
    """This router has been told to stop: it takes no new request, and cuts what has not ended in time."""

    retryable = True
    http_status = 503
    code = "stopping"


class EngineDiedError(NodeUnavailableError):
    """The engine's process ended while it held the request."""

    code = "engine_died"


class NodeStalledError(NodeUnavailableError):
    """The node is there and does nothing: it was silent for longer than it ever should be, and is suspected."""

    code = "node_stalled"


class EngineError(KVFerryError):
    """The engine failed on this request (not the engine as a whole)."""

    retryable = True
    http_status = 500
    code = "engine_error"


class MetadataUnavailableError(KVFerryError):
    """The metadata server did not answer in time or not at all. Callers go on without the cache."""

    retryable = True
    http_status = 503
    code = "metadata_unavailable"


class RecordsUnavailableError(KVFerryError):
    """Records could not be read or flushed now: a full disk, etcd away. Whether a write happened is not known."""

    retryable = True
    http_status = 503
    code = "records_unavailable"


class MetadataProofError(MetadataUnavailableError):
    """Who answers at the metadata server's address refuses our proof of the secret, and has not proved to know it."""

    code = "metadata_proof_refused"


class NotLeaderError(MetadataUnavailableError):
    """This metadata server does not lead (any more): it grants nothing and writes nothing. `leader` is the URL of the
    one that does; empty: nobody is known to."""

    code = "not_leader"

    def __init__(self, message: str, *, leader: str = "", param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.leader = leader


class MetadataProtocolError(KVFerryError):
    """The metadata server or its caller said something that the protocol does not allow."""

    http_status = 400
    code = "metadata_protocol_error"


class NodeRefusedError(MetadataProtocolError):
    """The metadata server does not take this node in: it is of another cluster or model, or another process lives under
    its id."""

    http_status = 409
    code = "node_refused"


# --- moving bytes ----------------------------------------------------------------------------------------------


class TransferError(KVFerryError):
    """Bytes did not move, or not all of them. Nothing may be assumed about the target range."""

    retryable = True
    http_status = 503
    code = "transfer_error"


class PeerUnreachableError(TransferError):
    """The peer refuses connections or its connection broke."""

    code = "peer_unreachable"


class TransferTimeoutError(TransferError):
    """The peer did not finish the batch in time."""

    code = "transfer_timeout"


class SegmentUnknownError(TransferError):
    """The peer does not (any longer) hold the segment, or the range lies outside of it."""

    code = "segment_unknown"


class TransferProtocolError(TransferError):
    """The peer sent what the wire format forbids: a lie, a truncation or another version."""

    code = "transfer_protocol_error"


class TransferProofError(TransferProtocolError):
    """The peer does not prove that it belongs to this cluster, or does not believe that we do."""

    code = "transfer_proof_refused"


class TransferForgedError(TransferProofError):
    """A frame is not what its sender sealed, or not the next one: somebody between us changed what passes."""

    code = "transfer_forged"


def error_from_code(code: str, message: str) -> KVFerryError:
    """The error of the tree whose `code` a peer sent; a code that is not known here becomes an EngineError."""
    return _by_code().get(code, EngineError)(message)


@cache
def _by_code() -> dict[str, type[KVFerryError]]:
    found: dict[str, type[KVFerryError]] = {}
    pending: list[type[KVFerryError]] = [KVFerryError]
    while pending:
        kind = pending.pop()
        found.setdefault(kind.code, kind)  # a parent before its children: they may share its code
        pending.extend(kind.__subclasses__())
    return found
