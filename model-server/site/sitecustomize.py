"""Python runs this first in every worker of TorchServe: what TorchServe leaves undone, and what it does in vain."""

import os
import sys
import threading
import time
import types

from bundle.cpus import gpus


def _end_with(parent: int) -> None:
    """A worker ends with its JVM. TorchServe's notices a lost connection, but one that is not connected yet would wait
    30 s for a caller that is gone, holding memory and its port."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _without_torch() -> None:
    """TorchServe's worker imports torch to ask whether an answer is a tensor, and ours never is: on a CPU, where ONNX
    Runtime runs the model, that would be all the use of two seconds and 130 MB."""
    torch = sys.modules["torch"] = types.ModuleType("torch", _without_torch.__doc__)
    torch.Tensor = ()  # type: ignore[attr-defined]  # isinstance(answer, ()) is False


threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
if not gpus():
    _without_torch()
