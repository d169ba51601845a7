#!/usr/bin/env bash
# The chart on a real node: install, test, a workflow of all types, what each service takes of memory, scale, roll, upgrade across a
# schema change, roll back, restore a backup, and the tests of the docker runner's backend. It prints what it saw, and ends with a
# status of 1 at the first thing that was not so.
#   test/kube/run.sh [missing]      as root; make kube-test builds helm first. `missing` only looks whether the packages that it needs are there
# KUBE_DIR (.cache/kube) has what is built and kept, IMAGES (KUBE_DIR/images) the images, HELM (.bin/helm) is Helm; LOAD_FOR (40s) is how
# long a load takes; SKIP_IMAGES=1 takes the images that are there; KEEP=1 leaves the node up, for a look or for another run.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
cd "$HERE/../.."
export KUBE_DIR=${KUBE_DIR:-$PWD/.cache/kube}
HELM=${HELM:-$PWD/.bin/helm}
IMAGES=${IMAGES:-$KUBE_DIR/images}
W=$KUBE_DIR/work
PG=${PG:-$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)}
NODEIP=172.31.255.1
NS=specql
JOBS=specql-jobs
LOAD_FOR=${LOAD_FOR:-40s}
SERVICES="orchestrator http-runner shell-runner docker-runner serverless-runner"
children=()
node() { "$HERE/node.sh" "$@"; }
k() { node kubectl -n $NS "$@"; }
helm() { node exec "$HELM" -n $NS "$@"; }
say() { printf '\n== %s  %s\n' "$(date +%T)" "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
# What runs in the background is one process, so that it can be ended: node.sh becomes the program.
background() { "$HERE/node.sh" exec "$@" & children+=($!); }
finish() {
  local status=$? p
  trap - EXIT
  if [ $status -ne 0 ] && [ -e "$KUBE_DIR/run/pid/kubelet" ]; then
    { k get pods -o wide; node kubectl -n $JOBS get jobs,pods; k get events --sort-by=.lastTimestamp | tail -20; for p in $(k get pods -o name); do echo "-- $p"; k logs "$p" --tail=5; done; } >"$W/failure.log" 2>&1 || true
    head -30 "$W/failure.log" >&2; echo "the rest is in $W/failure.log" >&2
  fi
  for p in ${children[@]+"${children[@]}"}; do kill "$p" 2>/dev/null || true; done
  if [ -d "$W/pg" ]; then su postgres -s /bin/sh -c "cd / && $PG/pg_ctl -D $W/pg -m immediate stop" >/dev/null 2>&1 || true; fi
  [ -n "${KEEP:-}" ] || node down || true
  exit $status
}

missing=$("$HERE/node.sh" missing)
command -v curl >/dev/null || missing+=" curl"
[ -x "$PG/initdb" ] || missing+=" postgresql"
[ -n "${SKIP_IMAGES:-}" ] || [ -n "${BASE:-}" ] || command -v debootstrap >/dev/null || missing+=" debootstrap"
[ -z "$missing" ] || fail "packages are missing. On Debian, without starting what they bring: RUNLEVEL=1 apt-get install --no-install-recommends$missing"
[ "$(id -u)" = 0 ] || fail "a node needs root"
[ "${1:-}" != missing ] || exit 0
[ -x "$HELM" ] || fail "there is no helm at $HELM: make kube-test builds it"
mkdir -p "$KUBE_DIR"/{bin,images,probe,work}
trap finish EXIT

say "programs and images"
node build
build() { CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$@"; }
build "$KUBE_DIR/probe/probe" ./services/docker-runner/dockerrunner/testdata/probe
build "$KUBE_DIR/bin/specql" ./cmd/specql
CGO_ENABLED=0 go test -c -trimpath -tags kube -o "$KUBE_DIR/bin/node.test" ./services/docker-runner/kubernetes
[ -n "${SKIP_IMAGES:-}" ] || OUT=$IMAGES VERSION=test deploy/docker/images.sh
# The next version: the same, with one more change of the schema.
NOW=$(sed -n "s/^    (\([0-9]*\), '[0-9]*_[a-z0-9_]*')$/\1/p" migrations/001_multi_execution.sql)
NEXT=$((NOW + 1))
sed -e "s/^    ($NOW, '\([a-z0-9_]*\)')$/    ($NOW, '\1'),\n    ($NEXT, '$(printf %03d $NEXT)_next')/" \
  -e 's/^INSERT INTO jobs.tb_schema_version (version, name) VALUES$/ALTER TABLE jobs.tb_job_run ADD COLUMN IF NOT EXISTS next text;\n&/' migrations/001_multi_execution.sql >"$W/next.sql"
[ "$(diff migrations/001_multi_execution.sql "$W/next.sql" | grep -c '^>')" = 3 ] || fail "the list of versions of the schema is not where it was"
printf '{"Replace": {"%s": "%s"}}' "$PWD/migrations/001_multi_execution.sql" "$W/next.sql" >"$W/overlay.json"
mkdir -p "$W/next"
build "$W/next/specql" -overlay "$W/overlay.json" ./cmd/specql
BIN=$W/next OUT=$W VERSION=next deploy/docker/images.sh specql
test/standins/build.sh "$KUBE_DIR/bin" gcf-analysis azure-notify

say "a node"
[ -e "$KUBE_DIR/run/pid/kubelet" ] || node up
for i in $SERVICES specql; do node load "$IMAGES/$i.tar" >/dev/null; done
node load "$W/specql.tar" >/dev/null
for i in $SERVICES; do node tag docker.io/specql/$i:test docker.io/specql/$i:next; done
node image docker.io/specql-test/probe:1 "$KUBE_DIR/probe" /probe >/dev/null
node kubectl version | grep Server
node kubectl get nodes

say "a database and the services that are called"
rm -rf "$W/pg"; mkdir -p "$W/pg"; chown postgres "$W/pg"; chmod 755 "$KUBE_DIR" "$W"
su postgres -s /bin/sh -c "cd $W/pg" 2>/dev/null || fail "the user postgres does not get to $W: set KUBE_DIR to a folder that everybody may enter"
su postgres -s /bin/sh -c "cd / && $PG/initdb -D $W/pg -A trust >/dev/null && echo 'host all all 172.31.0.0/16 trust' >>$W/pg/pg_hba.conf"
node exec su postgres -s /bin/sh -c "cd / && $PG/pg_ctl -w -D $W/pg -l $W/pg/log -o '-c listen_addresses=$NODEIP -c unix_socket_directories= -c max_connections=300' start" >/dev/null
DATABASE_URL="postgres://postgres@$NODEIP/postgres?sslmode=disable"
sql() { node exec env PGHOST=$NODEIP PGUSER=postgres "$PG/psql" -Atc "$1"; }
# The function speaks https with a certificate of a CA of its own, as one behind a private endpoint does.
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=functions -days 2 -keyout "$W/functions-ca.key" -out "$W/functions-ca.crt" 2>"$W/openssl.log"
openssl req -newkey rsa:2048 -nodes -subj /CN=notify -keyout "$W/notify.key" -out "$W/notify.csr" 2>>"$W/openssl.log"
openssl x509 -req -in "$W/notify.csr" -CA "$W/functions-ca.crt" -CAkey "$W/functions-ca.key" -CAcreateserial -days 2 -out "$W/notify.crt" -extfile <(echo "subjectAltName=IP:$NODEIP") 2>>"$W/openssl.log"
background "$KUBE_DIR/bin/gcf-analysis" -listen $NODEIP:8080 >"$W/gcf.log" 2>&1
background "$KUBE_DIR/bin/azure-notify" -listen $NODEIP:7071 -function notify -key local-key -tls-cert "$W/notify.crt" -tls-key "$W/notify.key" >"$W/azure.log" 2>&1
apply() { node kubectl apply -f - >/dev/null; }
put() { k create "$@" --dry-run=client -o yaml | apply; }
node kubectl create namespace $NS --dry-run=client -o yaml | apply
node kubectl label --overwrite namespace $NS pod-security.kubernetes.io/enforce=restricted >/dev/null
put secret generic database --from-literal=url="$DATABASE_URL"
put secret generic notify --from-literal=key=local-key
put configmap scripts --from-file=deploy/compose/scripts/count.py
put configmap function-ca --from-file=ca.crt="$W/functions-ca.crt"

say "helm install --wait"
if helm status mesh >/dev/null 2>&1; then helm uninstall mesh --wait >/dev/null; fi # of a run before
helm install mesh deploy/helm/specql -f test/kube/values.yaml --set image.tag=test --wait --timeout 6m >"$W/install.log" 2>&1 || { cat "$W/install.log"; fail "helm install"; }
grep -E '^(NAME|STATUS|REVISION)' "$W/install.log"
k get pods
say "helm test"
helm test mesh --logs >"$W/test.log" 2>&1 || { cat "$W/test.log"; fail "helm test"; }
grep -E '^(TEST SUITE|Phase)|"executionType"|"reachable"' "$W/test.log"

for part in ca.crt tls.crt tls.key; do k get secret mesh-specql-client-tls -o go-template="{{index .data \"$part\" | base64decode}}" >"$W/$part"; done
# By the name of its Service, which the certificate has, asked of the cluster's DNS.
API=(env SPECQL_ADDRESS="dns://$NODEIP/mesh-specql-orchestrator.specql.svc.cluster.local:7350" SPECQL_CA="$W/ca.crt" SPECQL_TLS_CERT="$W/tls.crt" SPECQL_TLS_KEY="$W/tls.key" "$KUBE_DIR/bin/specql")
specql() { node exec "${API[@]}" "$@"; }
workflow() { # INPUT: a run of the workflow, into run.json
  specql execute-job --file test/kube/workflow.yaml --input "$1" -o json >"$W/run.json" 2>"$W/run.log" || { cat "$W/run.json" "$W/run.log"; fail "the workflow"; }
  echo "run $(sed -n 's/^  "id": "\(.*\)",$/\1/p' "$W/run.json"): $(sed -n 's/^  "status": "\(.*\)",$/\1/p' "$W/run.json"), output $(sed -n '/^  "output": {/,/^  }/p' "$W/run.json" | tr -d '\n ' | sed 's/^"output"://; s/,$//')"
}

# Each pod with three figures in MiB: the working set, which is what Kubernetes counts (kubectl top, limits, evictions: all that the
# group is charged with, but for pages of files that are not in use); its anonymous part, which nothing but the pod can give back; and
# what its processes have resident, with the program's own file as far as it is mapped, which the kernel gives back when it needs to.
memory() {
  local p uid dir used=
  for p in $(k get pods -l app.kubernetes.io/name=specql -o jsonpath='{range .items[?(@.status.phase=="Running")]}{.metadata.name}={.metadata.uid} {end}'); do
    uid=${p#*=}
    for dir in /sys/fs/cgroup/memory/kubepods{,/*}/pod"$uid" /sys/fs/cgroup/kubepods{,/*}/pod"$uid"; do # version 1 and 2
      used=$(cat "$dir/memory.usage_in_bytes" 2>/dev/null || cat "$dir/memory.current" 2>/dev/null) || continue
      { find "$dir" -name cgroup.procs -exec cat {} + | sort -u | while read -r pid; do grep ^Pss: "/proc/$pid/smaps_rollup" || true; done; cat "$dir/memory.stat"; } 2>/dev/null |
        awk -v pod="${p%%=*}" -v used="$used" '$1=="Pss:" {pss+=$2} $1=="total_rss" || $1=="anon" {anon=$2} $1=="total_inactive_file" || $1=="inactive_file" && !idle {idle=$2}
          END{printf "%s %.1f %.1f %.1f\n", pod, (used-idle)/1048576, anon/1048576, pss/1024}' || true # a pod that has just ended
    done
  done
}
most() { awk -v c="mesh-specql-$1-" -v f="$2" 'index($1, c)==1 && $f>m {m=$f} END{printf "%.1f", m}' "$3"; }
say "memory, idle"
sleep 20 # what the start took is given back
memory >"$W/idle"
{ echo "pod working-set anonymous resident"; cat "$W/idle"; } | awk '{printf "%-50s %12s %10s %10s\n", $1, $2, $3, $4}'
awk '$1~/-orchestrator-/ && $2>=50 || $1~/-runner-/ && $2>=30 {print "too much: " $0; bad=1} END{exit bad}' "$W/idle" || fail "a service idles above its bound: 50 MiB for an orchestrator, 30 for a runner"

say "a workflow with a step of each type"
workflow '{"text": "one two three"}'
grep -E '^ {6}"(service|executionType|status)":' "$W/run.json" | tr -d '\n ' | sed 's/"service"/\n&/g'; echo
say "the docker step was a Job of the cluster: what it used"
awk '/"executionType": "docker"/ {d=1} d && /"resourceUsage": \{/ {u=1} u {print} u && /\}/ {exit}' "$W/run.json" >"$W/usage"
cat "$W/usage"
for figure in cpuSeconds peakMemoryMb durationSeconds executedVersion '"source": "kubernetes"'; do grep -q "$figure" "$W/usage" || fail "no $figure of the Job"; done
node kubectl -n $JOBS get events --field-selector involvedObject.kind=Job -o custom-columns=REASON:.reason,JOB:.involvedObject.name,MESSAGE:.message | head -4

load() { # SERVICE CALLERS INPUT DURATION: in the background, its result in load-SERVICE.json
  background "${API[@]}" load-test --service "$1" --duration "$4" --concurrency "$2" --input "$3" --allow-cost -o json >"$W/load-$1.json" 2>"$W/load-$1.log"
  loader=${children[-1]}
}
loaded() { # SERVICE [most calls that fail]: what came of it
  local f=$W/load-$1.json n
  [ -s "$f" ] || { cat "$W/load-$1.log"; fail "the load on $1 has no result"; }
  echo "$1: $(grep -E '^  "(requests|completed|failed|throughput)[a-zA-Z]*":' "$f" | tr -d '\n"' | tr -s ' ')"
  n=$(sed -n 's/^  "failed": \([0-9]*\),$/\1/p' "$f")
  [ "${n:-1}" = 0 ] || { grep -A20 '^  "errors"' "$f"; fail "$n calls of $1 failed"; }
}
jobs_of() { # what each pod of a component has carried out, by its own count
  local p
  for p in $(k get pods -l app.kubernetes.io/component="$1" -o jsonpath='{range .items[?(@.status.podIP)]}{.metadata.name}={.status.podIP} {end}'); do
    echo "${p%%=*} $(node exec curl -s "http://${p#*=}:9100/metrics" | awk '/^specql_runner_jobs_total/{a+=$2} END{print a+0}')"
  done
}
no_run_failed() {
  sql "SELECT 'runs ' || status || ': ' || count(*) FROM jobs.tb_workflow_run GROUP BY status"
  [ "$(sql "SELECT count(*) FROM jobs.tb_workflow_run WHERE status <> 'completed'")" = 0 ] || fail "a run did not complete"
}

say "memory, under load of all types at once for $LOAD_FOR"
: >"$W/loaded"
loaders=()
load statistics 16 '{"numbers": [1, 2, 3]}' "$LOAD_FOR"; loaders+=("$loader")
load words 4 '{"text": "a b"}' "$LOAD_FOR"; loaders+=("$loader")
load probe 2 '{"name": "ada"}' "$LOAD_FOR"; loaders+=("$loader")
load notifier 8 '{"recipient": "ada", "message": "done", "channel": "email"}' "$LOAD_FOR"; loaders+=("$loader")
while kill -0 "${loaders[0]}" 2>/dev/null; do memory >>"$W/loaded"; sleep 2; done
for p in "${loaders[@]}"; do wait "$p" || true; done
for s in statistics words probe notifier; do loaded $s; done
echo "MiB, the most that a pod had:          idle                                loaded"
printf '%-20s %12s %10s %10s %12s %10s %10s\n' service working-set anonymous resident working-set anonymous resident
for c in $SERVICES; do
  printf '%-20s %12s %10s %10s %12s %10s %10s\n' $c "$(most $c 2 "$W/idle")" "$(most $c 3 "$W/idle")" "$(most $c 4 "$W/idle")" "$(most $c 2 "$W/loaded")" "$(most $c 3 "$W/loaded")" "$(most $c 4 "$W/loaded")"
done
no_run_failed

say "kubectl scale of the HTTP runner under load"
load statistics 16 '{"numbers": [1, 2, 3]}' 10m; one=$loader
sleep 10 # so long that every stream is in use
k scale deployment mesh-specql-http-runner --replicas=3
k rollout status deployment mesh-specql-http-runner --timeout=120s | tail -1
began=$(date +%s)
while :; do
  jobs_of http-runner | sort >"$W/before"; sleep 3; jobs_of http-runner | sort >"$W/after"
  join "$W/before" "$W/after" | awk '{n[$1]=$3-$2; sum+=n[$1]} END{for (p in n) printf "%s %d of %d calls in 3 s\n", p, n[p], sum}' | sort >"$W/shares"
  ! awk '$2 < $4/6 {bad=1} END{exit bad || NR<3}' "$W/shares" || break
  [ $(($(date +%s) - began)) -lt 30 ] || { cat "$W/shares"; fail "new replicas have no share after 30 s"; }
done
echo "each of the three has at least half of its fair share $(($(date +%s) - began)) s after the new ones were ready:"; cat "$W/shares"
kill "$one"; wait "$one" || true
loaded statistics

say "a rolling restart of everything under load"
load statistics 8 '{"numbers": [1, 2, 3]}' 15m; one=$loader
load words 2 '{"text": "a b"}' 15m; two=$loader
load notifier 2 '{"recipient": "ada", "message": "done", "channel": "email"}' 15m; three=$loader
load probe 1 '{"name": "ada"}' 15m; four=$loader
sleep 5
k rollout restart deployment
for d in $(k get deployments -o name); do k rollout status "$d" --timeout=300s | tail -1; done
until [ -z "$(k get pods -o jsonpath='{.items[*].metadata.deletionTimestamp}')" ]; do sleep 1; done # the old ones have drained
sleep 5
for p in $one $two $three $four; do kill "$p"; done
for p in $one $two $three $four; do wait "$p" || true; done
for s in statistics words notifier probe; do loaded $s; done
no_run_failed

say "helm upgrade across a change of the schema"
version() { sql "SELECT max(version) FROM jobs.tb_schema_version"; }
echo "schema $(version)"; [ "$(version)" = "$NOW" ] || fail "the schema should be at $NOW"
helm upgrade mesh deploy/helm/specql -f test/kube/values.yaml --set image.tag=next --wait --timeout 6m >"$W/upgrade.log" 2>&1 || { cat "$W/upgrade.log"; fail "helm upgrade"; }
grep -E '^(STATUS|REVISION)' "$W/upgrade.log"
echo "schema $(version)"; [ "$(version)" = "$NEXT" ] || fail "the hook did not migrate"
images() { # of each deployment, which still has the replicas that it was scaled to
  [ "$(k get deployment mesh-specql-http-runner -o jsonpath='{.status.readyReplicas}')" = 3 ] || fail "the HTTP runner was scaled to 3"
  k get deployments -o custom-columns=NAME:.metadata.name,IMAGE:.spec.template.spec.containers[0].image,READY:.status.readyReplicas
}
images
workflow '{"text": "one two"}'
say "helm rollback"
helm rollback mesh 1 --wait --timeout 6m >"$W/rollback.log" 2>&1 || { cat "$W/rollback.log"; fail "helm rollback"; }
helm status mesh | grep -E '^(STATUS|REVISION)'
echo "schema $(version), which the programs of before work with"
images
workflow '{"text": "one"}'
no_run_failed

say "backup and restore, as the guide has it"
node exec "$PG/pg_dump" --format=custom --file "$W/specql.dump" "$DATABASE_URL"
kept=$(sql "SELECT count(*) FROM jobs.tb_workflow_run")
workflow '{"text": "after the backup"}'
k scale deployment mesh-specql-orchestrator --replicas=0
k wait --for=delete pod -l app.kubernetes.io/component=orchestrator --timeout=120s >/dev/null
node exec "$PG/pg_restore" --clean --if-exists --dbname "$DATABASE_URL" "$W/specql.dump"
node exec "$KUBE_DIR/bin/specql" migrate-schema --database "$DATABASE_URL"
k scale deployment mesh-specql-orchestrator --replicas=2
k rollout status deployment mesh-specql-orchestrator --timeout=120s | tail -1
[ "$(sql "SELECT count(*) FROM jobs.tb_workflow_run")" = "$kept" ] || fail "the backup had $kept runs"
echo "the $kept runs of the backup are there"
specql runners --wait 1m -o json >/dev/null # the Service has its addresses again
workflow '{"text": "one two three four"}'

say "the docker runner's backend against this node: conformance, ends, limits, hand-over"
node kubectl create namespace conformance --dry-run=client -o yaml | apply
node kubectl label --overwrite namespace conformance pod-security.kubernetes.io/enforce=restricted >/dev/null
node exec env SPECQL_TEST_NAMESPACE=conformance SPECQL_TEST_SHIM_IMAGE=specql/docker-runner:test SPECQL_TEST_IMAGE=specql-test/probe:1 \
  "$KUBE_DIR/bin/node.test" -test.run '^TestNode' -test.v -test.timeout 15m >"$W/node.log" 2>&1 || { tail -60 "$W/node.log"; fail "the backend's tests"; }
grep -E '^ *--- (PASS|FAIL|SKIP)|^(PASS|FAIL|ok)' "$W/node.log"
! grep -q -- '--- SKIP' "$W/node.log" || fail "a test was skipped"

say "all of it was so"
