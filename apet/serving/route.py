"""GET /v1/apet: the compression an OpenAI-compatible vLLM server runs with, for records of what answered.

vLLM adds the route where the plugin is named: ``VLLM_PLUGINS=apet vllm serve ...`` (as `scripts/serve.sh` does).
"""

from typing import Any

from fastapi import FastAPI
from vllm.version import __version__ as vllm_version

from apet import __version__
from apet.serving.settings import read_settings


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
        config = read_settings(engine_client.vllm_config.additional_config)
        state.apet = {
            "apet": __version__,
            "vllm": vllm_version,
            "dtype": str(engine_client.vllm_config.model_config.dtype).removeprefix("torch."),
            "compression": None if config is None else config.to_dict(),
        }
