"""A Batch endpoint on loopback that finishes every batch at once, for measuring what our side of the exchange costs.

It keeps custom_ids and nothing else of what is uploaded, writes results of the published shape and size to disk, and streams them. It fails never:
failures on command are the business of the tests' own server. `python -m tests.performance.batch_endpoint FOLDER` prints its address.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

START = b'{"custom_id": "'
LENGTH = 32  # of a custom_id
IN_500 = 500  # one first answer in so many is prose, so that it is asked again
COMPARISON = b'"name":"comparison"'


@dataclass
class Endpoint:
    """Uploaded custom_ids by file, result files, and batches, oldest first."""

    folder: Path
    uploads: dict[str, list[tuple[str, bool]]] = field(default_factory=dict)  # custom_id, and whether it asks for a comparison
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    in_prose: set[str] = field(default_factory=set)

    def upload(self, lines: list[tuple[str, bool]]) -> str:
        name = f"file-{len(self.uploads)}"
        self.uploads[name] = lines
        return name

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A batch whose results lie on disk, in an order of their own; it shows as completed from the next look on."""
        name = f"batch_{len(self.batches)}"
        requests = self.uploads.pop(asked["input_file_id"])
        random.Random(len(self.batches)).shuffle(requests)
        with (self.folder / f"{name}-output").open("w") as results:
            results.writelines(self.result(custom_id, comparison) for custom_id, comparison in requests)
        counts = {"total": len(requests), "completed": len(requests), "failed": 0}
        started = {
            "id": name,
            "object": "batch",
            "created_at": len(self.batches),
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
        }
        self.batches[name] = {**asked, **started, "status": "completed", "output_file_id": f"{name}-output", "request_counts": counts}
        return {**asked, **started}

    def result(self, custom_id: str, comparison: bool) -> str:
        number = int(custom_id[1:9], 16)
        if number % IN_500 == 0 and custom_id not in self.in_prose:
            self.in_prose.add(custom_id)
            said = "Rather the first"
        else:
            said = json.dumps({"answer": "AB"[number & 1]} if comparison else {"score": 1 + number % 10})
        return RESULT.replace("CUSTOM_ID", custom_id).replace("SAID", json.dumps(said)[1:-1])


RESULT = (
    json.dumps(
        {
            "id": "batch_req_0123456789abcdef0123456789abcdef",
            "custom_id": "CUSTOM_ID",
            "response": {
                "status_code": 200,
                "request_id": "0123456789abcdef0123456789abcdef",
                "body": {
                    "id": "chatcmpl-0123456789abcdefghijklmnopqrs",
                    "object": "chat.completion",
                    "created": 1738000000,
                    "model": "gpt-4o-2024-08-06",
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": "SAID", "refusal": None, "annotations": []},
                            "logprobs": None,
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {
                        "prompt_tokens": 1500,
                        "completion_tokens": 5,
                        "total_tokens": 1505,
                        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
                        "completion_tokens_details": {
                            "reasoning_tokens": 0,
                            "audio_tokens": 0,
                            "accepted_prediction_tokens": 0,
                            "rejected_prediction_tokens": 0,
                        },
                    },
                    "service_tier": "default",
                    "system_fingerprint": "fp_0123456789",
                },
            },
            "error": None,
        }
    )
    + "\n"
)


def server(endpoint: Endpoint) -> ThreadingHTTPServer:
    """The endpoint on a free port of loopback, not yet serving."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            parts = address.path.strip("/").split("/")
            if parts[-1] == "content":
                self.send_file(endpoint.folder / parts[-2])
            elif parts[1] == "files":
                size = (endpoint.folder / parts[2]).stat().st_size
                self.send({"id": parts[2], "object": "file", "bytes": size, "created_at": 0, "filename": parts[2], "purpose": "batch_output"})
            elif len(parts) == 3:
                self.send(endpoint.batches[parts[2]])
            else:
                asked = {name: values[0] for name, values in parse_qs(address.query).items()}
                newest = list(reversed(endpoint.batches))
                first = newest.index(asked["after"]) + 1 if "after" in asked else 0
                last = first + int(asked.get("limit", 20))
                self.send({"object": "list", "data": [endpoint.batches[name] for name in newest[first:last]], "has_more": last < len(newest)})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            if self.path.endswith("/files"):
                lines, size = self.uploaded(length)
                name = endpoint.upload(lines)
                self.send({"id": name, "object": "file", "bytes": size, "created_at": 0, "filename": name, "purpose": "batch", "status": "processed"})
            else:
                self.send(endpoint.create(json.loads(self.rfile.read(length))))

        def uploaded(self, left: int) -> tuple[list[tuple[str, bool]], int]:
            """Read a multipart form line by line: the custom_ids of its request lines, and how many bytes those are."""
            lines, size = [], 0
            while left > 0:
                line = self.rfile.readline()
                left -= len(line)
                if line.startswith(START):
                    size += len(line)
                    lines.append((line[len(START) : len(START) + LENGTH].decode(), line.find(COMPARISON, 0, 500) >= 0))
            return lines, size

        def send(self, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.head("application/json", len(content))
            self.wfile.write(content)

        def send_file(self, path: Path) -> None:
            self.head("application/octet-stream", path.stat().st_size)
            with path.open("rb") as stream:
                shutil.copyfileobj(stream, self.wfile, 1 << 20)

        def head(self, kind: str, length: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a line a request would be measured too."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def main(folder: str) -> None:
    found = server(Endpoint(Path(folder)))
    print(f"http://127.0.0.1:{found.server_port}/v1", flush=True)
    found.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
