"""Ask a server about a picture: ``python examples/serving/ask.py --server URL --image FILE [--question TEXT]``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed

from apet.eval.endpoint import Endpoint
from apet.eval.images import open_file
from apet.eval.server import conversation, picture_url, server_settings


def main(argv: list[str] | None = None) -> None:
    """Print the answer, and what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", default="What shape is in the image?\nAnswer the question using a single word.")
    args = parser.parse_args(argv)
    server = Endpoint(args.server)
    messages = conversation(args.question, [picture_url(open_file(args.image))])
    answer = server.complete(messages, model=server.model_id(), stream=True, temperature=0, max_tokens=32)
    settings = server_settings(server) or {}
    print(f"answer: {answer.text.strip()}")
    print(f"prompt: {answer.prompt_tokens} tokens; compression: {settings.get('compression')}")


if __name__ == "__main__":
    main()
