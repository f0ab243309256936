#!/usr/bin/python3
"""Runs code in contexts for clients of port 49999 of the sandbox.

A context is a Jupyter kernel of its own. Requests and responses have the form
that clients of E2B's code interpreter use:

    POST /execute    {"code", "context_id"?, "language"?, "env_vars"?, "timeout"?}
    GET  /contexts
    POST /contexts   {"language"?, "cwd"?}
    DELETE /contexts/ID
    POST /contexts/ID/interrupt
    POST /contexts/ID/restart
    GET  /health

/execute streams one JSON object per line as events happen. Their "type" is
stdout, stderr, result, error or number_of_executions; end_of_execution is the
last one. If the client disconnects, or after "timeout" seconds, the gateway
interrupts the code, and restarts a kernel that does not stop.

Only the sandbox's owner reaches the gateway, because the host requires a token
for ports, and kernels listen on sockets in a folder of their user.
"""

import http.server
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
import urllib.request
import uuid

import zmq
from jupyter_client import KernelManager

PORT = 49999
MAX_BODY = 8 << 20  # bytes of a request's body
MAX_OUTPUT = 16 << 20  # bytes of one execution's output and results
MAX_CONTEXTS = 16
DEFAULT_TIMEOUT = 300  # seconds
PATIENCE = 5  # seconds that interrupted code has to end

# The formats of a result that have a member of their own.
FORMS = {
    "text/plain": "text", "text/html": "html", "text/markdown": "markdown", "image/svg+xml": "svg", "image/png": "png",
    "image/jpeg": "jpeg", "application/pdf": "pdf", "text/latex": "latex", "application/json": "json",
    "application/javascript": "javascript",
}

# Runs in every kernel when its machine has become another sandbox. Otherwise all
# sandboxes of the template would draw the same random numbers.
RESEED = """
def _():
    import os, random, sys
    random.seed(os.urandom(32))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(list(os.urandom(32)))
_(); del _
"""

# Runs once in the first kernel, so that the modules are in memory when the machine
# is captured.
WARM_UP = """
def _():
    import io
    try:
        import numpy, pandas, matplotlib.pyplot as plt
    except ImportError:
        return
    figure = plt.figure(); plt.plot([1, 2]); figure.savefig(io.BytesIO()); plt.close(figure)
    pandas.DataFrame({"a": [1]})._repr_html_()
_(); del _
"""


class Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


class Context:
    """A kernel, in which one piece of code runs at a time."""

    def __init__(self, name, cwd, env):
        self.id, self.cwd, self.env = name, cwd, dict(env)
        self.lock = threading.Lock()  # held while code runs
        self.identity = None
        self.start()

    def start(self):
        # Sockets in a folder, because clients could reach ports from outside.
        self.manager = KernelManager(kernel_name="python3", transport="ipc", ip=os.path.join(tempfile.mkdtemp(prefix="kernel-"), "s"))
        self.manager.start_kernel(cwd=self.cwd, env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1", **self.env}, stdout=sys.stderr, stderr=sys.stderr)
        self.client = self.manager.client()
        self.client.start_channels(stdin=False, hb=False)
        self.client.wait_for_ready(timeout=900)
        # The client's own sockets need asyncio.
        self.iopub = zmq.Socket.shadow(self.client.iopub_channel.socket.underlying)
        self.shell = zmq.Socket.shadow(self.client.shell_channel.socket.underlying)
        self.death = os.pidfd_open(self.manager.provisioner.process.pid)

    def receive(self, s):
        parts = s.recv_multipart(zmq.NOBLOCK)
        _, parts = self.client.session.feed_identities(parts)
        return self.client.session.deserialize(parts)

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        os.close(self.death)

    def restart(self):
        self.stop()
        self.start()

    def describe(self):
        return {"id": self.id, "language": "python", "cwd": self.cwd}

    def silently(self, code):
        for _ in self.run(code, DEFAULT_TIMEOUT, None, silent=True):
            pass

    def run(self, code, timeout, connection, silent=False):
        """Yields the events of an execution. The caller holds the lock."""
        # Do not queue executions: after an error a kernel clears its queue, and may
        # also drop a request that arrives a moment later (so stop_on_error is off).
        request = self.client.execute(code, silent=silent, store_history=not silent, allow_stdin=False, stop_on_error=False)
        poller = zmq.Poller()
        for s in (self.iopub, self.shell, self.death):
            poller.register(s, zmq.POLLIN)
        caller = None if connection is None else connection.fileno()
        if caller is not None:
            poller.register(caller, zmq.POLLIN)
        deadline, stopping, idle, reply = time.monotonic() + timeout, None, False, None
        try:
            while reply is None or not idle:
                wait = max(0, deadline - time.monotonic())
                if reply is not None:
                    wait = min(wait, 2)  # the kernel's last message may have been dropped
                ready = dict(poller.poll(wait * 1000))
                if self.iopub in ready:
                    m = self.receive(self.iopub)
                    if m["parent_header"].get("msg_id") == request:
                        if m["msg_type"] == "status":
                            idle = idle or m["content"]["execution_state"] == "idle"
                        elif not silent:
                            yield from event(m)
                if self.shell in ready:
                    m = self.receive(self.shell)
                    if m["parent_header"].get("msg_id") == request:
                        reply = m["content"]
                if reply is not None:
                    if not ready:
                        break
                    continue
                if self.death in ready:
                    self.restart()
                    yield failure("KernelDied", "the context's process ended and was restarted: its variables are lost")
                    return
                if caller in ready:
                    poller.unregister(caller)
                    gone = connection.recv(1, socket.MSG_PEEK) == b""
                    caller = None
                    if gone and stopping is None:
                        deadline = time.monotonic()
                if time.monotonic() < deadline:
                    continue
                if stopping is not None:
                    self.restart()
                    yield failure("KernelRestarted", "the code did not stop when it was interrupted, so the context was restarted: its variables are lost")
                    return
                stopping, deadline = True, time.monotonic() + PATIENCE
                self.manager.interrupt_kernel()
            if reply is not None and reply.get("status") == "aborted":
                yield failure("Aborted", "the kernel did not run the code")
            if reply is not None and not silent and "execution_count" in reply:
                yield {"type": "number_of_executions", "execution_count": reply["execution_count"]}
        except GeneratorExit:
            # The client has disconnected. Do not let the next execution wait for this one.
            self.manager.interrupt_kernel()
            if not self.wait_for_reply(request):
                self.restart()
            raise

    def wait_for_reply(self, request):
        """Reports whether the kernel replies to a request within PATIENCE."""
        end = time.monotonic() + PATIENCE
        while (left := end - time.monotonic()) > 0:
            if not self.shell.poll(left * 1000):
                return False
            if self.receive(self.shell)["parent_header"].get("msg_id") == request:
                return True
        return False


def failure(name, value):
    return {"type": "error", "name": name, "value": value, "traceback": ""}


def event(m):
    kind, content = m["msg_type"], m["content"]
    if kind == "stream":
        yield {"type": content["name"], "text": content["text"], "timestamp": time.time_ns()}
    elif kind in ("execute_result", "display_data"):
        out = {"type": "result", "is_main_result": kind == "execute_result"}
        for form, value in content["data"].items():
            if form in FORMS:
                out[FORMS[form]] = value
            else:
                out.setdefault("extra", {})[form] = value
        yield out
    elif kind == "error":
        yield {"type": "error", "name": content["ename"], "value": content["evalue"], "traceback": plain("\n".join(content["traceback"]))}


def plain(text):
    """Returns the text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def bounded(events):
    """Yields events up to MAX_OUTPUT, and after that only those that end them."""
    left, dropped = MAX_OUTPUT, False
    for e in events:
        line = json.dumps(e) + "\n"
        if e["type"] in ("stdout", "stderr", "result"):
            left -= len(line)
            if left < 0:
                if not dropped:
                    dropped = True
                    yield json.dumps({"type": "stderr", "text": "\n[output beyond %d MiB is omitted]\n" % (MAX_OUTPUT >> 20)}) + "\n"
                continue
        yield line


class Gateway:
    def __init__(self):
        self.lock = threading.Lock()
        self.env, self.identity = {}, socket.gethostname()
        self.contexts = {"default": Context("default", home(), {})}
        with self.contexts["default"].lock:
            self.contexts["default"].silently(WARM_UP)
            self.contexts["default"].identity = self.identity

    def become(self):
        """Notices if this machine has become another sandbox, and loads its environment."""
        with self.lock:
            name = socket.gethostname()
            if name != self.identity:
                self.env, self.identity = environment(), name

    def get(self, name):
        with self.lock:
            c = self.contexts.get(name or "default")
        if c is None:
            raise Refused(404, "no such context: %.80s" % name)
        return c

    def create(self, cwd):
        cwd = cwd or home()
        if not os.path.isdir(cwd):
            raise Refused(400, "cwd: no such folder")
        self.become()
        with self.lock:
            if len(self.contexts) >= MAX_CONTEXTS:
                raise Refused(409, "there are %d contexts already, which is the limit: delete one first" % MAX_CONTEXTS)
            name = str(uuid.uuid4())
            self.contexts[name] = None  # reserves the place
        try:
            c = Context(name, cwd, self.env)
            c.identity = self.identity
        except BaseException:
            with self.lock:
                del self.contexts[name]
            raise
        with self.lock:
            self.contexts[name] = c
        return c

    def remove(self, name):
        if name == "default":
            raise Refused(400, "the default context cannot be deleted: restart it instead")
        self.get(name)
        with self.lock:
            c = self.contexts.pop(name, None)
        if c is not None:
            c.stop()

    def restart(self, name):
        c = self.get(name)
        c.manager.interrupt_kernel()
        with c.lock:
            c.env = dict(self.env)
            c.restart()

    def execute(self, body, connection):
        c = self.get(body.get("context_id"))
        if body.get("language") not in (None, "python", "python3"):
            raise Refused(400, "language: only python is supported")
        code, env, timeout = body.get("code"), body.get("env_vars") or {}, body.get("timeout") or DEFAULT_TIMEOUT
        if not isinstance(code, str) or not isinstance(env, dict) or not isinstance(timeout, (int, float)):
            raise Refused(400, "code must be text, env_vars an object, timeout a number of seconds")
        self.become()
        return self.events(c, code, {str(k): str(v) for k, v in env.items()}, timeout, connection)

    def events(self, c, code, env, timeout, connection):
        with c.lock:
            if c.identity != self.identity:
                c.env, c.identity = dict(self.env), self.identity
                c.silently(RESEED + setenv(self.env))
            if env:
                c.silently("import os as _o; _e = dict(_o.environ); del _o\n" + setenv(env))
            try:
                yield from c.run(code, timeout, connection)
            finally:
                if env:
                    c.silently("import os as _o; _o.environ.clear(); _o.environ.update(_e); del _o, _e")
            yield {"type": "end_of_execution"}


def setenv(env):
    return "import os as _o; _o.environ.update(%r); del _o" % env if env else ""


def home():
    return os.path.expanduser("~")


def environment():
    """Returns the sandbox's environment from the host's metadata address."""
    base = "http://169.254.169.254/"
    try:
        r = urllib.request.Request(base + "latest/api/token", method="PUT", headers={"X-metadata-token-ttl-seconds": "60"})
        token = urllib.request.urlopen(r, timeout=5).read().decode()
        r = urllib.request.Request(base, headers={"X-metadata-token": token, "Accept": "application/json"})
        return {str(k): str(v) for k, v in json.load(urllib.request.urlopen(r, timeout=5)).get("env", {}).items()}
    except (OSError, ValueError) as e:
        print("read the sandbox's environment:", e, file=sys.stderr)
        return {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gateway = None

    def log_message(self, *args):
        pass

    def answer(self, status, body=None):
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if body is not None:
            self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        size = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.close_connection = True
            raise Refused(400, "the body needs a Content-Length")
        if size > MAX_BODY:
            self.close_connection = True
            raise Refused(413, "the body is longer than %d bytes" % MAX_BODY)
        data = self.rfile.read(size)
        try:
            body = json.loads(data or b"null")
        except ValueError:
            raise Refused(400, "the body is not JSON")
        if body is None:
            body = {}
        if not isinstance(body, dict):
            raise Refused(400, "the body is not a JSON object")
        return body

    def serve(self):
        started = False
        try:
            body = self.body()
            parts = self.path.partition("?")[0].strip("/").split("/")
            g = self.gateway
            match [self.command, *parts]:
                case ["GET", "health"]:
                    self.answer(200, "OK")
                case ["POST", "execute"]:
                    lines = bounded(g.execute(body, self.connection))
                    self.send_response(200)
                    self.send_header("Content-Type", "application/x-ndjson")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    started = True
                    self.stream(lines)
                case ["GET", "contexts"]:
                    with g.lock:
                        all = [c for c in g.contexts.values() if c is not None]
                    self.answer(200, [c.describe() for c in all])
                case ["POST", "contexts"]:
                    if body.get("language") not in (None, "python", "python3"):
                        raise Refused(400, "language: only python is supported")
                    self.answer(201, g.create(body.get("cwd")).describe())
                case ["DELETE", "contexts", name]:
                    g.remove(name)
                    self.answer(204)
                case ["POST", "contexts", name, "interrupt"]:
                    g.get(name).manager.interrupt_kernel()
                    self.answer(204)
                case ["POST", "contexts", name, "restart"]:
                    g.restart(name)
                    self.answer(204)
                case _:
                    raise Refused(404, "no such path")
        except Refused as e:
            self.answer(e.status, {"code": e.status, "message": e.message})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception as e:
            print("request failed:", repr(e), file=sys.stderr)
            self.close_connection = True
            if not started:
                self.answer(500, {"code": 500, "message": "the code interpreter failed"})

    do_GET = do_POST = do_DELETE = serve

    def stream(self, lines):
        try:
            for line in lines:
                data = line.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        finally:
            lines.close()
        self.wfile.write(b"0\r\n\r\n")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    Handler.gateway = Gateway()
    Server(("", PORT), Handler).serve_forever()
