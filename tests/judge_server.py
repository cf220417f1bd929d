"""An OpenAI-compatible endpoint that works, fails, is slow or talks nonsense, as the answer it judges says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers by what stands in the model's answer. down: a status that every request gets, or "hang"; None: the server works."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.down = None
        self.requests, self.times, self.keys, self.busy = [], [], [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass  # a client that has gone away

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, asked))
        self.server.times.append(time.monotonic())
        self.server.keys.append(self.headers.get("Authorization"))
        text = asked["messages"][1]["content"]
        count = sum(text == other["messages"][1]["content"] for _, other in self.server.requests)
        if self.server.down == "hang":
            time.sleep(1)
        elif self.server.down:
            return self.reply(self.server.down, {"error": "down"})
        if "denied" in text:
            return self.reply(401, {"error": "no key"})
        if "blocked" in text:
            return self.reply(403, {"error": "moderation"})
        if "broken" in text or ("busy" in text and count == 1):
            return self.reply(503, {"error": "later"}, {"Retry-After": "0"})
        if "limited" in text and count < 4:
            return self.reply(429, {"error": "too many requests"})
        if "refused" in text:
            return self.reply(400, {"error": "filtered"})
        if "slow" in text:
            time.sleep(1)
        if "garbage" in text:
            return self.reply(200, ["not", "a", "completion"])
        verdict = (
            "I like cats."
            if "nonsense" in text
            else "score: 0.5"
            if "half" in text
            else "score: 7"
            if "lies" in text
            else "The answer fits.\nscore: 1"
        )
        return self.reply(200, {"choices": [{"message": {"content": verdict}}]})

    def reply(self, status, body, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
