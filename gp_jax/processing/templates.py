"""The chat template of a model folder: read from where transformers reads it, rendered in a separate process (`template_worker`)."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from gp_jax.errors import GlimpseError, one_line, some
from gp_jax.processing import template_worker
from gp_jax.processing.template_worker import LONGEST, SECONDS
from gp_jax.runtime.clock import COMPILES
from gp_jax.runtime.disk import kind_of, read_json, read_text

MORE = "additional_chat_templates"
MAX_TEMPLATE = 1 << 20  # bytes
START = 60.0  # seconds to start the worker on a busy machine
WAIT = 20.0  # seconds to answer on a busy machine; the worker's own limit is a second of CPU time
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # environment variables that the worker gets; others may hold secrets


@dataclass(frozen=True)
class Template:
    """A chat template and the file it comes from."""

    text: str
    file: Path

    def render(self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, Any]) -> str:
        """As transformers' `apply_chat_template`, generation prompt included. Raises: GlimpseError that names the file."""
        special = {name: [str(one) for one in own] if isinstance(own, list) else str(own) for name, own in special_tokens.items()}
        variables = {**special, "messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        found = _worker.ask({"template": self.text, "variables": variables})
        if "text" not in found:
            raise GlimpseError(f"{self.file}: the chat template fails ({one_line(found['reason'])})")
        return found["text"]


def find_template(folder: Path) -> Template | None:
    """A model folder's chat template, in the order of transformers: the processor's files first, then the tokenizer's.

    Raises: GlimpseError when a file is damaged, or none of several templates is the default.
    """
    path = folder / "processor_config.json"
    if (value := read_json(path, required=False).get("chat_template")) is not None:
        return _default(value, path)
    more = sorted((folder / MORE).glob("*.jinja")) if kind_of(folder / MORE) == "folder" else []
    path = folder / "chat_template.json"
    if kind_of(path) is not None:
        if more:
            raise GlimpseError(f"{path}: does not go with the files in {MORE}, as one of them would be ignored")
        return _default(read_json(path).get("chat_template"), path)
    files = {path.stem: path for path in more}
    if kind_of(folder / "chat_template.jinja") is not None:
        files["default"] = folder / "chat_template.jinja"
    if files:
        path = files[_default_name(files, folder / MORE)]
        return Template(read_text(path, MAX_TEMPLATE), path)
    path = folder / "tokenizer_config.json"
    value = read_json(path, required=False).get("chat_template")
    return None if value is None else _default(value, path)


def _default(value: Any, path: Path) -> Template:
    """The default template of a text, of texts by name, or of a list of {"name", "template"}."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {str(one.get("name")): one.get("template") for one in value}
    if isinstance(value, dict):
        value = value[_default_name(value, path)]
    if not isinstance(value, str) or len(value) > MAX_TEMPLATE:
        raise GlimpseError(f"{path}: chat_template must be a text of at most {MAX_TEMPLATE} characters, or several by name")
    return Template(value, path)


def _default_name(named: Mapping[str, Any], path: Path) -> str:
    if "default" not in named:
        raise GlimpseError(f"{path}: none of the chat templates is called default (there are: {some(named) or 'none'})")
    return "default"


class Worker:
    """Owner of the process that renders: starts it on first use, and again after a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns: {"text": ...} or {"reason": ...}."""
        with self._lock:
            if self._process is None or self._pipe is None or self._process.poll() is not None:
                with COMPILES.once():
                    pipe = self._start()
            else:
                pipe = self._pipe
            try:
                pipe.send_bytes(json.dumps(request).encode())
                return _reply(pipe, WAIT)
            except (EOFError, OSError) as error:
                status = self._stop()
                late = status == -signal.SIGPROF or isinstance(error, TimeoutError)
                return {"reason": f"it takes more than {SECONDS:.0f} s of computing" if late else f"its process ended with status {status}"}
            except BaseException:  # an interrupt: the pending answer would be taken for the answer to the next request
                self._stop()
                raise

    def _start(self) -> Connection:
        self._stop()
        pipe, other = Pipe()
        self._pipe = pipe
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-P", template_worker.__file__, str(other.fileno())]
        try:
            with other:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()], env=environment)
            _reply(pipe, START)
            return pipe
        except BaseException as error:  # a worker that is late must not send its "ready" as the first answer
            self._stop()
            if not isinstance(error, (EOFError, OSError)):
                raise
            raise GlimpseError(f"chat templates cannot be rendered: {sys.executable} does not start ({one_line(error)})") from error

    def _stop(self) -> int | None:
        """Ends the process if it is running. Returns: its exit status."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.5)
        process.kill()
        return process.wait()

    close = _stop


def _reply(pipe: Connection, seconds: float) -> dict[str, Any]:
    if not pipe.poll(seconds):
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return json.loads(pipe.recv_bytes(LONGEST * 12 + 1000))  # JSON needs up to twelve bytes per character


_worker = Worker()
atexit.register(lambda: _worker.close())


def _forked() -> None:
    """After a fork the child gets a worker of its own; the old one belongs to the parent."""
    global _worker
    _worker = Worker()


os.register_at_fork(after_in_child=_forked)
