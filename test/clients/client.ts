// Uses the API through openapi-fetch, with the types that openapi-typescript generates.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const client = createClient<paths>({
  baseUrl: process.env.WRENN_URL!,
  headers: { "X-API-Key": process.env.WRENN_API_KEY! },
});

// want checks the status of a response and returns its parsed body.
function want<T>(answer: { data?: T; error?: unknown; response: Response }, status: number): T {
  assert.equal(answer.response.status, status, JSON.stringify(answer.error));
  return answer.data!;
}

const box = want(await client.POST("/v1/sandboxes", { body: { vcpus: 1, memory_mib: 256 } }), 201);
const of = { sandbox_id: box.id };
assert.equal(want(await client.GET("/v1/sandboxes/{sandbox_id}", { params: { path: of } }), 200).state, "running");
const running = want(await client.GET("/v1/sandboxes", { params: { query: { state: ["running"] } } }), 200);
assert.deepEqual(running.sandboxes.map((each) => each.id), [box.id]);

const file = { path: of, query: { path: "/home/user/it's 100% ü.txt" } };
const bytes = new Uint8Array([104, 101, 108, 108, 111, 0]);
const raw = { bodySerializer: (body: unknown) => body as BodyInit, headers: { "Content-Type": "application/octet-stream" } };
// The generated type of a binary body is string, as in the OpenAPI document.
want(await client.PUT("/v1/sandboxes/{sandbox_id}/files", { params: file, body: bytes as unknown as string, ...raw }), 200);
const read = want(await client.GET("/v1/sandboxes/{sandbox_id}/files", { params: file, parseAs: "arrayBuffer" }), 200);
assert.deepEqual(new Uint8Array(read), bytes);
const result = want(
  await client.POST("/v1/sandboxes/{sandbox_id}/exec", { params: { path: of }, body: { cmd: "cat", stdin: "42\n" } }),
  200,
);
assert.deepEqual([result.exit_code, result.stdout], [0, "42\n"]);

const archive = readFileSync(process.env.ARCHIVE!);
const digest = "sha256:" + createHash("sha256").update(archive).digest("hex");
want(
  await client.PUT("/v1/templates/builds/archives/{digest}", {
    params: { path: { digest } },
    body: archive as unknown as string,
    ...raw,
    headers: { "Content-Type": "application/x-tar" },
  }),
  204,
);
let build: components["schemas"]["Build"] = want(
  await client.POST("/v1/templates/builds", {
    body: { name: "typescript", recipe: "FROM minimal\nCOPY . /srv/\nRUN x\n", archive: digest, skip_pre_post: true },
  }),
  202,
);
while (build.state === "queued" || build.state === "running") {
  await new Promise((again) => setTimeout(again, 50));
  build = want(await client.GET("/v1/templates/builds/{build_id}", { params: { path: { build_id: build.id } } }), 200);
}
assert.equal(build.state, "succeeded");

want(await client.DELETE("/v1/sandboxes/{sandbox_id}", { params: { path: of } }), 204);
const gone = await client.POST("/v1/sandboxes/{sandbox_id}/exec", { params: { path: of }, body: { cmd: "cat" } });
assert.equal(gone.response.status, 409);
assert.equal(gone.error!.error.code, "conflict");
console.log("done", build.id);
