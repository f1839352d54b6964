"""A ComfyUI server of its own, with the node pack, and its HTTP API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import host

PYTHON = os.environ.get("COMFYUI_PYTHON") or sys.executable
Prompt = dict[str, dict[str, Any]]
# A proxy that the environment names does not lead to this machine.
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class PromptError(RuntimeError):
    """What ComfyUI says of a prompt that it refuses or that fails."""


class Server:
    """ComfyUI with a base directory of its own; the pack is linked into its custom_nodes."""

    def __init__(
        self,
        base: Path,
        *options: str,
        packs: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        for name, path in {"vmix-aesthetics": host.ROOT / "comfy_nodes", **(packs or {})}.items():
            (base / "custom_nodes" / name).symlink_to(path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        main = ["-m", "comfy.cmd.main"] if host.PACKAGED else [str(host.COMFYUI / "main.py")]
        where = ["--cpu", "--port", str(port), "--base-directory", str(base)]
        self.log = base / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PYTHON, *main, *where, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=base,
                env={**os.environ, **(environment or {})},
            )
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.said()[-4000:]}")

    def said(self) -> str:
        """The log, whatever the encoding of its lines."""
        return self.log.read_text("utf-8", "replace")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def put(self, kind: str, file: Path, name: str | None = None) -> str:
        """Puts a file into models/<kind>; returns the name that widgets show."""
        target = self.base / "models" / kind / (name or file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(file)
        return str(target.relative_to(self.base / "models" / kind))

    def get(self, path: str) -> Any:
        with open_url(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def run(self, prompt: Prompt, timeout: float = 900) -> dict[str, Any]:
        """Queues an API-format prompt, waits, and returns the outputs by node."""
        request = urllib.request.Request(
            f"{self.url}/prompt",
            json.dumps({"prompt": prompt}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with open_url(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from None
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{number}")
            if number in history:
                status = history[number].get("status", {})
                if status.get("status_str") == "error":
                    raise PromptError(json.dumps(status["messages"][-1], ensure_ascii=False))
                outputs: dict[str, Any] = history[number]["outputs"]
                return outputs
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.said()[-4000:]}")
            time.sleep(0.02)
        raise TimeoutError(f"no result after {timeout} s")

    def image(self, outputs: Mapping[str, Any], node: str) -> bytes:
        """The PNG of a SaveImage or PreviewImage node."""
        entry = outputs[node]["images"][0]
        query = f"filename={entry['filename']}&subfolder={entry['subfolder']}&type={entry['type']}"
        with open_url(f"{self.url}/view?{query}", timeout=60) as answer:
            data: bytes = answer.read()
        return data
