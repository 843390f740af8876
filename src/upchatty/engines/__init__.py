"""Engines: OpenAI-compatible servers, ours and others', and the files they load."""
