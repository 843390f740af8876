"""Hooks for schemathesis: what no schema can say, so that requests which are meant to be valid are.

A chatbot and a model have to exist; what the tests themselves live on must not be deleted; and an answer
has to be short.
"""

import os
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode, HookContext

CHATBOT = os.environ["SCHEMATHESIS_CHATBOT"]
"""A chatbot whose answers are short. It is asked, and neither changed nor deleted."""
KEY = os.environ["SCHEMATHESIS_KEY_ID"]
"""The id of the key that the requests carry."""


@schemathesis.hook
def filter_case(context: HookContext, case: Case) -> bool:
    """Leave alone what all other requests need."""
    named = [str(value).partition("@")[0] for value in (case.path_parameters or {}).values()]
    return case.method not in ("PATCH", "DELETE") or not {CHATBOT, KEY}.intersection(named)


@schemathesis.hook
def map_case(context: HookContext, case: Case) -> Case:
    """Name what exists, and end a range after its beginning."""
    if case.meta and case.meta.generation.mode is GenerationMode.POSITIVE:
        if isinstance(case.body, dict):
            _name_what_exists(case.body)
        if case.query and "from" in case.query:
            case.query |= {"by": "chatbot", "to": "9999-12-31"}  # by day, so long a range is refused
    return case


def _name_what_exists(body: dict[str, Any]) -> None:
    if "messages" in body and "query" not in body:
        body["model"] = CHATBOT
        if (body.get("response_format") or {}).get("type") == "json_schema":
            body["response_format"]["json_schema"] = {"schema": {"type": "boolean"}}
    if body.get("chatbots"):
        body["chatbots"] = [CHATBOT]
    if "published_version" in body:
        body["published_version"] = 1
