"""GET /v1/apet: the compression an OpenAI-compatible vLLM server runs with, for records of what answered.

vLLM adds the route where the plugin is named: ``VLLM_PLUGINS=apet vllm serve ...`` (as `scripts/serve.sh` does). Then
the server also logs what a picture takes when it is up, and counts pictures (`apet.serving.metrics`).
"""

import logging
from typing import Any

from fastapi import FastAPI
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.version import __version__ as vllm_version

from apet import __version__
from apet.serving import metrics
from apet.serving.settings import read_settings

_SIZE = (640, 480)  # of the picture that a server gives as an example

logger = logging.getLogger("vllm.apet")


class SettingsRoute:
    """Endpoint plugin (entry point group `vllm.endpoint_plugins`)."""

    name = "apet"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""

        @app.get("/v1/apet")
        async def settings() -> dict[str, Any]:
            return app.state.apet

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Note what the engine was started with."""
        model_config = engine_client.vllm_config.model_config
        config = read_settings(engine_client.vllm_config.additional_config)
        state.apet = {
            "apet": __version__,
            "vllm": vllm_version,
            "dtype": str(model_config.dtype).removeprefix("torch."),
            "compression": None if config is None else config.to_dict(),
        }
        if config is None:
            logger.info("ApET compresses nothing: no additional_config['apet'] was given")
            return
        metrics.start()
        before, after = MULTIMODAL_REGISTRY.get_processing_info(model_config).picture_tokens(*_SIZE)
        state.apet["example"] = {"picture": list(_SIZE), "tokens_before": before, "tokens_after": after}
        logger.info("ApET keeps %d of the %d tokens of a picture of %d x %d pixels", after, before, *_SIZE)
