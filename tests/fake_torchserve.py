"""A stand-in for TorchServe that speaks its gRPC method, with the real handler inside."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import handler
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from gateway.client import METHOD, Response


def _request():
    """TorchServe's PredictionsRequest, as its inference.proto has it."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package="tests", syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=kind.TYPE_BYTES, label=kind.LABEL_OPTIONAL)
    request.field.add(name="model_name", number=1, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL)
    found = {"type": kind.TYPE_MESSAGE, "type_name": ".tests.PredictionsRequest.InputEntry"}
    request.field.add(name="input", number=3, label=kind.LABEL_REPEATED, **found)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tests.PredictionsRequest"))


Request = _request()


class FakeTorchServe:
    """Answers Predictions on a free port; `fail` makes the next calls end with these (code, details)."""

    def __init__(self) -> None:
        self.models: dict[str, handler.Model] = {}
        self.fail: list[tuple[grpc.StatusCode, str]] = []
        self.calls: list[dict[str, bytes]] = []
        self.metadata: list[dict[str, str]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.server = grpc.server(ThreadPoolExecutor(64))
        service, method = METHOD[1:].split("/")
        rpc = grpc.unary_unary_rpc_method_handler(self._predictions, Request.FromString, Response.SerializeToString)
        self.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: rpc})])
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def end(self):
        self.hold.set()
        self.server.stop(0).wait()

    def _predictions(self, request, context):
        self.calls.append(dict(request.input))
        self.metadata.append(dict(context.invocation_metadata()))
        if self.fail:
            context.abort(*self.fail.pop(0))
        deadline = time.monotonic() + 10
        while not self.hold.wait(0.01) and context.is_active() and time.monotonic() < deadline:
            pass
        if request.model_name not in self.models:
            context.abort(grpc.StatusCode.INTERNAL, f"Model not found: {request.model_name}")
        (frame,) = self.models[request.model_name].answer([dict(request.input)])
        return Response(prediction=frame)
