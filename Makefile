# `make help` lists the targets.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ROOT    := $(CURDIR)
BIN     := $(ROOT)/.bin
MODULES := gen pkg migrations services/orchestrator services/http-runner services/shell-runner services/docker-runner \
           services/serverless-runner services/orchestrator/bench/balance cmd/specql examples examples/custom-runner test/ddl test/e2e test/faults test/helm test/imports \
           test/pgtest bench
PACKAGES := $(addprefix ./,$(addsuffix /...,$(MODULES)))
# Those whose tests need nothing but Go; the chart's need tools of their own.
TESTED   := $(filter-out ./test/helm/...,$(PACKAGES))
FUZZTIME ?= 30s

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F':.*?## ' '{printf "  %-16s %s\n", $$1, $$2}'

.PHONY: ci
ci: generate-check fmt-check proto-lint vet lint modules test test-python test-rules helm-test bench-guard ## Everything that has to pass before a change lands

.PHONY: test
test: ## Every test, with the race detector
	go test -race -timeout 20m $(TESTED)
	@go test -v -run '^TestInputReachesTheContainer$$' ./services/docker-runner/dockerrunner | grep -- '--- SKIP' >/dev/null \
		&& echo "NOTE: no Docker engine answers: the tests of containers were skipped" \
		|| echo "A Docker engine answers: no test of containers was skipped"

.PHONY: test-python
test-python: ## The API from Python, with a client made from the protos (test/python/install.sh installs what it needs)
	test/python/run.sh

.PHONY: report-screenshot
report-screenshot: ## The report of specql benchmark, looked at in a headless Chromium; the picture is .cache/report/report.png
	test/report/screenshot.sh

VULN := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: security
security: $(TOOLS) ## gosec, and govulncheck where its database can be had (GOVULNDB names another)
	$(BIN)/golangci-lint run --allow-parallel-runners --timeout 20m --enable-only gosec $(PACKAGES)
	@status=0; GOFLAGS=-mod=mod GOBIN=$(BIN) go install $(VULN); \
	for m in $(MODULES); do \
		echo "govulncheck $$m"; (cd $$m && $(BIN)/govulncheck $${GOVULNDB:+-db $$GOVULNDB} ./...) >.cache/govulncheck 2>&1 || status=$$?; cat .cache/govulncheck; \
		if grep -qE 'fetching vulnerabilities|vuln.go.dev.*(dial|lookup|timeout)' .cache/govulncheck; then \
			echo "NOT CHECKED: the database of vulnerabilities does not answer. It is at https://vuln.go.dev; GOVULNDB=URL names a copy (https://go.dev/doc/security/vuln/database)"; exit 1; \
		fi; \
	done; exit $$status

.PHONY: test-short
test-short: ## The tests of one's own machine: no race detector
	go test $(TESTED)

.PHONY: build
build: ## Every program, into .bin
	@mkdir -p $(BIN)
	go build -o $(BIN)/ ./cmd/specql ./services/orchestrator ./services/http-runner ./services/shell-runner ./services/docker-runner ./services/serverless-runner

# The tools of tools/go.mod, built once for each content of it.
TOOLS := $(BIN)/.tools-$(shell cat tools/go.mod tools/go.sum | sha256sum | cut -c1-16)

.PHONY: tools
tools: $(TOOLS) ## buf, its plugins, the linters, into .bin
$(TOOLS):
	@mkdir -p $(BIN)
	GOWORK=off go -C tools build -o $(BIN)/ tool
	@rm -f $(BIN)/.tools-*; touch $@

.PHONY: generate
generate: $(TOOLS) ## Generate gen/ from proto/, and docs/reference/api.md and commands.md
	$(BIN)/buf generate
	@mkdir -p .cache && $(BIN)/buf build -o .cache/api.binpb
	go run ./cmd/specql/internal/reference -descriptors .cache/api.binpb -o docs/reference

.PHONY: generate-check
generate-check: $(TOOLS) ## gen/ and docs/reference/api.md are what proto/ says, commands.md is what the commands say
	@rm -rf .cache/gen && mkdir -p .cache/gen
	$(BIN)/buf generate -o .cache/gen
	@diff -r --exclude=go.mod --exclude=go.sum gen .cache/gen/gen || { echo "gen/ is not what proto/ says: run 'make generate' and commit"; exit 1; }
	@rm -rf .cache/reference && mkdir -p .cache/reference && $(BIN)/buf build -o .cache/api.binpb
	@go run ./cmd/specql/internal/reference -descriptors .cache/api.binpb -o .cache/reference
	@for page in api.md commands.md; do \
		diff docs/reference/$$page .cache/reference/$$page || { echo "docs/reference/$$page is not current: run 'make generate' and commit"; exit 1; }; \
	done

.PHONY: proto-lint
proto-lint: $(TOOLS) ## The protos follow the rules, and break nobody since BREAKING_AGAINST (a git ref)
	$(BIN)/buf lint
	@ref="$${BREAKING_AGAINST:-$$(git rev-parse --verify -q HEAD~1 || true)}"; \
	if [ -n "$$ref" ] && git cat-file -e "$$ref:buf.yaml" 2>/dev/null; then $(BIN)/buf breaking --against ".git#ref=$$ref"; else echo "no earlier protos to compare with"; fi

.PHONY: fmt
fmt: $(TOOLS) ## Format
	$(BIN)/golangci-lint fmt $(PACKAGES)

.PHONY: fmt-check
fmt-check: $(TOOLS) ## Everything is formatted
	@$(BIN)/golangci-lint fmt --diff $(PACKAGES)

.PHONY: vet
vet: ## go vet
	go vet $(PACKAGES)

.PHONY: lint
lint: $(TOOLS) ## The linters of .golangci.yml
	$(BIN)/golangci-lint run --allow-parallel-runners --timeout 20m $(PACKAGES)

.PHONY: modules
modules: ## Each module builds alone and its go.mod is tidy
	@for m in $(MODULES); do \
		echo "module $$m"; \
		(cd $$m && GOWORK=off go build -o /dev/null ./... && GOWORK=off go mod tidy -diff) || exit 1; \
	done

.PHONY: test-rules
test-rules: ## What `specql alerts --prometheus` writes, held to Prometheus' own parser and engine; a module apart, so that its versions are nobody else's
	cd test/prometheus && GOWORK=off go vet ./... && GOWORK=off go test ./...

# What checks the chart, built once for each content of tools/helm/go.mod, and the schemas of a Kubernetes version.
HELM_TOOLS   := $(BIN)/.helm-tools-$(shell cat tools/helm/go.mod tools/helm/go.sum | sha256sum | cut -c1-16)
KUBERNETES   := v1.34.4
KUBE_SCHEMAS := $(ROOT)/.cache/kubernetes-schemas-$(KUBERNETES)

$(HELM_TOOLS):
	@mkdir -p $(BIN)
	GOWORK=off go -C tools/helm build -trimpath -ldflags "-s -w" -o $(BIN)/ tool
	@rm -f $(BIN)/.helm-tools-*; touch $@

$(KUBE_SCHEMAS):
	@dir=$$(GOWORK=off go -C tools mod download -json k8s.io/kubernetes@$(KUBERNETES) | sed -n 's/^\t"Dir": "\(.*\)",$$/\1/p'); \
	go -C test/helm run ./kubernetes "$$dir/api/openapi-spec/swagger.json" $@.new && rm -rf $@ && mv $@.new $@

.PHONY: helm-test
helm-test: $(HELM_TOOLS) $(KUBE_SCHEMAS) ## The chart: lint, templates against Kubernetes' schemas, unit tests, rights
	HELM_TOOLS=$(BIN) KUBERNETES_SCHEMAS=$(KUBE_SCHEMAS) go test -count=1 ./test/helm/...

.PHONY: kube-test
kube-test: ## The chart on a real Kubernetes node, from install to rollback: as root, some minutes; it names the packages that are missing
	@test/kube/run.sh missing
	@$(MAKE) --no-print-directory $(HELM_TOOLS)
	HELM=$(BIN)/helm test/kube/run.sh

.PHONY: helm-schema
helm-schema: ## Make the chart's values.schema.json from its values.yaml
	go -C test/helm run ./schema ../../deploy/helm/specql/values.yaml >.cache/values.schema.json
	mv .cache/values.schema.json deploy/helm/specql/values.schema.json

.PHONY: images
images: ## Images of all services into .cache/images, without a registry; LOAD=1 hands them to the Docker engine
	deploy/docker/images.sh

DURATION ?= 10m
SEED     ?= 0

.PHONY: chaos
chaos: ## Random faults for DURATION under load, then a check that nothing was lost; SEED repeats a schedule of faults
	go test -count=1 -v -timeout 0 -run '^TestChaos$$' ./test/faults -chaos $(DURATION) -seed $(SEED)

RATE_FOR ?= 185s

.PHONY: rate
rate: ## A rate and a spend limit, held by three orchestrators under load for RATE_FOR, by the called servers' own count
	go test -count=1 -v -timeout 0 -run '^Test(Rate|Spend)HoldsOverReplicas$$' ./test/faults -rate $(RATE_FOR)

.PHONY: bench
bench: ## What a durable workflow costs, in floors of this machine; the report goes to .cache/bench
	GOWORK=off go -C bench run . -root ..

.PHONY: bench-peers
bench-peers: ## The same shapes in SpecQL Mesh, DBOS Transact, River and Temporal, in turn on one PostgreSQL; building Temporal's server takes minutes
	GOWORK=off go -C bench run . -root .. -peers -shapes '^(1 step|10 sequential|40 sequential|100 parallel) x (1|32)$$'

.PHONY: bench-scale
bench-scale: ## What grows: workflows a second, payloads, orchestrators, replicas, sleeping runs, stored jobs (10 million: 40 GB of disk, half an hour)
	for what in -ramps -payloads -orchestrators -runners '-sleepers 100000' '-stored 10000000'; do go -C bench run . -root .. $$what; done

.PHONY: bench-guard
bench-guard: ## A short bench that fails where a count, or a ratio to a floor of the same run, is far beyond what it was
	go -C bench run . -root .. -guard -repeat 3 -duration 1s -shapes '^(1 step|40 sequential|100 parallel) x (1|32)$$'

.PHONY: bench-front-door
bench-front-door: ## 10,000 rows inserted by one SQL statement, and how soon a single one is picked up
	go test -count=1 -timeout 30m -run '^$$' -bench FrontDoor -benchtime 1x ./test/faults
	go test -count=1 -timeout 30m -run '^$$' -bench Pickup -benchtime 200x ./test/faults

.PHONY: bench-balance
bench-balance: ## How gRPC's ways of balancing, round_robin and those by ORCA load reports, spread jobs over replicas that are not alike
	go run ./services/orchestrator/bench/balance

.PHONY: bench-sandbox
bench-sandbox: ## What the shell runner's sandbox adds to the start of a program, beside fork+exec, bwrap and docker run where they are there
	CGO_ENABLED=0 go run ./services/shell-runner/bench/sandbox

.PHONY: bench-steps
bench-steps: ## What a runner adds to what it runs, one step after the other, in turn with the same without it; docker takes an engine
	GOWORK=off go -C bench run . -root .. -steps docker,shell,http,noop

.PHONY: bench-store
bench-store: ## The PostgreSQL store: an old table's upgrade, what a run costs beside a million jobs, transactions a step
	go run ./services/orchestrator/bench/postgres

FUZZPARALLEL ?= 1

.PHONY: fuzz
fuzz: ## Fuzz every parser and every RPC for FUZZTIME each, FUZZPARALLEL workers at once; FUZZ=REGEXP chooses targets
	@for file in $$(git grep -l '^func Fuzz' -- '*_test.go'); do dirname ./$$file; done | sort -u | while read -r pkg; do \
		for target in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' | grep -E '$(or $(FUZZ),.)'); do \
			echo "$$pkg $$target"; \
			go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5s -parallel $(FUZZPARALLEL) $$pkg </dev/null || exit 1; \
		done; \
	done

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BIN) .cache
