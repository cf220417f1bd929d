"""Renders untrusted chat templates in a separate process, started by `templates`. Jinja's sandbox denies them access to the system, but
bounds neither time nor memory. Here the operating system bounds both: a template that exceeds a limit ends this process only.

This file imports nothing of gp_jax, because the import would take longer than rendering.
"""

import functools
import json
import resource
import signal
import sys
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0  # of CPU time per template; usual ones take 0.0001
MEMORY = 160 << 20  # bytes of the process; about 20 MiB without a template
LONGEST = 4 << 20  # characters of a prompt
ADDED = 1 << 18  # characters beyond twice the input; tokenizing a prompt takes about a hundred bytes per character


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text, for training. Here the text is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace that refuses names beginning with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **names: Any) -> None:
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **names).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with _ ({name})")
        super().__setitem__(name, value)


class Dict:
    """Makes dicts, without access to the other attributes of the type."""

    def __call__(self, *args: Any, **names: Any) -> dict:
        return dict(*args, **names)


def _fail(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment of transformers (utils/chat_template_utils.py)."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    made.globals |= {"dict": Dict(), "namespace": Namespace}
    return made


@functools.lru_cache(16)
def compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def answer(request: dict[str, Any]) -> bytes:
    """JSON of the rendered text, or of the reason why there is none."""
    try:
        text = compiled(request["template"]).render(**request["variables"])
        most = min(LONGEST, ADDED + 2 * len(json.dumps(request["variables"])))
        if len(text) <= most:
            return json.dumps({"text": text}).encode()
        reason = f"its text has more than {most} characters"
    except MemoryError:
        reason = f"it needs more than {MEMORY >> 20} MiB of memory"
    except Exception as error:  # a template may raise anything
        reason = f"{type(error).__name__}: {error}"
    return json.dumps({"reason": reason[:1000]}).encode()


def main(number: int) -> None:
    """Answers requests until the other end closes the connection. number: its file descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that asked
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF,))
    for limit, most in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    environment()
    connection = Connection(number)
    connection.send_bytes(b"{}")  # ready
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signal ends the process
        content = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(content)


if __name__ == "__main__":
    main(int(sys.argv[1]))
