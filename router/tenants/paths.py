"""Whose the router's paths are: everybody's, tenants', operators'. Pure."""

POOLING = frozenset(
    {
        *("/v1/embeddings", "/v2/embed", "/pooling", "/classify"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    }
)
"""What vLLM's server answers of models that pool."""
COUNTED = POOLING | frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/chat/completions/batch", "/tokenize", "/detokenize", "/inference/v1/generate"),
    }
)
"""What a tenant's rates and concurrency are of."""
OPEN = frozenset({"/health", "/ping"})
_PLAIN = COUNTED | {"/v1/models", "/openapi.json", "/version"}
_RECORDS = "/v1/requests"
_ORDERS = ("/v1/nodes", "/v1/janitor", "/v1/cache", "/v1/weights", "/v1/process", "/v1/blend")
_ASK_OTHERS = ("/v1/nodes", "/v1/janitor", "/v1/cache/generations", "/v1/process", "/v1/blend")


def is_clients(path: str, *, records: bool) -> bool:
    """Whether a client asks it, not an operator alone. `records`: of requests, too."""
    below_records = path == _RECORDS or path.startswith(f"{_RECORDS}/")
    return path in _PLAIN or path.startswith(("/v1/models/", "/v1/responses/")) or (records and below_records)


def is_operators_path(method: str, path: str) -> bool:
    """Whether a request is an operator's: an order about the cluster, or a question for which nodes, tiers or the
    metadata server are asked in turn, or that shows requests of all tenants."""
    return path.startswith(_ORDERS if method == "POST" else _ASK_OTHERS)
