"""The node pack's files beside its code: translations, help, workflows, what the registry reads.

What the nodes are is read from the source of nodes.py, so that no ComfyUI is needed.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfy_nodes"
DOCS = PACK / "web" / "docs"
# Where ComfyUI's frontend looks: <node>/<language>.md, then <node>.md, which is the English one.
PAGES = {"en": "{node}.md", "zh": "{node}/zh.md"}
LANGUAGES = sorted(PAGES)
# Messages with these are programs to vue-i18n, and tooltips are compiled in some versions of the
# frontend and shown raw in others: no spelling is right in both.
SPECIAL = set("{}@|")


@dataclass(frozen=True)
class Node:
    """The texts of a node, as a locale has them."""

    display_name: str
    description: str
    inputs: dict[str, str | None]  # id → tooltip
    outputs: dict[str, str]  # index → name, of those that are not named by their type


def read_nodes() -> dict[str, Node]:
    tree = ast.parse((PACK / "nodes.py").read_text("utf-8"))
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}

    def returned(call: ast.expr) -> ast.Call:
        """A call as it stands, or that which a function of nodes.py returns."""
        assert isinstance(call, ast.Call)
        if not isinstance(call.func, ast.Name):
            return call
        inner = functions[call.func.id].body[-1]
        assert isinstance(inner, ast.Return)
        assert isinstance(inner.value, ast.Call)
        return inner.value

    def keywords(call: ast.Call) -> dict[str, ast.expr]:
        return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}

    def text(found: ast.expr | None) -> Any:
        return None if found is None else ast.literal_eval(found)

    def elements(found: ast.expr) -> list[ast.expr]:
        assert isinstance(found, ast.List)
        return found.elts

    nodes = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
            schema = keywords(call)
            inputs = [returned(found) for found in elements(schema["inputs"])]
            outputs = [keywords(returned(found)) for found in elements(schema["outputs"])]
            names = [text(found.get("display_name")) for found in outputs]
            nodes[text(schema["node_id"])] = Node(
                text(schema["display_name"]),
                text(schema["description"]),
                {text(found.args[0]): text(keywords(found).get("tooltip")) for found in inputs},
                {str(i): name for i, name in enumerate(names) if name},
            )
    return nodes


NODES = read_nodes()


def read_locale(language: str) -> dict[str, Any]:
    path = PACK / "locales" / language / "nodeDefs.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def texts(found: Any) -> list[str]:
    """All texts of a locale, however deep."""
    if isinstance(found, str):
        return [found]
    return [text for part in found.values() for text in texts(part)]


def test_the_nodes_are_found() -> None:
    listed = re.search(r"return \[\s*(VMix[^\]]+)\]", (PACK / "nodes.py").read_text("utf-8"))
    assert listed
    assert list(NODES) == re.findall(r"\w+", listed[1])
    assert {"model", "vmix", "apply_to", "mask"} < set(NODES["VMixApply"].inputs)


# --- translations --------------------------------------------------------------------------------


def test_english_is_what_the_nodes_say() -> None:
    expected: dict[str, Any] = {}
    for name, node in NODES.items():
        entry: dict[str, Any] = {"display_name": node.display_name, "description": node.description}
        for key, tooltip in node.inputs.items():
            say = {"name": key}
            if tooltip and not SPECIAL & set(tooltip):  # the node's own is shown, uncompiled
                say["tooltip"] = tooltip
            entry.setdefault("inputs", {})[key] = say
        for index, output in node.outputs.items():
            entry.setdefault("outputs", {})[index] = {"name": output}
        expected[name] = entry
    assert read_locale("en") == expected


def test_chinese_is_complete() -> None:
    found = read_locale("zh")
    assert list(found) == list(NODES)
    for name, node in NODES.items():
        entry = found[name]
        assert entry.keys() <= {"display_name", "description", "inputs", "outputs"}
        assert re.search(r"[\u4e00-\u9fff]", entry["display_name"]), name
        assert re.search(r"[\u4e00-\u9fff]", entry["description"]), name
        assert list(entry.get("inputs", {})) == list(node.inputs), name
        assert list(entry.get("outputs", {})) == list(node.outputs), name
        for key, tooltip in node.inputs.items():
            assert ("tooltip" in entry["inputs"][key]) == bool(tooltip), f"{name}: {key}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_text_to_every_frontend(language: str) -> None:
    for text in texts(read_locale(language)):
        assert text.strip()
        assert not SPECIAL & set(text), text


def test_no_language_is_left_behind() -> None:
    assert sorted(path.name for path in (PACK / "locales").iterdir()) == LANGUAGES


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NODES)
def test_help_page(name: str, language: str) -> None:
    page = (DOCS / PAGES[language].format(node=name)).read_text("utf-8")
    assert page.startswith(f"# {read_locale(language)[name]['display_name']}\n")
    for key in NODES[name].inputs:
        assert f"`{key}`" in page, f"{key} is not described"
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    # The frontend puts /extensions/<pack>/docs/ before it, in <node>/<language>.md too.
    assert pictures == [f"images/{name}.png"]
    assert (DOCS / pictures[0]).is_file(), f"no picture web/docs/{pictures[0]} for {name}'s help"


def test_every_page_is_of_a_node() -> None:
    expected = {page.format(node=name) for name in NODES for page in PAGES.values()}
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} == expected


def test_the_readmes_links_lead_somewhere_within_the_pack() -> None:
    for target in re.findall(r"\]\(([^)#]+)", (PACK / "README.md").read_text("utf-8")):
        if not target.startswith("http"):
            assert ".." not in target
            assert (PACK / target).is_file(), f"README.md: no file {target}"


# --- example workflows ---------------------------------------------------------------------------

WORKFLOWS = PACK / "example_workflows"


def test_there_is_a_workflow_for_the_demo() -> None:
    assert (WORKFLOWS / "vmix_demo.json").is_file()


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_workflow(path: Path) -> None:
    graph = json.loads(path.read_text("utf-8"))
    graphs = [graph, *graph.get("definitions", {}).get("subgraphs", [])]
    types = {node["type"] for each in graphs for node in each["nodes"]}
    ours = {name for name in types if name.startswith("VMix")}
    assert ours
    assert ours <= set(NODES)
    # The template browser asks for <name>.jpg, whatever other pictures there are.
    assert path.with_suffix(".jpg").is_file(), f"no thumbnail {path.stem}.jpg"


# --- what the registry reads ---------------------------------------------------------------------


def test_pyproject() -> None:
    found = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    project, comfy = found["project"], found["tool"]["comfy"]
    crate = tomllib.loads((ROOT / "Cargo.toml").read_text("utf-8"))
    assert project["name"] == "vmix-aesthetics"
    assert project["version"] == crate["workspace"]["package"]["version"]
    # ComfyUI and the registry's client take a table here, not a string.
    assert project["license"] == {"text": crate["workspace"]["package"]["license"]}
    assert project["description"]
    assert project["requires-python"] == ">=3.10"
    repository = crate["package"].get("repository")
    assert project.get("urls", {}).get("Repository") == repository
    assert comfy["PublisherId"] == "vmix-adapter"
    assert comfy["DisplayName"] == "VMix Aesthetics"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert comfy["Icon"].startswith("http") or (PACK / comfy["Icon"]).stat().st_size <= 20_000


def test_requirements_are_the_projects_dependencies() -> None:
    project = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (PACK / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]


@pytest.mark.parametrize("name", ["LICENSE-MIT", "LICENSE-APACHE"])
def test_the_pack_brings_its_licences(name: str) -> None:
    assert (PACK / name).read_bytes() == (ROOT / name).read_bytes()


def test_credits_are_on_the_help_pages() -> None:
    artwork = (PACK / "demo" / "model" / "CREDITS.md").read_text("utf-8")
    for page in PAGES.values():
        help_page = (DOCS / page.format(node="VMixDemoModel")).read_text("utf-8")
        for author in ("Twitter, Inc and other contributors", "Google", "Microsoft Corporation"):
            assert f"© {author}" in artwork
            assert f"© {author}" in help_page
        for address in re.findall(r"\]\((https://[^)]+)\)", artwork):
            assert address in help_page
