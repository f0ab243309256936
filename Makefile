# What a newcomer needs: make run. What CI runs: make test.

SHELL   := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

GOFUMPT     := mvdan.cc/gofumpt@v0.12.0
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Distribution packages: what Wrenn runs with, and what its tests need besides.
RUN_PACKAGES  := qemu-system-x86 qemu-utils postgresql redis-server caddy mmdebstrap \
	nftables iproute2 e2fsprogs kmod xz-utils
TEST_PACKAGES := socat

GO_PACKAGES := ./...

.PHONY: build run deps test-deps lint test generate

build:
	@mkdir -p bin
	@for p in $(notdir $(wildcard cmd/*)); do \
		[ -e cmd/$$p/main.go ] || continue; \
		CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/$$p ./cmd/$$p || exit 1; \
	done

# Installs what is missing, builds, and runs everything in the foreground.
run: deps build
	bin/wrenn up $(UPFLAGS)

deps:
	@.ci/packages $(RUN_PACKAGES)

test-deps: deps
	@.ci/packages $(TEST_PACKAGES)

lint:
	@out=$$(go run $(GOFUMPT) -l $$(git ls-files '*.go' | grep -v '^internal/gen/')); \
		if [ -n "$$out" ]; then echo "not gofumpt'd:"; echo "$$out"; exit 1; fi
	go vet $(GO_PACKAGES)
	go run $(STATICCHECK) $$(go list $(GO_PACKAGES) | grep -v /internal/gen/)

# The race detector is on: no package that needs a VM is in this run yet.
test: test-deps lint build
	go test -race -count=1 -timeout 35m $(GO_PACKAGES)

# Regenerates internal/gen; needs buf and its plugins on PATH.
generate:
	buf lint
	buf generate
