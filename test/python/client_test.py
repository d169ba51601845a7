"""The API from Python, with a client that is made from the protos: nothing of Go is in it."""

import os
import re
import subprocess
import tempfile
import threading
import time
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from google.protobuf import duration_pb2, struct_pb2

from specql.v1 import orchestrator_pb2, orchestrator_pb2_grpc, registry_pb2, registry_pb2_grpc, run_pb2

PATIENCE = 30  # seconds

REGISTRY = """
services:
  - name: remote
    type: api
    category: test
    runner_config: {base_url: "URL"}
    security_policy: {allow_private_networks: true}
    operations:
      - {name: echo, input_schema: {n: integer}, output_schema: {n: integer}}
      - {name: hold}
"""

ECHO = """
actions:
  - call_service: {service: remote, operation: echo, input: {n: $n}, as: said}
output: {n: "$said.n"}
"""

HOLD = "actions: [{call_service: {service: remote, operation: hold}}]\n"


class Remote(BaseHTTPRequestHandler):
    """Answers echo with what it got, and hold once the test ends."""

    arrived, released = threading.Event(), threading.Event()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/hold":
            self.arrived.set()
            self.released.wait(PATIENCE)
            body = b"{}"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except BrokenPipeError:
            pass  # the call was cancelled

    def log_message(self, *_):
        pass


class ClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.remote = ThreadingHTTPServer(("127.0.0.1", 0), Remote)
        cls.remote.daemon_threads = True
        threading.Thread(target=cls.remote.serve_forever, daemon=True).start()
        cls.dir = tempfile.TemporaryDirectory()
        registry = os.path.join(cls.dir.name, "registry.yaml")
        with open(registry, "w", encoding="utf-8") as f:
            f.write(REGISTRY.replace("URL", "http://127.0.0.1:%d" % cls.remote.server_port))
        cls.mesh = subprocess.Popen(
            [os.environ["SPECQL"], "dev", "--registry", registry, "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0"],
            cwd=cls.dir.name, stdout=subprocess.PIPE, text=True,
        )
        ready = cls.mesh.stdout.readline()
        address = re.match(r"ready api=(\S+)", ready)
        assert address, "specql dev says %r" % ready
        cls.channel = grpc.insecure_channel(address.group(1))
        cls.runs = orchestrator_pb2_grpc.OrchestratorServiceStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        Remote.released.set()
        cls.channel.close()
        cls.mesh.terminate()
        try:
            status = cls.mesh.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            cls.mesh.kill()
            raise
        finally:
            cls.mesh.stdout.close()
            cls.remote.shutdown()
            cls.remote.server_close()
            cls.dir.cleanup()
        assert status == 0, "specql dev ended with %d" % status

    def start(self, workflow, **more):
        return self.runs.ExecuteAction(
            orchestrator_pb2.ExecuteActionRequest(workflow=workflow, **more), timeout=PATIENCE
        ).run

    def test_starts_and_waits(self):
        given = struct_pb2.Struct()
        given.update({"n": 7})
        run = self.start(ECHO, input=given, wait=duration_pb2.Duration(seconds=PATIENCE))
        self.assertEqual(run.status, run_pb2.STATUS_COMPLETED)
        self.assertEqual(run.output.struct_value["n"], 7)
        self.assertEqual([j.service for j in run.jobs], ["remote"])
        again = self.runs.GetRun(orchestrator_pb2.GetRunRequest(id=run.id), timeout=PATIENCE).run
        self.assertEqual(again.id, run.id)

    def test_watches_to_the_end(self):
        given = struct_pb2.Struct()
        given.update({"n": 8})
        run = self.start(ECHO, input=given)
        states = []
        for event in self.runs.WatchRun(orchestrator_pb2.WatchRunRequest(id=run.id), timeout=PATIENCE):
            if event.HasField("run"):
                states.append(event.run.status)
        self.assertEqual(states[-1], run_pb2.STATUS_COMPLETED)

    def test_cancels(self):
        run = self.start(HOLD)
        self.assertTrue(Remote.arrived.wait(PATIENCE))
        begun = time.monotonic()
        cancelled = self.runs.CancelRun(
            orchestrator_pb2.CancelRunRequest(id=run.id, reason="enough"), timeout=PATIENCE
        ).run
        self.assertLess(time.monotonic() - begun, PATIENCE, "it does not wait for the remote")
        self.assertEqual(cancelled.status, run_pb2.STATUS_CANCELLED)
        self.assertEqual(cancelled.error.code, "CANCELLED")
        self.assertIn("enough", cancelled.error.message)

    def test_a_bad_request_names_its_field(self):
        with self.assertRaises(grpc.RpcError) as caught:
            self.start("actions: [{call_service: {service: nobody, operation: x}}]\n")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("nobody", caught.exception.details())

    def test_lists_runners(self):
        runners = registry_pb2_grpc.RegistryServiceStub(self.channel).ListRunners(
            registry_pb2.ListRunnersRequest(), timeout=PATIENCE
        ).runners
        self.assertEqual({r.execution_type for r in runners}, {"http", "shell", "docker", "serverless"})
        self.assertTrue(all(r.reachable for r in runners))


if __name__ == "__main__":
    unittest.main()
