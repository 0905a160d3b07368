"""Ask a running cluster one question, show the answer as it comes, then say what the cluster did for it.

Run: python examples/ask.py [--url http://127.0.0.1:8000] [--max-tokens 64] "What is a ferry?"

Only the standard library: any OpenAI client works in the same way. `X-Request-Id` names the request, and the router's
`/v1/requests/ID` tells under that name which nodes served it and where the time went.
"""

import argparse
import json
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any


def get(url: str) -> Any:
    """The JSON body behind a URL."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def stream(url: str, body: dict[str, Any], request_id: str) -> Iterator[dict[str, Any]]:
    """The events of one streamed answer."""
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        for line in reply:
            if not line.startswith(b"data:"):  # between two events, or a comment: the answer stands still for a while
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise SystemExit("the stream ended without [DONE]")


def main() -> None:
    """Ask, print the text piece by piece, then the request's record in three lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("question")
    arguments = parser.parse_args()
    request_id = f"ask-{uuid.uuid4().hex[:8]}"
    body = {
        "model": get(arguments.url + "/v1/models")["data"][0]["id"],
        "messages": [{"role": "user", "content": arguments.question}],
        "max_tokens": arguments.max_tokens,
        "stream": True,
    }
    for event in stream(arguments.url + "/v1/chat/completions", body, request_id):
        for choice in event["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
    record = get(f"{arguments.url}/v1/requests/{request_id}")
    route = record["route"]
    print(f"\n\nprefiller {route['prefiller']}, decoder {route['decoder']}, because: {route['reason']}")
    print(f"{record['prompt_tokens']} prompt tokens, {record['cached_tokens']} of them from the cache")
    print(f"first token after {record['ttft_s']:.3f} s, all after {record['total_s']:.3f} s")


if __name__ == "__main__":
    main()
