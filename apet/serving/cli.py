"""Serve a checkpoint with vLLM and ApET: what `scripts/serve.sh` runs, and `apet serve`.

Flags that are not listed here go to `vllm serve` as they are. Nothing of vLLM is loaded here.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apet.serving.settings import KEY, check_family, read_settings, served

LOCAL = ("127.0.0.1", "::1", "localhost")


def parser() -> argparse.ArgumentParser:
    """Flags of this command."""
    flags = argparse.ArgumentParser("apet serve", description=__doc__.partition("\n")[0], allow_abbrev=False)
    flags.add_argument("model", help="checkpoint in the Hugging Face layout, a folder or a hub id")
    flags.add_argument("--tokens", default="64", help="visual tokens kept per picture (64), or none: without ApET")
    flags.add_argument("--settings", metavar="JSON", help="all settings, fields of ApetConfig, in place of --tokens")
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    flags.add_argument("--port", default="8000", help="port (8000)")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Say what will be served, and become the server.

    Raises:
        SystemExit: A flag or setting that cannot be, or no vLLM; the message says which.
    """
    flags = parser()
    args, further = flags.parse_known_args(argv)
    try:
        settings = _settings(args)
    except ValueError as error:
        flags.error(str(error))
    command = _command(args, settings, further)
    if shutil.which(command[0]) is None:
        flags.error("there is no command vllm; install it beside ApET: pip install 'apet[vllm]'")
    for line in banner(args, settings, further):
        print(f"[apet] {line}", file=sys.stderr, flush=True)
    # Naming the plugin lets vLLM add its route GET /v1/apet too.
    os.execvpe(command[0], command, {"VLLM_PLUGINS": "apet", **os.environ})


def banner(args: argparse.Namespace, settings: dict[str, Any] | None, further: Sequence[str]) -> list[str]:
    """What is said before a server starts: address, model, budget, where to look."""
    shown = args.host if ":" not in args.host else f"[{args.host}]"
    scheme = "https" if any(word.startswith("--ssl-certfile") for word in further) else "http"
    address = f"{scheme}://{shown}:{args.port}"
    lines = [f"model    {args.model}"]
    if settings is None:
        lines.append("budget   none: every visual token goes into the prompt")
    else:
        said = ", ".join(f"{name}={value}" for name, value in settings.items())
        lines.append(f"budget   {said}; when it is up, the server says how many tokens a picture has left")
    lines.append(f"address  {address}/v1 (OpenAI's API), {address}/health, {address}/v1/apet, {address}/metrics")
    keyed = "VLLM_API_KEY" in os.environ or any(word.startswith("--api-key") for word in further)
    if args.host not in LOCAL and not keyed:
        lines.append(
            "warning  whoever reaches this address may use the model: give a key with --api-key or VLLM_API_KEY"
        )
    return lines


def _settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of the engine, checked as far as the checkpoint's config.json allows.

    Raises:
        ValueError: Something that cannot be.
    """
    if args.settings is not None:
        try:
            settings = json.loads(args.settings)
        except json.JSONDecodeError as error:
            raise ValueError(f"--settings {args.settings} is no JSON: {error}") from None
    elif args.tokens == "none":
        return None
    elif args.tokens.isdecimal():
        settings = {"visual_token_num": int(args.tokens)}
    else:
        raise ValueError(f"--tokens {args.tokens} must be a number of tokens, or none")
    config = read_settings({KEY: settings})
    path = Path(args.model, "config.json")
    if path.is_file():
        for architecture in json.loads(path.read_text(encoding="utf-8")).get("architectures") or ():
            check_family(config, served(architecture))
    return settings


def _command(args: argparse.Namespace, settings: dict[str, Any] | None, further: Sequence[str]) -> list[str]:
    command = ["vllm", "serve", args.model, "--host", args.host, "--port", args.port, "--enable-prompt-tokens-details"]
    if not any(word.startswith("--served-model-name") for word in further):
        command += ["--served-model-name", Path(args.model).name]
    if settings is not None:
        command += ["--additional-config", json.dumps({KEY: settings})]
    return [*command, *further]


if __name__ == "__main__":
    sys.exit(main())
