"""The page at `/`: its files, and the samples that it offers. It asks through the public interface, as any other client does."""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gp_jax.scenes.draw import draw
from gp_jax.scenes.source import scene_question

FOLDER = Path(__file__).parent / "browser"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing comes from other hosts, and no text that a model or a file brings can become a script.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SAFE = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
SAMPLES = 6  # the first records of the benchmark's test split, one of every family
NOTE = "The bundled model knows generated scenes only: about any other picture its answer means nothing. "
NOTE += "It is so small that pruning saves tokens, but hardly time."


def routes(bundled: bool) -> list[Route]:
    """Routes that need no key. bundled: the model is the one that comes with the package."""
    files = [Route("/" if path.name == "index.html" else f"/{path.name}", _file(path)) for path in sorted(FOLDER.iterdir())]

    async def samples(request: Request) -> Response:
        return JSONResponse({"samples": listed(), "note": NOTE if bundled else ""})

    return [*files, Route("/samples", samples), Route("/samples/{number:int}.png", sample)]


def _file(path: Path) -> Any:
    """The route of a file, which is read once."""
    content = path.read_bytes()

    async def file(request: Request) -> Response:
        return cached(request, content, f"{TYPES[path.suffix]}; charset=utf-8")

    return file


def cached(request: Request, content: bytes, kind: str) -> Response:
    """Content that a browser keeps, and asks each time whether it is still the same."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**SAFE, "ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


@functools.cache
def listed() -> list[dict[str, str]]:
    """Name, picture and question of every sample."""
    questions = [scene_question("test", number)[1].question for number in range(SAMPLES)]
    return [dict(name=f"Sample {k + 1}", picture=f"samples/{k}.png", question=question) for k, question in enumerate(questions)]


@functools.cache
def drawn(number: int) -> bytes:
    """A sample's picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(draw(scene_question("test", number)[0])).save(file, "PNG")
    return file.getvalue()


def sample(request: Request) -> Response:
    """A sample's picture; in a thread, since it is drawn when it is first asked for."""
    number = request.path_params["number"]
    return cached(request, drawn(number), "image/png") if number < SAMPLES else Response(status_code=404)
