"""A file imports only lower ranks, or files of its own folder, and nothing imports in a circle."""

import ast
from pathlib import Path

RANKS = [
    {"errors", "version", "allocator"},
    {"choices", "disk", "schema", "library", "tiff", "template_worker", "tokenizer_file"},
    {"vision_config", "lock"},
    {"config", "config_file", "trees", "buckets", "clock", "compiled", "settings", "encoded"},
    {"sharding", "ops", "images", "pictures", "base_settings"},
    {"models", "glimpse", "layout"},
    {"lvlm", "parts"},
    {"scorers"},
    {"pretrained", "plan"},
    {"picture_settings", "prompts", "templates", "tokenization", "pipeline", "flops"},
    {"processing"},
    {"llava_processing"},
    {"processors"},
    {"sampling", "data"},
    {"scenes"},
    {"engine", "checkpoint", "report"},
    {"decoding"},
    {"program", "warmup", "requests", "results"},
    {"inference"},
    {"vlm", "ahead"},
    {"exporting", "tiny", "training", "evaluation"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
ROOT = Path(__file__).resolve().parents[1] / "gp_jax"


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Rooms of the package that a file imports, `if TYPE_CHECKING` and functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gp_jax":
            rest = node.module.split(".")[1:]
            found += [rest[0]] if rest else [alias.name for alias in node.names]
    return [name for name in found if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()]


def test_every_room_has_a_rank():
    rooms = {room(p.relative_to(ROOT).parts) for p in ROOT.rglob("*.py")}
    assert rooms == set().union(*RANKS)


def test_imports_go_down():
    rank = {name: i for i, rooms in enumerate(RANKS) for name in rooms}
    for path in ROOT.rglob("*.py"):
        own = room(path.relative_to(ROOT).parts)
        for other in imports(path):
            same_folder = own == other and (ROOT / own).is_dir()
            assert rank[other] < rank[own] or same_folder, (
                f"{path.relative_to(ROOT)} (rank {rank[own]}) imports {other} (rank {rank[other]})"
            )


def test_files_stay_small():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_no_torch_at_run_time():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "tensorflow") for name in names), path
