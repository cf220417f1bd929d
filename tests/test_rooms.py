"""A file imports only lower ranks, in the package and inside every folder of it, and nothing imports in a circle."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1] / "gp_jax"
FOLDERS, FILES = 16, 12  # at most, in the package's own folder: what a newcomer sees first

# Folder of the package -> names in it, lowest first. Names of one set do not import each other.
RANKS = {
    "": [
        {"errors", "trees"},
        {"config", "ops", "runtime"},
        {"buckets", "sharding"},
        {"glimpse"},
        {"models"},
        {"pretrained"},
        {"processing"},
        {"data", "flops", "pruning"},
        {"pipeline", "scenes"},
        {"inference"},
        {"vlm"},
        {"evaluation"},
        {"serving", "tiny", "training"},
        {"ahead"},
        {"commands"},
        {"cli"},
        {"__main__"},
    ],
    "ahead": [
        {"artifact", "hlo", "passes", "topology"},
        {"compiling"},
        {"generation", "training"},
        {"plus_fit", "report"},
        {"plus", "serving"},
    ],
    "ahead/artifact": [{"names"}, {"facts", "readme"}, {"inputs", "write"}],
    "commands": [
        {"ask", "compile", "completion", "configs", "doctor", "eval", "export", "label", "merge", "prepare", "push", "serve", "train"}
    ],
    "config": [{"choices", "families", "files", "schema"}, {"vision"}, {"model"}],
    "data": [
        {"collate", "formats", "record", "settings", "sources", "tally"},
        {"builder", "checks", "masks", "sampling", "shapes"},
        {"prepared", "schedule", "work"},
        {"prepare", "samples"},
        {"feed"},
    ],
    "evaluation": [
        {"annotations", "jsonl", "matching", "memory", "metrics", "plans", "redaction"},
        {"lmms", "results", "settings"},
        {"reporting", "tasks", "verdicts"},
        {"judge", "samples"},
        {"runner"},
        {"scores"},
        {"summary"},
        {"command"},
    ],
    "evaluation/reporting": [
        {"chips", "line_links", "page", "statistics"},
        {"gallery", "plan_rows"},
        {"contact_sheet", "tables"},
        {"cost_panel", "exports", "headline", "listing", "plots"},
        {"html"},
    ],
    "glimpse": [{"predictor", "prompt"}],
    "inference": [
        {"notebook", "requests", "sampling", "shared_programs", "walk"},
        {"engine", "look_inputs"},
        {"decoding", "logprobs", "results", "traced"},
        {"function", "looks", "warmup"},
    ],
    "models": [{"clip", "decoder", "vision"}, {"deepstack", "lvlm"}, {"adapter"}],
    "ops": [
        {"blockwise", "dense", "kernels", "ranking", "target"},
        {"layers", "rope", "rows", "slices"},
        {"attention"},
        {"received"},
    ],
    "pretrained": [
        {"fields", "known", "names", "pattern_worker", "pickles"},
        {"adapter_config", "llava", "misfits", "qwen", "qwen3", "stored"},
        {"torch_file"},
        {"sources"},
        {"files", "params"},
        {"adapters", "tower"},
        {"hf_config", "identity"},
        {"checkpoint", "saving"},
    ],
    "processing": [
        {"addresses", "library", "prompts", "template_worker", "tiff", "tokenizer_file", "views", "windows"},
        {"encoded", "layout", "picture_settings", "templates", "tokenization"},
        {"images", "looks"},
        {"qwen"},
        {"llava"},
        {"table"},
    ],
    "pruning": [{"compact", "look"}, {"rule"}, {"scorers"}, {"plan"}],
    "pruning/scorers": [
        {"scorer", "similarity"},
        {"attention", "cdpruner", "divprune", "given", "glimpse", "visionzip"},
        {"fastv", "pyramiddrop", "vscan"},
    ],
    "runtime": [{"allocator", "disk", "progress"}, {"clock", "compilation_cache", "exits", "lock"}],
    "scenes": [
        {"palette", "settings"},
        {"things"},
        {"familiar", "labels", "scene", "stencils"},
        {"draw", "questions"},
        {"architecture", "source"},
        {"turns", "write"},
        {"__main__", "feed"},
    ],
    "serving": [
        {"errors", "jobs", "page", "settings", "vision_cache"},
        {"chat", "inbox", "lengths", "pictures", "reading"},
        {"pools", "preparing"},
        {"meters", "replies", "warm_up"},
        {"loop"},
        {"app"},
        {"server"},
        {"ray_app"},
    ],
    "training": [
        {"card", "checkpoint", "early", "forward", "losses", "meter", "rewards", "run_log", "settings"},
        {"base_settings", "optim", "step"},
        {"base_losses", "build"},
        {"export", "validation"},
        {"plus", "scenes_base"},
        {"places", "stages"},
        {"loop"},
        {"command"},
    ],
    "training/plus": [
        {"questions", "settings"},
        {"advantages", "losses", "rollouts"},
        {"batches", "run", "samples", "summary"},
        {"step"},
        {"stage"},
    ],
    "training/rewards": [{"functions", "judge"}, {"settings"}, {"rewarding"}],
}
PATHS = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]


def exists(module: Path) -> bool:
    return module.with_suffix(".py").exists() or module.is_dir()


def imports(path: Path) -> list[tuple[str, ...]]:
    """Modules of the package that a file imports, as parts of their names, `if TYPE_CHECKING` and functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for parts in (module.split(".") for module in modules):
            while (
                parts and not (ROOT.parent / "/".join(parts)).with_suffix(".py").exists() and not (ROOT.parent / "/".join(parts)).is_dir()
            ):
                parts = parts[:-1]
            if parts[:1] == ["gp_jax"] and len(parts) > 1:
                found.append(tuple(parts[1:]))
    return found


@pytest.mark.parametrize("folder", [path.relative_to(ROOT) for path in (ROOT, *ROOT.rglob("*")) if list(path.glob("*.py"))], ids=str)
def test_every_name_has_a_rank(folder):
    names = {p.stem for p in PATHS if p.parent == ROOT / folder}
    names |= {p.relative_to(ROOT / folder).parts[0] for p in PATHS if (ROOT / folder) in p.parents and p.parent != ROOT / folder}
    assert names == set().union(*RANKS[str(folder).strip(".")])


def test_imports_go_down():
    rank = {(folder, name): i for folder, ranks in RANKS.items() for i, names in enumerate(ranks) for name in names}
    for path in PATHS:
        own = path.relative_to(ROOT).with_suffix("").parts
        for other in imports(path):
            same = 0
            while same < min(len(own), len(other)) and own[same] == other[same]:
                same += 1
            if same == len(other):  # the folder's own __init__
                continue
            folder = "/".join(own[:same])
            assert rank[folder, other[same]] < rank[folder, own[same]], f"{'/'.join(own)} imports {'/'.join(other)}, which is not below it"


def bound(path: Path) -> set[str]:
    """Names that a module binds, whatever its conditions; those that its functions bind are counted too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def test_what_is_imported_exists():
    """Also where no test goes: scripts, and imports inside functions."""
    known: dict[Path, set[str]] = {}
    top = ROOT.parent
    folders = (top / name for name in ("gp_jax", "benchmarks", "configs", "docs"))
    for path in [*top.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] not in ("gp_jax", "benchmarks", "configs"):
                continue
            module = top / node.module.replace(".", "/")
            file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            assert file.exists(), f"{path}: no module {node.module}"
            names = known.setdefault(file, bound(file))
            for alias in node.names:
                made = alias.name in names or "__getattr__" in names or exists(module / alias.name)
                assert made, f"{path}: {node.module} has no {alias.name}"


def test_few_names_at_the_top():
    entries = [path for path in ROOT.iterdir() if not path.name.startswith("__pycache__")]
    assert sum(path.is_dir() for path in entries) <= FOLDERS and sum(path.is_file() for path in entries) <= FILES, sorted(entries)


def test_tests_mirror_the_rooms():
    tests = ROOT.parent / "tests"
    rooms = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert all((ROOT / room).is_dir() for room in rooms), rooms


def test_files_stay_small():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_no_torch_at_run_time():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "tensorflow") for name in names), path
