"""Uses the API through the client that openapi-python-client generates."""

import hashlib
import io
import os
import time
from http import HTTPStatus

from wrenn import AuthenticatedClient, models, types
from wrenn.api.builds import create_build, get_build, put_build_archive
from wrenn.api.commands import exec_
from wrenn.api.files import read_file, write_file
from wrenn.api.sandboxes import create_sandbox, delete_sandbox, get_sandbox, list_sandboxes

client = AuthenticatedClient(
    base_url=os.environ["WRENN_URL"], token=os.environ["WRENN_API_KEY"], prefix="", auth_header_name="X-API-Key"
)


def want(response, status):
    """Checks the status of a response and returns its parsed body."""
    assert response.status_code == status, (response.status_code, response.content)
    return response.parsed


box = want(
    create_sandbox.sync_detailed(client=client, body=models.CreateSandbox(vcpus=1, memory_mib=256)), HTTPStatus.CREATED
)
assert want(get_sandbox.sync_detailed(box.id, client=client), HTTPStatus.OK).state == "running"
running = want(list_sandboxes.sync_detailed(client=client, state=[models.SandboxState.RUNNING]), HTTPStatus.OK)
assert [each.id for each in running.sandboxes] == [box.id]

written = want(
    write_file.sync_detailed(
        box.id, client=client, path="/home/user/it's 100% ü.txt", body=types.File(payload=io.BytesIO(b"hello\x00"))
    ),
    HTTPStatus.OK,
)
read = read_file.sync_detailed(box.id, client=client, path="/home/user/it's 100% ü.txt")
assert read.status_code == HTTPStatus.OK and read.content == b"hello\x00", read
result = want(exec_.sync_detailed(box.id, client=client, body=models.ExecRequest(cmd="cat", stdin="42\n")), HTTPStatus.OK)
assert (result.exit_code, result.stdout) == (0, "42\n"), result

with open(os.environ["ARCHIVE"], "rb") as f:
    archive = f.read()
digest = "sha256:" + hashlib.sha256(archive).hexdigest()
want(
    put_build_archive.sync_detailed(digest, client=client, body=types.File(payload=io.BytesIO(archive))),
    HTTPStatus.NO_CONTENT,
)
body = models.CreateBuild(
    name="python", recipe="FROM minimal\nCOPY . /srv/\nRUN x\n", archive=digest, skip_pre_post=True
)
build = want(create_build.sync_detailed(client=client, body=body), HTTPStatus.ACCEPTED)
while build.state in ("queued", "running"):
    time.sleep(0.05)
    build = want(get_build.sync_detailed(build.id, client=client), HTTPStatus.OK)
assert build.state == "succeeded", build

want(delete_sandbox.sync_detailed(box.id, client=client), HTTPStatus.NO_CONTENT)
gone = want(exec_.sync_detailed(box.id, client=client, body=models.ExecRequest(cmd="cat")), HTTPStatus.CONFLICT)
assert isinstance(gone, models.Error) and gone.error.code == "conflict", gone
print("done", build.id)
