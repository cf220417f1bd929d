"""Compiled programs outlive their process."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

from gp_jax.runtime import compilation_cache

PROGRAM = """
import json
import jax, jax.numpy as jnp

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
(jnp.ones(3) + 1).block_until_ready()  # JAX is in use before a model is made
from gp_jax.runtime import compilation_cache

compilation_cache.keep_compiled()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(json.dumps([len(hits), jax.config.jax_compilation_cache_dir]))
"""


def run(home, **more) -> list:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"XDG_CACHE_HOME": str(home), "XLA_FLAGS": ""} | more
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_second_process_finds_the_first_ones_programs(tmp_path):
    hits, folder = run(tmp_path)
    assert hits == 0 and folder.startswith(str(tmp_path / "gp_jax" / "compiled")) and os.listdir(folder)
    assert run(tmp_path)[0] > 0


def test_jax_has_the_last_word(tmp_path):
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[1] == str(tmp_path / "mine")
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")[1] is None and not (tmp_path / "gp_jax").exists()


def test_only_damaged_entries_go_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    """A folder without a largest size, such as a user's own, has no dates: what is in it is not damaged for that."""
    config = SimpleNamespace(jax_compilation_cache_dir=str(tmp_path), jax_compilation_cache_max_size=-1)
    monkeypatch.setattr(compilation_cache.jax, "config", config)
    others, entry, other = [], tmp_path / "jit_f-1-cache", tmp_path / "jit_g-1-cache"
    show = compilation_cache.OneLine(lambda *args, **_: others.append(args))
    for path in (entry, other):
        path.write_bytes(b"neither zlib nor zstandard")
    full = "Error writing persistent compilation cache entry for 'jit_h': OSError: No space left on device"
    show(full)
    assert entry.exists() and other.exists()
    show("Error reading persistent compilation cache entry for 'jit_f': ValueError: damaged")
    assert not entry.exists() and other.exists()
    config.jax_compilation_cache_max_size = 1 << 30
    (tmp_path / "jit_d-1-cache").write_bytes(b"")
    (tmp_path / "jit_d-1-atime").write_bytes(b"")
    show(full)
    assert sorted(os.listdir(tmp_path)) == ["jit_d-1-atime", "jit_d-1-cache"]
    assert len(capsys.readouterr().err.splitlines()) == 2, "one of reading, one of writing"
    show("something else")
    assert others == [("something else",)]


ROOM = """
import json
import jax, jax.numpy as jnp
from gp_jax.runtime import compilation_cache
from gp_jax.runtime.clock import COMPILES

counts, compilation_cache.EVERY = [], 16
jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()  # starts the backend
most = int((compilation_cache.mappings() + {room}) / compilation_cache.FULL)  # reached after some tens of programs
compilation_cache.most_mappings = lambda: most
for size in range(1, 100):
    jax.jit(lambda x: jnp.cumsum(x) * size)(jnp.ones(size)).block_until_ready()
    forgot = compilation_cache.ROOM.make(COMPILES.count)
    counts.append((compilation_cache.mappings(), forgot))
print(json.dumps([counts, float(jnp.ones(7).sum())]))
"""


def mappings(room: int) -> list:
    environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", ROOM.format(room=room)], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_programs_are_forgotten_before_the_system_has_no_mappings_left():
    counts, total = mappings(120)
    assert any(forgot for _, forgot in counts) and total == 7
    before, after = next((a[0], b[0]) for a, b in zip(counts, counts[1:], strict=False) if b[1])
    assert before > counts[0][0] + 80 and after < before - 40
    assert not any(forgot for count, forgot in counts[:16])


def test_damaged_programs_are_one_line_and_written_anew(tmp_path):
    """Cut, empty, garbage, none at all: whatever became of the entries."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}

    def start() -> tuple[str, int]:
        program = "from gp_jax.runtime import compilation_cache\ncompilation_cache.keep_compiled()\n" + PROGRAM
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        return done.stderr, json.loads(done.stdout.splitlines()[-1])[0]

    assert start() == ("", 0)
    entries = sorted(path for path in tmp_path.iterdir() if path.name.endswith("-cache"))
    for number, path in enumerate(entries):
        content = path.read_bytes()
        path.unlink()
        if number % 4 == 3:
            path.mkdir()
        else:
            path.write_bytes((content[:100], b"", bytes(reversed(content)))[number % 4])
    said, found = start()
    assert found == 0 and said.count("\n") == 1 and said.startswith(f"compiled programs in {tmp_path} cannot be read (first jit_")
    assert start() == ("", len(entries))


def test_other_warnings_are_shown_as_ever(monkeypatch, capsys, tmp_path):
    passed, said = (
        [],
        SimpleNamespace(config=SimpleNamespace(jax_compilation_cache_dir=str(tmp_path), jax_compilation_cache_max_size=2**30)),
    )
    monkeypatch.setattr(compilation_cache, "jax", said)
    monkeypatch.setattr("warnings.showwarning", compilation_cache.OneLine(lambda *words, **_: passed.append(str(words[0]))))
    for name in ("undated", "dated"):
        (tmp_path / f"{name}-1-cache").touch()
    (tmp_path / "dated-1-atime").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("something else", UserWarning, "file", 1)
        for program in ("jit_a", "jit_b"):
            warnings.showwarning(f"Error writing persistent compilation cache entry for '{program}': OSError: full", UserWarning, "file", 1)
    said = capsys.readouterr().err
    assert passed == ["something else"] and said.count("\n") == 1 and "cannot be written (first jit_a: OSError: full)" in said
    assert {path.name for path in tmp_path.iterdir()} == {"dated-1-cache", "dated-1-atime"}
