"""Helpers of these tests lie beside them. Tests of a real engine run where vLLM is: `scripts/test_vllm.sh`."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = (
    [] if importlib.util.find_spec("vllm") else ["test_abuse.py", "test_encoder.py", "test_engine.py", "test_server.py"]
)
