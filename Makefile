# Build, demonstrate, test and measure kamal_proxy. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
# What makes the site needs nothing of the package, so it can be made where there is no compiler.
DOCS_VENV := build/docs-tools
MKDOCS := $(DOCS_VENV)/bin/mkdocs
PRIVATE := .demo

HTTP_PORT ?= 8080
HTTPS_PORT ?= 8443
SWITCHES ?= 5
RATE ?= 200
DEMO_FLAGS ?=
EXAMPLE_FLAGS ?=
TEST_FLAGS ?=
TEST_PROCESSES ?= 2
BENCH_FLAGS ?=
SOAK_SWITCHES ?= 150
DOCS_ADDRESS ?= 127.0.0.1:8000
# Files stay whole: what a file's tests share is made once. They keep their order, in which the slow
# ones come early: by the number of their tests, a few slow ones would be left for one process.
PYTEST = $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile \
  --no-loadscope-reorder
export FUZZ_EXAMPLES ?= 20000
export LEAK_ROUNDS ?= 1000000
HEADS ?= 5000000
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DOCKER ?= docker
DOCKER_FLAGS ?=
BASE ?= debian:trixie-slim
IMAGE ?= kamal-proxy:v$(VERSION)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo demo-udp example run test test-h11 lint format bench bench-udp sanitize fuzz
.PHONY: fuzz-heads soak docker test-docker dist test-dist clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: $(BUILT) ## make .venv with the package, its command and the development tools
	@echo '$(BIN)/kamal-proxy is built'

demo: $(BUILT) ## redeploy an application under load and measure it (SWITCHES=5 RATE=200)
	@$(BIN)/python -m example.demo --switches $(SWITCHES) --rate $(RATE) $(DEMO_FLAGS)

demo-udp: $(BUILT) ## redeploy a UDP server while it is used and measure it (SWITCHES=5 RATE=200)
	@$(BIN)/python -m example.udp_demo --switches $(SWITCHES) --rate $(RATE) $(DEMO_FLAGS)

example: $(BUILT) ## play the story of example/README.md without Docker (EXAMPLE_FLAGS=--stay)
	@$(BIN)/python -m example.story $(EXAMPLE_FLAGS)

run: $(BUILT) ## leave a proxy running to play with (HTTP_PORT=8080 HTTPS_PORT=8443)
	@mkdir -p $(PRIVATE)
	@printf '%s\n' \
	  'The proxy will listen on http://127.0.0.1:$(HTTP_PORT); Ctrl-C stops it. In another terminal:' \
	  '' \
	  '  cd $(CURDIR)' \
	  '  export KAMAL_PROXY_SOCKET=$(CURDIR)/$(PRIVATE)/kamal-proxy.sock' \
	  '  $(BIN)/python example/webapp.py --port 3001 --version v1 &' \
	  '  $(BIN)/kamal-proxy deploy web --target=127.0.0.1:3001' \
	  '  curl http://127.0.0.1:$(HTTP_PORT)/' \
	  '  $(BIN)/kamal-proxy list' \
	  ''
	@exec env HOME='$(CURDIR)/$(PRIVATE)' KAMAL_PROXY_SOCKET='$(CURDIR)/$(PRIVATE)/kamal-proxy.sock' \
	  $(BIN)/kamal-proxy run --http-port $(HTTP_PORT) --https-port $(HTTPS_PORT)

test: $(BUILT) ## run the tests (TEST_FLAGS="-k name" TEST_PROCESSES=2)
	@$(PYTEST) $(TEST_FLAGS)

test-h11: $(BUILT) ## run the tests of HTTP once more, without the lane: all by tasks and h11
	@KAMAL_PROXY_LANE=false $(PYTEST) tests/http tests/tls tests/test_embedding.py \
	  tests/test_holding.py tests/test_lifecycle.py tests/test_rollout.py tests/e2e/test_buffering.py \
	  tests/e2e/test_[d-t]*.py $(TEST_FLAGS)

lint: $(BUILT) ## check style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(BUILT) ## format the code
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

.PHONY: docs docs-serve
docs: $(DOCS_VENV)/.built ## make a site of the documentation in build/docs; a warning is an error
	@# Not --quiet: what is not shown is not counted as a warning.
	@$(MKDOCS) build --strict >$(DOCS_VENV)/docs.log 2>&1 || { cat $(DOCS_VENV)/docs.log; exit 1; }
	@echo 'build/docs/index.html is built'

docs-serve: $(DOCS_VENV)/.built ## show the site, and changes as they are made (DOCS_ADDRESS=127.0.0.1:8000)
	@$(MKDOCS) serve --dev-addr $(DOCS_ADDRESS)

bench: $(BUILT) ## measure CPU per request and memory beside nginx, HAProxy, Caddy (BENCH_FLAGS=--smoke)
	@$(BIN)/python -m benchmarks.http $(BENCH_FLAGS)

bench-udp: $(BUILT) ## measure CPU per datagram beside nginx and a bare C relay (BENCH_FLAGS=--smoke)
	@$(BIN)/python -m benchmarks.udp $(BENCH_FLAGS)

docker: ## build the container image (IMAGE=kamal-proxy:v<version> BASE=debian:trixie-slim)
	@$(DOCKER) build $(DOCKER_FLAGS) --build-arg BASE=$(BASE) --build-arg VERSION=$(VERSION) \
	  --tag $(IMAGE) .
	@$(DOCKER) image inspect --format '$(IMAGE) is built, {{.Size}} bytes' $(IMAGE)

test-docker: $(BUILT) ## build the image, and be Kamal to it; as root, on Debian (docker.io, debootstrap)
	@BASE=$(BASE) .ci/with-docker sh -ec '"$$@"; KAMAL_PROXY_TEST_IMAGE=$(IMAGE) \
	  $(BIN)/python -m pytest tests/docker $(TEST_FLAGS)' \
	  - $(MAKE) --no-print-directory docker DOCKER_FLAGS='--network host --quiet'

sanitize: $(BUILT) ## test the extension under AddressSanitizer and for leaks (LEAK_ROUNDS=1000000)
	@.ci/sanitize $(BIN)/python

fuzz: $(BUILT) ## try many more inputs, about an hour (FUZZ_EXAMPLES=20000)
	@$(PYTEST) -m fuzz --hypothesis-profile=fuzz -o faulthandler_timeout=3600 $(TEST_FLAGS)

fuzz-heads: $(BUILT) ## give the scanner of heads millions, and h11 what it takes (HEADS=5000000)
	@$(BIN)/python -m tests.http.fuzz_heads --heads $(HEADS) --processes $(TEST_PROCESSES)

soak: $(BUILT) ## the demo for long, twice, with HTTPS too: the proxy must not grow (SOAK_SWITCHES=150)
	@$(BIN)/python -m example.demo --switches $(SOAK_SWITCHES) --rate $(RATE) $(DEMO_FLAGS)
	@$(BIN)/python -m example.demo --switches $(SOAK_SWITCHES) --rate $(RATE) $(DEMO_FLAGS) --tls

# The linker of some Pythons writes where they are into what it makes, and keeps debug information,
# which is five times as large as the rest. Auditwheel finds out which Linux systems the wheel runs on.
dist: $(BUILT) ## build the sdist and a wheel, as for PyPI, in dist
	@rm -rf dist build/dist build/lib.* build/temp.*
	@if ! { LDSHARED='$(CC) -shared' LDFLAGS=-Wl,--strip-debug \
	    $(BIN)/python -m build --outdir build/dist && \
	    PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/dist/*.whl && \
	    mv build/dist/*.tar.gz dist; } >$(VENV)/dist.log 2>&1; then \
	  cat $(VENV)/dist.log; \
	  echo 'Error: the build failed, see above' >&2; \
	  exit 1; \
	fi
	@$(BIN)/twine --no-color check --strict dist/*

test-dist: dist ## install what make dist builds into clean environments, and test it there
	@TEST_DIST=dist $(BIN)/python -m pytest tests/test_dist.py $(TEST_FLAGS)

clean: ## remove everything that was built, and the state that make run kept
	@rm -rf $(VENV) $(PRIVATE) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -f kamal_proxy/*.so kamal_proxy/_fastpath.c
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BUILT): pyproject.toml $(wildcard kamal_proxy/*.pyx kamal_proxy/*.pxi)
	@.ci/check-tools '$(PYTHON)'
	@echo 'Building $(VENV), which takes about a minute the first time ...'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@if ! $(BIN)/python -m pip install --editable '.[dev]' >$(VENV)/build.log 2>&1; then \
	  cat $(VENV)/build.log; \
	  echo 'Error: the build failed, see above' >&2; \
	  exit 1; \
	fi
	@touch $@

# The theme would tell of the plans for its next version each time.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

# Only what the extra of that name lists is installed, not the package, which would be compiled.
$(DOCS_VENV)/.built: pyproject.toml
	@.ci/check-tools '$(PYTHON)' docs
	@test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv --clear $(DOCS_VENV)
	@if ! $(DOCS_VENV)/bin/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	    >$(DOCS_VENV)/requirements.txt || \
	  ! $(DOCS_VENV)/bin/python -m pip install --requirement $(DOCS_VENV)/requirements.txt \
	    >$(DOCS_VENV)/build.log 2>&1; then \
	  cat $(DOCS_VENV)/build.log; \
	  echo 'Error: the tools for the documentation could not be installed, see above' >&2; \
	  exit 1; \
	fi
	@touch $@
