"""Asks for a signature at the target, with the kept enrolment that comes on standard input."""

from __future__ import annotations

import json
import os
import sys

import grpc

from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from vm_agent.enrolment import Enrolment, channel_options


def main(kept: bytes, target: str, timeout: float) -> dict[str, object]:
    enrolment = Enrolment.from_json(kept)
    options = channel_options(enrolment.server_name, target)
    sign = operation_pb2.SignOperation(scheme=operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256, digest=os.urandom(32))
    request = agent_pb2.SignRequest(request_id=os.urandom(16), sign=sign)
    with grpc.secure_channel(target, enrolment.credentials(), options) as channel:
        try:
            answer = agent_pb2_grpc.AgentServiceStub(channel).Sign(request, timeout=timeout)
        except grpc.RpcError as error:
            return {"code": error.code().name, "details": error.details()}
    return {"container": len(answer.results.container)}


if __name__ == "__main__":
    print(json.dumps(main(sys.stdin.buffer.read(), sys.argv[1], float(sys.argv[2]))))
