"""A local HTTP server that speaks the part of OpenAI's chat protocol that a played user needs; a process of its own."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def serve(reply: str) -> None:
    """Answer each conversation with ``reply``, in which ``{last}`` is its last message and ``{body}`` the whole request.

    ``403`` and ``nothing`` are what the server does instead.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions", self.path
            said = reply.replace("{last}", body["messages"][-1]["content"]).replace("{body}", json.dumps(body))
            said = said.replace("{key}", str(self.headers.get("Authorization")))
            found = {"choices": [{"message": {"role": "assistant", "content": said}}]}
            content = json.dumps({} if reply == "nothing" else found).encode()
            self.send_response(403 if reply == "403" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # of five, those that come at once wait for seconds

    with Server(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()
