#!/usr/bin/env bash
# The chart on a real node: install, test, a workflow of all types, scale, roll, upgrade across a schema change, roll back,
# and what each service takes of memory. It prints what it saw, and ends with a status of 1 where something was not so.
#   test/kube/run.sh        as root; see node.sh for what it needs. KUBE_DIR (.cache/kube), HELM (.bin/helm); KEEP=1 leaves the node up
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
cd "$HERE/../.."
export KUBE_DIR=${KUBE_DIR:-$PWD/.cache/kube}
mkdir -p "$KUBE_DIR"/{bin,images,probe,work}
HELM=${HELM:-$PWD/.bin/helm}
IMAGES=${IMAGES:-$KUBE_DIR/images}
W=$KUBE_DIR/work
PG=${PG:-/usr/lib/postgresql/15/bin}
NODEIP=172.31.255.1
NS=specql
LOAD=${LOAD:-60s}
children=()
node() { "$HERE/node.sh" "$@"; }
k() { node kubectl -n $NS "$@"; }
helm() { node exec "$HELM" -n $NS "$@"; }
say() { printf '\n== %s  %s\n' "$(date +%T)" "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
finish() {
  local status=$? p
  if [ $status -ne 0 ]; then
    { k get pods -o wide; node kubectl -n specql-jobs get jobs,pods; k get events --sort-by=.lastTimestamp | tail -20; for p in $(k get pods -o name); do echo "-- $p"; k logs "$p" --tail=5; done; } >"$W/failure.log" 2>&1 || true
    tail -60 "$W/failure.log" >&2
  fi
  for p in ${children[@]+"${children[@]}"}; do kill "$p" 2>/dev/null || true; done
  [ ! -d "$W/pg" ] || su postgres -s /bin/sh -c "$PG/pg_ctl -D $W/pg -m immediate stop" >/dev/null 2>&1 || true
  [ -n "${KEEP:-}" ] || node down
  exit $status
}
trap finish EXIT

say "programs and images"
node build
[ -x "$HELM" ] || fail "there is no helm at $HELM: make kube-test builds it"
build() { CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$@"; }
build "$KUBE_DIR/probe/probe" ./services/docker-runner/dockerrunner/testdata/probe
build "$KUBE_DIR/bin/specql" ./cmd/specql
[ -n "${SKIP_IMAGES:-}" ] || OUT=$IMAGES VERSION=test deploy/docker/images.sh
# The next version: the same, with one more change of the schema.
sed "s/^    (\([0-9]*\), '\([a-z0-9_]*\)')$/    (\1, '\2'),\n    (9999, '9999_next')/" migrations/001_multi_execution.sql >"$W/next.sql"
grep -q 9999_next "$W/next.sql" || fail "the list of versions of the schema is not where it was"
printf '{"Replace": {"%s": "%s"}}' "$PWD/migrations/001_multi_execution.sql" "$W/next.sql" >"$W/overlay.json"
mkdir -p "$W/next"
build "$W/next/specql" -overlay "$W/overlay.json" ./cmd/specql
BIN=$W/next OUT=$W VERSION=next deploy/docker/images.sh specql
test/standins/build.sh "$KUBE_DIR/bin" gcf-analysis azure-notify

say "a node"
[ -e "$KUBE_DIR/run/pid/kubelet" ] || node up
for i in orchestrator http-runner shell-runner docker-runner serverless-runner specql; do node load "$IMAGES/$i.tar" >/dev/null; done
node load "$W/specql.tar" >/dev/null
for i in orchestrator http-runner shell-runner docker-runner serverless-runner; do
  ctr -a "$KUBE_DIR/run/containerd.sock" -n k8s.io images tag --force docker.io/specql/$i:test docker.io/specql/$i:next >/dev/null
done
node image docker.io/specql-test/probe:1 "$KUBE_DIR/probe" /probe >/dev/null

say "a database and the services that are called"
rm -rf "$W/pg"; mkdir -p "$W/pg"; chown postgres "$W/pg"; chmod 755 "$KUBE_DIR" "$W"
su postgres -s /bin/sh -c "cd / && $PG/initdb -D $W/pg -A trust >/dev/null && echo 'host all all 172.31.0.0/16 trust' >>$W/pg/pg_hba.conf"
node exec su postgres -s /bin/sh -c "cd / && $PG/pg_ctl -w -D $W/pg -l $W/pg/log -o '-c listen_addresses=$NODEIP -c unix_socket_directories= -c max_connections=300' start" >/dev/null
node exec "$KUBE_DIR/bin/gcf-analysis" -listen $NODEIP:8080 >"$W/gcf.log" 2>&1 & children+=($!)
node exec "$KUBE_DIR/bin/azure-notify" -listen $NODEIP:7071 -function notify -key local-key >"$W/azure.log" 2>&1 & children+=($!)
node kubectl create namespace $NS --dry-run=client -o yaml | node kubectl apply -f - >/dev/null
node kubectl label --overwrite namespace $NS pod-security.kubernetes.io/enforce=restricted >/dev/null
put() { k create "$@" --dry-run=client -o yaml | k apply -f - >/dev/null; }
put secret generic database --from-literal=url="postgres://postgres@$NODEIP/postgres?sslmode=disable"
put secret generic notify --from-literal=key=local-key
put configmap scripts --from-file=deploy/compose/scripts/count.py

say "helm install --wait"
helm install mesh deploy/helm/specql -f test/kube/values.yaml --set image.tag=test --wait --timeout 6m >"$W/install.log" 2>&1 || { cat "$W/install.log"; fail "helm install"; }
grep -E '^(NAME|STATUS|REVISION)' "$W/install.log"
k get pods
say "helm test"
helm test mesh --logs | grep -E 'Phase|Last Completed|"type"|docker|shell' | head -20

for part in ca.crt tls.crt tls.key; do k get secret mesh-specql-client-tls -o go-template="{{index .data \"$part\" | base64decode}}" >"$W/$part"; done
API=$(k get service mesh-specql-orchestrator -o jsonpath='{.spec.clusterIP}')
# By its name, so that the certificate is the one that is meant, over the headless Service's addresses.
specql() { node exec env SPECQL_ADDRESS="$API:7350" SPECQL_CA="$W/ca.crt" SPECQL_TLS_CERT="$W/tls.crt" SPECQL_TLS_KEY="$W/tls.key" "$KUBE_DIR/bin/specql" "$@"; }

memory() { # of every container, from its own group, in MiB
  local p
  for p in $(k get pods -l app.kubernetes.io/name=specql -o jsonpath='{range .items[?(@.status.phase=="Running")]}{.metadata.name}={.metadata.uid} {end}'); do
    local uid=${p#*=} rss; rss=$(cat /sys/fs/cgroup/memory/kubepods/*/pod"$uid"/memory.stat /sys/fs/cgroup/memory/kubepods/pod"$uid"/memory.stat 2>/dev/null | awk '$1=="total_rss"{a+=$2} END{printf "%.1f", a/1048576}')
    echo "${p%%=*} $rss"
  done
}
say "memory, idle (anonymous memory of each pod, MiB)"
sleep 20; memory | tee "$W/idle"
awk '/orchestrator/ && $2>50 || /runner/ && $2>30 {print "too much: " $0; bad=1} END{exit bad}' "$W/idle" || fail "a service idles above its bound"

say "a workflow with a step of each type"
specql execute-job --file test/kube/workflow.yaml --input '{"text": "one two three"}' -o json >"$W/run.json" 2>"$W/run.log" || { cat "$W/run.log"; fail "the workflow"; }
cat "$W/run.json"
RUN=$(sed -n 's/.*"\(run_id\|id\)": *"\([^"]*\)".*/\2/p' "$W/run.json" | head -1)
specql runs show "$RUN" -o json >"$W/show.json" || true
grep -B30 -A30 '"source": *"kubernetes"' "$W/show.json" | grep -E 'cpu_seconds|memory_mb|source|duration_seconds|executed_version' | head -12 || fail "no measured usage of the Job"
[ -z "$(node kubectl -n specql-jobs get jobs -o name)" ] || node kubectl -n specql-jobs get jobs

load() { specql load-test --service "$1" --duration "$2" --concurrency "${3:-8}" --input "$4" -o json; }
jobs_of() { # jobs that a pod of a component has carried out, by its own count
  local ip; for ip in $(k get pods -l app.kubernetes.io/component="$1" -o jsonpath='{range .items[*]}{.metadata.name}={.status.podIP} {end}'); do
    echo "${ip%%=*} $(node exec curl -s "http://${ip#*=}:9100/metrics" | awk '/^specql_runner_jobs_total/{a+=$2} END{print a+0}')"
  done
}

say "kubectl scale under load"
load statistics "$LOAD" 16 '{"numbers": [1, 2, 3]}' >"$W/scale.json" 2>"$W/scale.log" & loader=$!
sleep 10
k scale deployment mesh-specql-http-runner --replicas=3 >/dev/null
k rollout status deployment mesh-specql-http-runner --timeout=120s | tail -1
began=$(date +%s)
while :; do
  shares=$(jobs_of http-runner); n=$(echo "$shares" | awk '$2>20' | wc -l)
  [ "$n" -lt 3 ] || break
  [ $(($(date +%s) - began)) -lt 30 ] || { echo "$shares"; fail "new replicas have no share after 30 s"; }
  sleep 1
done
echo "all three take calls $(($(date +%s) - began)) s after they were ready:"; echo "$shares"
memory >"$W/loaded"
wait $loader || { cat "$W/scale.json" "$W/scale.log"; fail "calls failed"; }
jobs_of http-runner
grep -E '"(calls|requests|failed|errors|throughput|p50|p99)[a-z_]*"' "$W/scale.json" | head -8

say "a rolling restart of everything under load"
load statistics "$LOAD" 8 '{"numbers": [1, 2, 3]}' >"$W/roll-http.json" 2>"$W/roll-http.log" & one=$!
load words "$LOAD" 2 '{"text": "a b"}' >"$W/roll-shell.json" 2>"$W/roll-shell.log" & two=$!
sleep 5
k rollout restart deployment >/dev/null
for d in $(k get deployments -o name); do k rollout status "$d" --timeout=300s | tail -1; done
memory >>"$W/loaded"
wait $one $two || true
for f in roll-http roll-shell; do grep -E '"(calls|requests|succeeded|failed|errors|by_code|UNAVAILABLE)[a-z_]*"' "$W/$f.json" | tr -d '\n'; echo; done
node exec env PGHOST=$NODEIP PGUSER=postgres "$PG/psql" -At -c "SELECT status, count(*) FROM jobs.tb_workflow_run GROUP BY 1"

say "helm upgrade across a change of the schema"
version() { node exec env PGHOST=$NODEIP PGUSER=postgres "$PG/psql" -At -c "SELECT max(version) FROM jobs.tb_schema_version"; }
echo "schema $(version)"
helm upgrade mesh deploy/helm/specql -f test/kube/values.yaml --set image.tag=next --wait --timeout 6m | grep -E '^(STATUS|REVISION)'
echo "schema $(version)"; [ "$(version)" = 9999 ] || fail "the hook did not migrate"
specql execute-job --file test/kube/workflow.yaml --input '{"text": "one two"}' -q
say "helm rollback"
helm rollback mesh 1 --wait --timeout 6m
k get deployments -o custom-columns=NAME:.metadata.name,IMAGE:.spec.template.spec.containers[0].image,READY:.status.readyReplicas
specql execute-job --file test/kube/workflow.yaml --input '{"text": "one"}' -q

say "memory (anonymous, MiB; the most of a pod of each)"
for c in orchestrator http-runner shell-runner docker-runner serverless-runner; do
  printf '%-18s idle %6s   loaded %6s\n' $c "$(grep -- "-$c-" "$W/idle" | awk '{if($2>m)m=$2} END{print m}')" "$(grep -- "-$c-" "$W/loaded" | awk '{if($2>m)m=$2} END{print m}')"
done
say "all of it was so"
