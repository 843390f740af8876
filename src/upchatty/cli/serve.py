"""`upchatty serve`."""

import shlex
import sys

import uvloop

from upchatty.app import Running, run_server
from upchatty.cli.progress import RichProgress
from upchatty.settings import Settings

BANNER = """
UpChatty answers at {address}

  chatbot  {chatbot}  ({name})
  key      {key}

Try it:

  curl {address}/api/v1/chat/completions \\
    -H "Authorization: Bearer {usable_key}" \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{chatbot}", "messages": [{{"role": "user", "content": "How are you?"}}]}}'
"""
SHOWN_ONCE = "{key}  (shown this once; keep it)"
KNOWN = "$KEY: the one from the first start, or a new one from: {command}"
FIXED = "the one in UPCHATTY_ADMIN_KEY"


def serve(*, settings: Settings = Settings()) -> None:
    """Start the server. It ends on SIGTERM or Ctrl-C, after the answers that are running."""

    def announce(running: Running) -> None:
        sys.stdout.write(_banner(running, settings))
        sys.stdout.flush()

    uvloop.run(run_server(settings, announce, RichProgress()))


def _banner(running: Running, settings: Settings) -> str:
    if running.key:
        key, usable_key = SHOWN_ONCE.format(key=running.key), running.key
    elif settings.admin_key:
        key, usable_key = FIXED, "$UPCHATTY_ADMIN_KEY"
    else:
        key, usable_key = KNOWN.format(command=_keys_create(settings)), "$KEY"
    return BANNER.format(
        address=running.address,
        chatbot=running.chatbot.id,
        name=running.chatbot.name,
        key=key,
        usable_key=usable_key,
    )


def _keys_create(settings: Settings) -> str:
    """The command that makes a key in this server's database, from whatever folder it is called."""
    if settings.sqlite_file is None:
        return "upchatty keys create NAME (with this server's settings)"
    return f"upchatty keys create NAME --data-dir {shlex.quote(str(settings.data_dir.absolute()))}"
