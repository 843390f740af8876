"""The naive way: a gateway as one writes it in an afternoon, with FastAPI and httpx. It checks and records nothing.

`UPSTREAM=URL uvicorn naive:app`
"""

import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

app = FastAPI()
client = httpx.AsyncClient(base_url=os.environ["UPSTREAM"], timeout=60.0)


@app.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Pass the question on, and the answer back."""
    body = await request.json()
    if body.get("stream"):
        return StreamingResponse(stream(body), media_type="text/event-stream")
    response = await client.post("/chat/completions", json=body)
    return JSONResponse(response.json(), status_code=response.status_code)


async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The answer's bytes as they come."""
    async with client.stream("POST", "/chat/completions", json=body) as response:
        async for data in response.aiter_bytes():
            yield data
