"""Serve the page, and a model to run in it, on this machine, with the headers that threads in a browser need.

    python examples/browser/serve.py --model runs/model-onnx

The model is a folder that convert/to_onnx.py wrote; by default the small one that is kept beside this script. Needs Python
alone, and the JavaScript library that `npm ci` in this script's folder fetches.
"""

import argparse
import contextlib
import os
import sys
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


HERE = Path(__file__).resolve().parent
PAGE, MODEL = HERE / "page", HERE / "model"
LIBRARIES = [HERE / "node_modules" / name / "dist" for name in ("@huggingface/transformers", "onnxruntime-web")]


class Server(ThreadingHTTPServer):
    """A server to which it is no error that a visitor leaves."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(SimpleHTTPRequestHandler):
    """The page's own files, and under /lib/ and /model/ what lies elsewhere.

    Args:
        model: folder behind /model/.
        args, kwargs: of `SimpleHTTPRequestHandler`.
    """

    # Some systems register other types, with which browsers refuse to run a module
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args, model: Path, **kwargs):
        self.folders = {"/lib/": LIBRARIES, "/model/": [model], "/": [PAGE]}
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        prefix = next(prefix for prefix in self.folders if path.startswith(prefix) or prefix == "/")
        for folder in self.folders[prefix]:
            self.directory = os.fspath(folder)
            found = super().translate_path(path[len(prefix) - 1 :])
            if os.path.exists(found):
                break
        return found

    def list_directory(self, path):
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        # With these two a browser lets the page share memory between threads
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        # Another model may be served at the same address tomorrow
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_request(self, code="-", size="-") -> None:
        """Only errors are worth a line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of convert/to_onnx.py (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at, 0 for any (default: %(default)s)")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file() or not (arguments.model / "onnx").is_dir():
        parser.exit(2, f"serve.py: error: --model {arguments.model}: expected a folder that convert/to_onnx.py wrote\n")
    if not all(folder.is_dir() for folder in LIBRARIES):
        parser.exit(2, f"serve.py: error: the JavaScript library is missing: npm ci --prefix {os.path.relpath(HERE)}\n")
    try:
        server = Server((arguments.host, arguments.port), partial(Handler, model=arguments.model))
    except (OSError, OverflowError) as error:  # the latter for a port that cannot be
        reason = getattr(error, "strerror", error)
        parser.exit(2, f"serve.py: error: cannot listen at {arguments.host}:{arguments.port}: {reason}\n")
    with server:
        print(f"Open http://{arguments.host}:{server.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
