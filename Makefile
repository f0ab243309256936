# make run starts Wrenn, make test runs the tests as CI does, and make bench prints the
# tables of docs/benchmarks.md.

SHELL   := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

GOFUMPT     := mvdan.cc/gofumpt@v0.12.0
DEADCODE    := golang.org/x/tools/cmd/deadcode@v0.52.0
NFPM        := github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.44.2
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BUF         := github.com/bufbuild/buf/cmd/buf@v1.75.0
GOLANGCI    := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
# Stamps of installed Node.js and Python packages, which lock files pin.
LINTERS  := .ci/lint/node_modules/.package-lock.json
PACKAGES := test/browser/node_modules/.package-lock.json test/clients/node_modules/.package-lock.json .cache/python/ready

# Distribution packages that Wrenn needs at run time (a test compares them with the table
# in internal/programs), and those that its tests need in addition.
RUN_PACKAGES  := qemu-system-x86 postgresql redis-server mmdebstrap e2fsprogs kmod ca-certificates
# The race detector needs gcc. LAB_PACKAGES has the packages that test/lab needs.
LAB_PACKAGES  := qemu-utils busybox-static nftables iptables iproute2
TEST_PACKAGES := $(LAB_PACKAGES) slirp4netns btrfs-progs containernetworking-plugins gcc libc6-dev dpkg-dev docker-registry skopeo umoci chromium fonts-dejavu-core jq

# Packages that the benchmarks compare Wrenn with, and need.
BENCH_PACKAGES := nginx-light wrk iproute2 gcc libc6-dev

GO_PACKAGES := ./...

# .ci/go puts a toolchain there if the machine has none that is new enough.
export PATH := $(CURDIR)/.cache/go/bin:$(PATH)

.PHONY: go build run deps npm python test-deps check lint test test-kvm bench generate release

go:
	@.ci/go .cache/go

build: go bin/caddy
	@mkdir -p bin
	@for p in $(notdir $(wildcard cmd/*)); do \
		[ -e cmd/$$p/main.go ] || continue; \
		CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/$$p ./cmd/$$p || exit 1; \
	done

# The front door is a separate module, because nothing else needs its imports.
bin/caddy: $(wildcard deploy/caddy/*) internal/bounded/bounded.go internal/duplex/duplex.go internal/linger/linger.go internal/handover/handover.go internal/requestid/requestid.go $(wildcard internal/upstream/*.go) | go
	@mkdir -p bin
	@CGO_ENABLED=0 go build -C deploy/caddy -trimpath -ldflags "-s -w" -o $(CURDIR)/$@.$$$$ . && mv $@.$$$$ $@

# Installs missing packages, builds, and runs everything in the foreground.
run: deps build
	bin/wrenn up $(UPFLAGS)

deps:
	@.ci/packages $(RUN_PACKAGES)

npm:
	@command -v npm >/dev/null || .ci/packages npm

%/node_modules/.package-lock.json: %/package-lock.json | npm
	@npm ci --no-audit --no-fund --loglevel=error --prefix $* --cache .cache/npm >/dev/null
	@touch $@

python:
	@.ci/packages python3-venv

.cache/python/ready: test/fuzz/requirements.txt | python
	@rm -rf .cache/python
	@/usr/bin/python3 -m venv .cache/python
	@.cache/python/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

test-deps: deps $(PACKAGES)
	@.ci/packages $(TEST_PACKAGES)

# Runs before the tests. lint adds buf and the linters of .golangci.yml, which take longer.
check: go $(LINTERS)
	@out=$$(go run $(GOFUMPT) -l $$(git ls-files '*.go' | grep -v '^internal/gen/')); \
		if [ -n "$$out" ]; then echo "not gofumpt'd:"; echo "$$out"; exit 1; fi
	@out=$$(git ls-files '*.go' | grep -v '^internal/gen/' | xargs wc -l | awk '$$1 > 800 && $$2 != "total"'); \
		if [ -n "$$out" ]; then echo "over 800 lines, to be split by subject:"; echo "$$out"; exit 1; fi
	go test -run '^TestNoFixedWaits$$' ./internal/await
	go vet $(GO_PACKAGES)
	go run $(STATICCHECK) $$(go list $(GO_PACKAGES) | grep -v /internal/gen/)
	.ci/lint/node_modules/.bin/spectral lint --fail-severity=warn --ruleset api/spectral.yaml api/openapi.yaml
	REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true .ci/lint/node_modules/.bin/redocly lint --config api/redocly.yaml api/openapi.yaml

lint: check
	GOBIN=$(CURDIR)/.cache/generators go install $(BUF)
	.cache/generators/buf lint
	GOBIN=$(CURDIR)/.cache/linters go install $(GOLANGCI)
	.cache/linters/golangci-lint run $(GO_PACKAGES)
	@out=$$(go run $(DEADCODE) -test $(GO_PACKAGES)) || exit 1; \
		if grep -v -e '^client/' -e '^$$' <<<"$$out"; then echo "nothing calls these, not even a test"; exit 1; fi

# The packages whose tests take longest. Of all packages, they begin first; otherwise ./test,
# the last by name, would run alone at the end.
LONG_PACKAGES = $(if $(filter ./...,$(GO_PACKAGES)),./internal/agent ./test)

# WRENN_SLOW=1 adds the tests that take longer than all others together. test-deps mostly
# downloads, so check, which has run vet, and build run beside it.
test: export WRENN_SLOW ?=
test:
	@$(MAKE) --no-print-directory -j3 test-deps check build
	go test -race -count=1 -vet=off -timeout $(if $(WRENN_SLOW),5h,45m) $(LONG_PACKAGES) $(GO_PACKAGES)

# Runs the tests of virtual machines with KVM, on this machine or in a lab (test/lab).
test-kvm: deps go
	@.ci/packages $(LAB_PACKAGES)
	WRENN_TEST_KVM=1 go test -count=1 -v -timeout 5h ./test/lab

# Puts an archive, a Debian package and their checksums into DIST.
DIST ?= dist
release: build
	@VERSION='$(VERSION)' DEPENDS='$(RUN_PACKAGES)' NFPM='$(NFPM)' deploy/deb/release '$(abspath $(DIST))'

# Prints only tables in Markdown on standard output, and progress on standard error.
# BENCH='Machine|Create' runs a part.
BENCH ?= .
bench: deps go
	@.ci/packages $(BENCH_PACKAGES)
	@mkdir -p .cache
	@go test -c -o .cache/bench.test ./test/bench
	@cd test/bench && WRENN_BENCH=1 $(CURDIR)/.cache/bench.test -test.v -test.timeout 40m -test.run '$(BENCH)'

# Regenerates internal/gen, with the generators that the checked-in files name,
# docs/configuration.md and the tables of docs/metrics.md.
GENERATORS := $(BUF) \
	google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12 \
	connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1 \
	github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 \
	github.com/sqlc-dev/sqlc/cmd/sqlc@v1.31.1

generate: export PATH := $(CURDIR)/.cache/generators:$(PATH)
generate: go
	for g in $(GENERATORS); do GOBIN=$(CURDIR)/.cache/generators go install $$g || exit 1; done
	buf lint
	buf generate
	sqlc generate
	cd api && oapi-codegen --config oapi-codegen.yaml openapi.yaml
	go test -run TestDocumentation ./internal/settings/all -update
	go test -run TestMetricsAreDocumented ./internal/server ./internal/agent -update
