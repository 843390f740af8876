"""Installs what UpChatty is compared with, at first use, into a folder of its own that git ignores."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".cache" / "peers"
LITELLM = ["litellm[proxy]==1.106.2"]
NAIVE = ["fastapi==0.165.0", "httpx==0.28.1", "uvicorn[standard]==0.54.0"]
PORTKEY = {"@portkey-ai/gateway": "1.15.2"}
# Portkey's streams fail with newer versions of this one, which it does not exclude.
PORTKEY_OVERRIDES = {"@hono/node-server": "1.14.1"}


class NotToBeHad(Exception):
    """A peer cannot be installed or started; says why."""


def python_packages(name: str, requirements: list[str]) -> Path:
    """A virtual environment with these packages.

    Args:
        name: The folder's name.
        requirements: What pip is asked for.

    Returns:
        The folder of its programs.

    Raises:
        NotToBeHad: They cannot be installed.
    """
    venv = FOLDER / name
    if _is_installed(venv, requirements):
        return venv / "bin"
    _run([sys.executable, "-m", "venv", "--clear", str(venv)], name)
    pip = [str(venv / "bin" / "python"), "-I", "-m", "pip", "install", "--quiet", "--no-input"]
    _run([*pip, *requirements], name)
    return _finish(venv, requirements) / "bin"


def node_packages(name: str, versions: Mapping[str, str], overrides: Mapping[str, str]) -> Path:
    """A folder with npm packages.

    Args:
        name: The folder's name.
        versions: The packages and their versions.
        overrides: Versions of what they need themselves, where the newest will not do.

    Returns:
        The folder in which node_modules is.

    Raises:
        NotToBeHad: They cannot be installed.
    """
    npm, folder = program("npm", "npm"), FOLDER / name
    package = json.dumps({"private": True, "dependencies": versions, "overrides": overrides})
    if _is_installed(folder, [package]):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(package)
    _run([npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts"], name)
    return _finish(folder, [package])


def program(name: str, debian_package: str | None) -> str:
    """The path of a program.

    Args:
        name: The program's.
        debian_package: What is installed when it is missing and this is root's Debian or Ubuntu.

    Raises:
        NotToBeHad: It is not there.
    """
    if path := shutil.which(name, path=os.defpath + ":/usr/sbin:/sbin:" + os.environ.get("PATH", "")):
        return path
    if debian_package and os.geteuid() == 0 and shutil.which("apt-get"):
        _run(["apt-get", "update", "--quiet=2"], name)
        _run(["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", debian_package], name)
        return program(name, None)
    hint = f"; install it with: apt-get install {debian_package}" if debian_package else ""
    raise NotToBeHad(f"there is no {name} on the PATH{hint}")


def _is_installed(folder: Path, what: list[str]) -> bool:
    stamp = folder / "installed"
    return stamp.is_file() and stamp.read_text() == "\n".join(what)


def _finish(folder: Path, what: list[str]) -> Path:
    (folder / "installed").write_text("\n".join(what))
    return folder


def _run(command: list[str], name: str) -> None:
    print(f"Installing {name}; this happens once.", file=sys.stderr, flush=True)
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode:
        last = result.stdout.decode(errors="replace").strip().splitlines()[-1:]
        raise NotToBeHad(f"{name} cannot be installed: {' '.join(last)}")
