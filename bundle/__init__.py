"""The contract between training, model server and gateway. Needs Pillow and numpy, nothing else."""

import os

# ONNX Runtime's own builds report to their maker unless this is set before it is imported (its Privacy.md).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
