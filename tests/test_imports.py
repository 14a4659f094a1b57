"""Which room may import which; the torch-free half loads no torch, and nothing imports in a circle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = SRC / "moe_prefill"

# Room -> rooms it may import, function-level imports included. A room is a module or folder of the package.
ALLOWED = {
    "errors": set(),
    "core": set(),
    "config": {"errors"},
    "machine": {"errors"},
    "costmodel": {"errors", "core", "machine", "forest"},
    "forest": {"core"},
    "forming": {"errors", "core", "config", "forest"},
    "messages": {"errors", "core", "config", "forming", "blocks"},
    "shapes": {"core"},
    "blocks": {"core"},
    "frontend": {"errors", "core", "machine", "costmodel", "forest", "blocks"},
    "workloads": {"errors", "core"},
    "simulate": {
        "errors",
        "core",
        "config",
        "machine",
        "costmodel",
        "forming",
        "memory",
        "residency",
        "blocks",
        "frontend",
    },
    "memory": {"errors", "core", "blocks"},
    "residency": {"errors", "core", "config", "machine", "costmodel", "shapes", "memory"},
    "text": {"errors", "core"},
    "tasks": {"errors", "core", "text"},
    "jobs": {"errors", "core", "tasks"},
    "ops": {"errors"},
    "checkpoint": {"errors", "ops"},  # published float8 tensors are widened while they are read
    "experts": {"errors", "memory", "residency"},
    "models": {"errors", "core", "ops"},
    "engine": {
        "errors",
        "core",
        "config",
        "machine",
        "costmodel",
        "forest",
        "forming",
        "blocks",
        "shapes",
        "memory",
        "residency",
        "ops",
        "checkpoint",
        "experts",
        "models",
    },
    "strategies": {
        "errors",
        "core",
        "config",
        "forming",
        "shapes",
        "memory",
        "residency",
        "ops",
        "checkpoint",
        "experts",
        "models",
        "engine",
    },
    "dist": set(),
    # Workers are started by the torch-free half; what such a process runs imports the torch half inside functions.
    "workers": {
        "errors",
        "core",
        "config",
        "machine",
        "costmodel",
        "residency",
        "blocks",
        "messages",
        "frontend",
        "dist",
        "experts",
        "engine",
        "strategies",
    },
    "calibrate": {
        "errors",
        "core",
        "machine",
        "costmodel",
        "forest",
        "shapes",
        "memory",
        "residency",
        "ops",
        "checkpoint",
        "experts",
        "models",
        "engine",
    },
    # Builds engines to time them and reads what they did; peers get our dummy weights, so it loads those too.
    "bench": {
        "errors",
        "core",
        "config",
        "machine",
        "costmodel",
        "residency",
        "ops",
        "checkpoint",
        "models",
        "engine",
        "workers",
    },
    # The Python interface and the command line build the engine; they import the torch half inside functions only.
    "api": {"errors", "core", "config", "tasks", "text", "checkpoint", "workers"},
    "server": {"errors", "core", "config", "forest", "tasks", "text", "jobs", "checkpoint", "workers"},
    "cli": {
        "bench",
        "blocks",
        "frontend",
        "simulate",
        "workloads",
        "server",
        "calibrate",
        "forming",
        "errors",
        "core",
        "config",
        "machine",
        "costmodel",
        "memory",
        "residency",
        "tasks",
        "text",
        "jobs",
        "checkpoint",
        "engine",
        "workers",
        "models",
        "strategies",
    },
    "__init__": {"api"},
}
TORCH_HALF = {"ops", "dist", "checkpoint", "experts", "models", "engine", "strategies", "calibrate", "bench"}
TORCH_FREE = sorted(set(ALLOWED) - TORCH_HALF - {"__init__"})
# What a subcommand imports when it runs: the sizes of a baseline's share come from the torch half.
NEEDS_TORCH = {PACKAGE / "cli/plan_share.py"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["moe_prefill", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {p[1] for p in parts if p[0] == "moe_prefill" and len(p) > 1}
    return found & set(ALLOWED)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is a new room: say here what it may import"
    forbidden = imported_rooms(path) - ALLOWED[room] - {room}
    assert not forbidden, f"{path.relative_to(SRC)} imports {sorted(forbidden)}"


def edges_between_rooms() -> dict[str, set[str]]:
    edges = {room: set() for room in ALLOWED}
    for path in FILES:
        edges[room_of(path)] |= imported_rooms(path) - {room_of(path)}
    return edges


def test_every_permission_is_used():
    unused = {room: ALLOWED[room] - used for room, used in edges_between_rooms().items()}
    assert not any(unused.values()), {room: sorted(rest) for room, rest in unused.items() if rest}


def test_rooms_form_no_cycle():
    edges = edges_between_rooms()
    while edges:
        free = {room for room, needs in edges.items() if not needs & set(edges)}
        assert free, f"a cycle among {sorted(edges)}"
        edges = {room: needs for room, needs in edges.items() if room not in free}


def test_ops_import_triton_only_in_kernel_files():
    for path in (PACKAGE / "ops").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert "triton" not in {name.partition(".")[0] for name in names}, path


@pytest.mark.parametrize("room", TORCH_FREE)
def test_the_torch_free_half_loads_no_torch(room):
    paths = [path for path in FILES if room_of(path) == room and path.stem != "__main__" and path not in NEEDS_TORCH]
    names = [".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    code = f"import sys, {', '.join(names)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"})


def test_the_documents_name_the_rooms_of_both_halves():
    said = (SRC.parent / "docs/architecture.md").read_text(encoding="utf-8")
    free, rest = re.search(r"`([a-z, ]+)`\s+import without torch; `([a-z, ]+)` belong", said).groups()
    assert free.split(", ") == TORCH_FREE
    assert rest.split(", ") == sorted(TORCH_HALF)
