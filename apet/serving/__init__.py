"""The vision stage inside vLLM: a plugin that shortens the prompt where the engine expands its images.

Importing this package loads no vLLM. `apet.serving.plugin` is what vLLM finds (entry point group
`vllm.general_plugins`); nothing happens without ``--additional-config '{"apet": {...}}'``.
"""
