"""The OpenAPI document: that it lists what is served, and that what is served keeps to it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import ADMIN_KEY, Server
from upchatty.api.routes import BASE_PATH, FOR_ADMIN_KEYS, FOR_ANY_KEY, FOR_EVERYBODY
from upchatty.testing import FaultyUpstream

pytestmark = pytest.mark.any_database  # the document is made of the handlers alone

ROOT = Path(__file__).parents[1]
DOCUMENT = "/schema/openapi.json"
EXTENT = {
    "sqlite": ("--max-examples", "8"),
    "postgresql": ("--max-examples", "3", "--phases", "fuzzing"),
}
"""How much schemathesis does. What it tries systematically is about the wire, which is the same on both
databases; values that only one of them takes are found by chance on the other."""


@pytest.fixture(scope="module")
def operations(server: Server) -> dict[tuple[str, str], dict]:  # type: ignore[type-arg]
    """The documented operations by method and path."""
    document = httpx.get(server.address + DOCUMENT).json()
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def served(handlers, base: str = "") -> set[tuple[str, str]]:  # type: ignore[no-untyped-def]
    return {
        (method, base + path.replace(":str}", "}"))
        for handler in handlers
        for path in handler.paths
        for method in handler.http_methods
    }


def test_document_needs_no_key_and_is_json(server: Server) -> None:
    response = httpx.get(server.address + DOCUMENT)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert not [name for name in document["components"]["schemas"] if "upchatty" in name]


def test_document_lists_exactly_what_is_served(operations) -> None:  # type: ignore[no-untyped-def]
    with_key = served(FOR_ANY_KEY + FOR_ADMIN_KEYS, BASE_PATH)
    assert set(operations) == with_key | served(FOR_EVERYBODY)


def test_every_operation_is_described(operations) -> None:  # type: ignore[no-untyped-def]
    names = [operation["operationId"] for operation in operations.values()]
    assert len(set(names)) == len(names)
    for operation in operations.values():
        assert " " in operation["summary"] and not operation["summary"].endswith(".")
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_only_operational_paths_are_open(operations, server: Server) -> None:  # type: ignore[no-untyped-def]
    document = httpx.get(server.address + DOCUMENT).json()
    assert document["security"] == [{"key": []}]
    for (_, path), operation in operations.items():
        if path.startswith(BASE_PATH):
            assert "security" not in operation
            assert {"400", "401", "403", "500", "503"} <= set(operation["responses"])
        else:
            assert operation["security"] == []
            assert {"500", "503"} <= set(operation["responses"])


def test_completions_are_documented_with_both_media_types(operations) -> None:  # type: ignore[no-untyped-def]
    responses = operations["POST", BASE_PATH + "/chat/completions"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"404", "413", "415", "502", "503", "504"} <= set(responses)


@pytest.mark.parametrize(
    ("handlers", "base"), [(FOR_ANY_KEY + FOR_ADMIN_KEYS, BASE_PATH), (FOR_EVERYBODY, "")]
)
def test_options_names_every_method_of_a_path(handlers, base: str, server: Server) -> None:  # type: ignore[no-untyped-def]
    methods: dict[str, set[str]] = {}
    for method, path in served(handlers, base):
        methods.setdefault(path, {"OPTIONS"}).update({method, "HEAD"} if method == "GET" else {method})
    for path, expected in methods.items():
        for method in ("OPTIONS", "TRACE"):
            response = httpx.request(
                method, server.address + path, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
            )
            assert response.status_code == (204 if method == "OPTIONS" else 405)
            assert set(response.headers["allow"].split(", ")) == expected


@pytest.fixture
def engine() -> Iterator[str]:
    """The models of a server before an engine that answers at once: hundreds of answers are asked for,
    and what they say does not matter here."""
    with FaultyUpstream() as upstream:
        yield json.dumps({"default": {"url": upstream.url}})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("database", EXTENT)
def test_server_keeps_to_the_document(
    database: str, engine: str, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    """All of schemathesis's checks and phases on every operation: what the document allows is accepted,
    what it forbids is refused, and every answer is one that it announces."""
    # Nobody is to fetch the URLs that it makes up.
    environment = {"UPCHATTY_WORKERS": "0", "UPCHATTY_MODELS": engine}
    if url := new_database(database):
        environment["UPCHATTY_DATABASE_URL"] = url
    with Server(tmp_path, **environment) as server:  # of its own: what it makes up, it also deletes
        with server.client() as client:
            short = {"name": "short answers", "instructions": "Answer with one word.", "max_tokens": 2}
            chatbot = client.post("/chatbots", json=short).json()["id"]
            key_id = client.get("/keys").json()["data"][0]["id"]
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", server.address + DOCUMENT),
                *("--header", f"Authorization: Bearer {ADMIN_KEY}"),
                *("--checks", "all", "--seed", "1", *EXTENT[database]),
                *("--suppress-health-check", "too_slow"),  # which a busy machine is
                *("--generation-database", "none", "--request-timeout", "120", "--no-color"),
            ],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "SCHEMATHESIS_HOOKS": "tests.openapi_hooks",
                "SCHEMATHESIS_CHATBOT": chatbot,
                "SCHEMATHESIS_KEY_ID": key_id,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    documented = served(FOR_ANY_KEY + FOR_ADMIN_KEYS, BASE_PATH) | served(FOR_EVERYBODY)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert re.search(rf"Tested: +{len(documented)}\b", finished.stdout), finished.stdout
