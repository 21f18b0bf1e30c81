"""Every request that a page shows is answered by a real node: the commands run as they are written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_node import MODEL, Node
from tool_template import TEMPLATE

from schemas.settings import load

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHOWN_URL = "http://127.0.0.1:8000"
TOKEN = "geheim"
API = (DOCS / "guides" / "api.md").read_text()


def requests_of(page: Path) -> list[str]:
    """The code blocks of a page that send requests to a node."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if re.search(rf"^curl .*({SHOWN_URL}|\$NODE)", block, re.MULTILINE)]


EXAMPLES = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, block in enumerate(requests_of(page), 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def node(smollm2: Path, registry: str, free_port: Callable[[], int], folder: Path) -> Iterator[Node]:
    """A node whose target has a chat template for tools."""
    target = folder / "target"
    target.mkdir()
    for file in smollm2.iterdir():
        (target / file.name).symlink_to(file.resolve())
    (target / "chat_template.jinja").unlink()
    (target / "chat_template.jinja").write_text(TEMPLATE)
    tokens = folder / "tokens"
    tokens.write_text(f"{TOKEN}\nold-token\n")
    flags = {
        "target.path": str(target),
        "traces.enabled": False,
        "registry.tracking_uri": registry,
        "serve.port": free_port(),
        "serve.max_model_len": 384,
        "serve.admin_tokens_file": str(tokens),
    }
    node = Node(load(environ={}, flags=flags), folder)
    try:
        node.wait_ready()
        yield node
    finally:
        node.close()


def run(block: str, node: Node, folder: Path) -> list[tuple[int, Any]]:
    """Run a code block as a user would; return status and JSON of every answer."""
    # The services that a page starts before the request run already.
    lines = [line for line in block.splitlines() if not line.startswith(("make ", "cp ", "docker "))]
    script = "\n".join(lines).replace(SHOWN_URL, node.url).replace("your-model", MODEL)
    (folder / ".curlrc").write_text('silent\nshow-error\nwrite-out = "\\n%{http_code}\\n"\n')
    environ = {"CURL_HOME": str(folder), "AURORA_SERVE__ADMIN_TOKEN": TOKEN, "TOKENS": str(folder / "tokens")}
    path = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-euc", script], env=environ | path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    answers = done.stdout.splitlines()
    return [(int(code), json.loads(text)) for text, code in zip(answers[::2], answers[1::2], strict=True)]


def bodies_of(block: str) -> list[dict[str, Any]]:
    """The JSON that the commands of a block send."""
    words = shlex.split(block, comments=True)
    return [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-d"]


@pytest.mark.parametrize("block", EXAMPLES)
def test_a_documented_command_is_answered(block: str, node: Node, folder: Path) -> None:
    answers = run(block, node, folder)
    assert len(answers) == block.count("curl ")
    # The registry has no version yet that could be pinned.
    expected = [404 if "/pin" in line else 200 for line in block.splitlines() if line.startswith("curl ")]
    assert [code for code, _ in answers] == expected, answers
    for body, (_, answer) in zip(bodies_of(block), answers, strict=False):
        if "messages" in body:
            check_chat(body, answer["choices"][0])


def check_chat(body: dict[str, Any], choice: dict[str, Any]) -> None:
    """Assert that an answer is what its request asks for, unless the context ended it."""
    content, calls = choice["message"]["content"], choice["message"].get("tool_calls")
    assert content or calls
    if choice["finish_reason"] == "length":
        return
    if "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        assert json.loads(content).keys() == set(schema["required"])
    if body.get("tool_choice") == "required":
        functions = {tool["function"]["name"]: tool["function"] for tool in body["tools"]}
        assert choice["finish_reason"] == "tool_calls"
        for call in calls:
            required = functions[call["function"]["name"]]["parameters"]["required"]
            assert set(required) <= json.loads(call["function"]["arguments"]).keys()


def test_the_api_page_shows_a_grammar_and_a_tool() -> None:
    bodies = [body for block in requests_of(DOCS / "guides" / "api.md") for body in bodies_of(block)]
    assert [sorted(body.keys() & {"response_format", "tools"}) for body in bodies] == [["response_format"], ["tools"]]


@pytest.mark.parametrize(("name", "value"), re.findall(r"`([a-z_]+): ([^`]+)`", API))
def test_a_documented_parameter_is_accepted(name: str, value: str, node: Node) -> None:
    body = {"model": MODEL, "max_tokens": 1, name: json.loads(value)}
    if name == "max_tokens":
        path, body = "completions", body | {"prompt": "hello", "echo": True}
    else:
        path, body = "chat/completions", body | {"messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{node.url}/v1/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("name", "value"), re.findall(r"`(x-aurora-[a-z]+): (\S+)` \(request header\)", API))
def test_a_documented_header_is_accepted(name: str, value: str, node: Node) -> None:
    body = {"model": MODEL, "max_tokens": 1, "prompt": "hello"}
    answer = httpx.post(f"{node.url}/v1/completions", json=body, headers={name: value}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "x-aurora-speculator" in answer.headers


@pytest.mark.parametrize("name", re.findall(r"`([a-z_]+)`", re.findall(r"cannot serve \(([^)]*)\)", API)[0]))
def test_a_parameter_that_is_documented_as_rejected_is_named(name: str, node: Node) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = httpx.post(f"{node.url}/v1/chat/completions", json={"model": MODEL, "messages": messages, name: ["a"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_documented_template_variables_reach_the_chat_template(node: Node) -> None:
    [variables] = re.findall(r"such as `(\{[^`]*\})`, as in vLLM", API)
    body = {"messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": json.loads(variables)}
    answer = httpx.post(f"{node.url}/v1/chat/completions", json={"model": MODEL, "max_tokens": 1} | body, timeout=60)
    assert answer.status_code == 200, answer.text
