"""Hooks that tell schemathesis what Wrenn's OpenAPI document does not."""

import itertools
import os
import re

import schemathesis


@schemathesis.serializer("application/x-tar")
def tar(_ctx, value):
    """Sends an archive's bytes as schemathesis generated them."""
    return {"data": value if isinstance(value, bytes) else str(value).encode()}


@schemathesis.auth(refresh_interval=None)
class Credential:
    """Adds the credential to the requests. Logging out uses a spare one, because
    the other operations still need the first."""

    def get(self, case, context):
        return os.environ["WRENN_FUZZ_HEADER"], os.environ["WRENN_FUZZ_CREDENTIAL"]

    def set(self, case, data, context):
        header, value = data
        if header == "Authorization" and case.operation.definition.raw.get("operationId") in ("logOut", "logOutAll"):
            value = os.environ["WRENN_FUZZ_SPARE"]
        case.headers[header] = value


calls = itertools.count(1)

PREFIXES = {
    "sandbox_id": "cl-",
    "template_id": "tpl-",
    "build_id": "bld-",
    "host_id": "hst-",
    "team_id": "tm-",
    "user_id": "usr-",
    "key_id": "key-",
    "channel_id": "chn-",
    "X-Team": "tm-",
}


def well_formed(values):
    """Replaces malformed ids with well-formed ones that name nothing. Ids that match
    the document's pattern, 25 digits in base 36, can exceed 128 bits, and the
    service refuses those."""
    for name, prefix in PREFIXES.items():
        if values and name in values:
            digits = re.fullmatch(re.escape(prefix) + "([0-9a-z]{25})", str(values[name]))
            if not digits or int(digits[1], 36) >= 1 << 128:
                values[name] = prefix + "1".zfill(25)


@schemathesis.hook
def before_call(context, case, kwargs):
    # Use another client address for each request, because the service limits logins
    # per address. It trusts this header, which the front door sets.
    n = next(calls)
    case.headers["X-Forwarded-For"] = f"2001:db8::{n >> 16:x}:{n & 0xFFFF:x}"
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    # The service refuses a made-up cursor. Cursors come from the previous page.
    if case.query and "cursor" in case.query:
        del case.query["cursor"]
    well_formed(case.path_parameters)
    well_formed(case.headers)
