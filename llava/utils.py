"""Odds and ends that LLaVA scripts import: logging into a daily file, moderation, and a start-up switch."""

import io
import json
import logging
import logging.handlers
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from llava.constants import LOGDIR

_log = logging.getLogger(__name__)

server_error_msg = "**The server is busy or cannot be reached. Please send your message again or reload the page.**"
moderation_msg = "Your message was refused by the content filter. Please change it and try again."

MODERATION_URL = "https://api.openai.com/v1/moderations"
MODERATION_TIMEOUT_S = 5.0


def disable_torch_init() -> None:
    """Nothing: checkpoints are loaded without initialising weights first. Kept because scripts call it."""


class StreamToLogger(io.TextIOBase):
    """A text stream whose complete lines become log records.

    Args:
        logger: where the lines go.
        log_level: their level.
    """

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.logger = logger
        self.log_level = log_level
        self._pending = ""

    def write(self, text: str) -> int:
        """Log the lines completed by `text`; the rest waits for its line end or `flush`."""
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Log a started line."""
        if self._pending:
            self.logger.log(self.log_level, self._pending.rstrip())
            self._pending = ""


def build_logger(logger_name: str, logger_filename: str, redirect: bool = False) -> logging.Logger:
    """A logger that writes to stderr and to LOGDIR/`logger_filename`, which starts anew every day (UTC).

    Asking twice for one name gives one logger without doubled lines.

    Args:
        logger_name: name of the logger.
        logger_filename: file below `llava.constants.LOGDIR`.
        redirect: send this process's stdout and stderr through loggers named "stdout" and "stderr" as well.
    """
    layout = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        Path(LOGDIR).mkdir(parents=True, exist_ok=True)
        path = Path(LOGDIR) / logger_filename
        file = logging.handlers.TimedRotatingFileHandler(path, when="D", utc=True, encoding="utf-8", delay=True)
        # The real stderr: a redirected one would log what it logs.
        for handler in (logging.StreamHandler(sys.__stderr__), file):
            handler.setFormatter(layout)
            logger.addHandler(handler)
        logger.propagate = False
    if redirect:
        sys.stdout = StreamToLogger(_sharing("stdout", logger), logging.INFO)
        sys.stderr = StreamToLogger(_sharing("stderr", logger), logging.ERROR)
    return logger


def _sharing(name: str, source: logging.Logger) -> logging.Logger:
    """Logger `name` with the handlers of `source`."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.handlers = list(source.handlers)
    logger.propagate = False
    return logger


def violates_moderation(text: str) -> bool:
    """Whether OpenAI's moderation service flags `text`; needs OPENAI_API_KEY. False when the service cannot answer."""
    request = urllib.request.Request(
        MODERATION_URL,
        data=json.dumps({"input": text.replace("\n", "")}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=MODERATION_TIMEOUT_S) as response:
            return bool(json.load(response)["results"][0]["flagged"])
    except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError) as error:
        _log.warning("moderation is unavailable (%s); the text is let through", error)
        return False


def pretty_print_semaphore(semaphore: Any) -> str:
    """A semaphore's state on one line."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"
