"""The process that runs llama.cpp: `python -m upchatty.engines.llama_child`.

It reads its parameters as one line of JSON from standard input (neither arguments nor environment,
which other users of the machine can see), serves on a free port of the loopback interface, prints its
base URL as one line, and ends when its parent does.
"""

import json
import os
import sys
import threading
from typing import Any

import xllamacpp

from upchatty.processes import die_with, give_way

NGRAM_MATCH, NGRAM_DRAFT = 4, 8  # tokens; on a CPU, longer drafts cost more than they bring
BATCH_TOKENS = 128
QUIET = 1  # errors only


def main() -> None:
    """Serve until the parent ends or says so by closing the pipe."""
    parameters = json.loads(sys.stdin.readline())
    die_with(parameters["parent"])
    if parameters["nice"]:
        give_way(parameters["nice"])
    try:
        server = xllamacpp.Server(_llama_parameters(parameters))
    except RuntimeError:
        os._exit(1)  # llama.cpp has said why on standard error
    print(server.listening_address, flush=True)
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # nobody reads on, and a full pipe would block
    threading.Event().wait()


def _llama_parameters(parameters: dict[str, Any]) -> Any:
    """The parameters in llama.cpp's terms: https://github.com/ggml-org/llama.cpp/blob/master/common/common.h"""
    llama = xllamacpp.CommonParams()
    llama.model.path = parameters["path"]
    llama.hostnames = ["127.0.0.1"]
    llama.port = 0
    llama.api_keys = [parameters["token"]]
    llama.n_parallel = parameters["slots"]
    llama.n_ctx = parameters["slots"] * parameters["context"]
    llama.n_gpu_layers = parameters["gpu_layers"]
    llama.cpuparams.n_threads = llama.cpuparams_batch.n_threads = parameters["threads"]
    # Small batches: an abandoned prompt is dropped between two, and other answers go on in between.
    llama.n_batch = llama.n_ubatch = BATCH_TOKENS
    llama.cache_ram_mib = parameters["prompt_cache_mib"]
    llama.endpoint_props = True
    if parameters["task"] != "chat":
        _prepare_for_texts(llama, parameters)
    llama.prefill_assistant = False  # a last message of the assistant is history, not a beginning
    llama.ui = False
    llama.verbosity = QUIET
    if parameters["task"] == "chat" and parameters["speculation"] == "ngram":
        llama.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        llama.speculative.ngram_simple.size_n = NGRAM_MATCH
        llama.speculative.ngram_simple.size_m = NGRAM_DRAFT
    return llama


def _prepare_for_texts(llama: Any, parameters: dict[str, Any]) -> None:
    """What embeddings and reranking want: nothing is kept of a text, and each is computed in one batch."""
    llama.embedding = True
    if pooling := "rank" if parameters["task"] == "rerank" else parameters["pooling"]:
        llama.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
    llama.n_batch = llama.n_ubatch = parameters["context"]
    llama.cache_ram_mib = 0
    llama.cache_prompt = llama.cache_idle_slots = False


if __name__ == "__main__":
    main()
