"""Two questions over one long document: the second one finds the document's KV in the store.

Run: python examples/reuse.py [--url http://127.0.0.1:8000] [--file DOCUMENT]

Shows for each question how many prompt tokens came from the cache and when the first token came.
"""

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

QUESTIONS = ("What is this text about?", "Who is it written for?")


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def main() -> None:
    """Ask both questions and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--file", type=Path, help="a text file; without one a text is made up")
    arguments = parser.parse_args()
    document = arguments.file.read_text() if arguments.file else "A ferry carries people over water. " * 60
    model = call(arguments.url + "/v1/models")["data"][0]["id"]
    for question in QUESTIONS:
        messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
        answer = call(arguments.url + "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 16})
        record = call(f"{arguments.url}/v1/requests/{answer['id']}")
        print(
            f"{record['prompt_tokens']} prompt tokens, {record['cached_tokens']} from the cache, "
            f"first token after {record['ttft_s']:.3f} s: {question}"
        )


if __name__ == "__main__":
    main()
