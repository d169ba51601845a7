{{- define "specql.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{/* Name of a component: (list . "http-runner") */}}
{{- define "specql.name" -}}
{{ include "specql.fullname" (first .) }}-{{ last . }}
{{- end -}}

{{- define "specql.selector" -}}
app.kubernetes.io/name: specql
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{- define "specql.labels" -}}
{{ include "specql.selector" . }}
app.kubernetes.io/version: {{ (first .).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (first .).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (first .).Chart.Name (first .).Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Image of a service: (list . "http-runner") */}}
{{- define "specql.image" -}}
{{- $v := (first .).Values.image -}}
{{ with $v.registry }}{{ . }}/{{ end }}{{ $v.repository }}/{{ last . }}:{{ $v.tag | default (first .).Chart.AppVersion }}
{{- end -}}

{{- define "specql.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The name of a component's service account: (list . "http-runner" values) */}}
{{- define "specql.account" -}}
{{- $v := index . 2 -}}
{{ $v.serviceAccount.name | default (include "specql.name" (list (index . 0) (index . 1))) }}
{{- end -}}

{{/* The Secret with the certificate of a role: (list . "http-runner") */}}
{{- define "specql.certificate" -}}
{{ include "specql.fullname" (first .) }}-{{ last . }}-tls
{{- end -}}

{{- define "specql.databaseSecret" -}}
{{ .Values.database.existingSecret.name | default (printf "%s-database" (include "specql.fullname" .)) }}
{{- end -}}
{{- define "specql.databaseKey" -}}
{{ ternary .Values.database.existingSecret.key "url" (ne .Values.database.existingSecret.name "") }}
{{- end -}}

{{- define "specql.jobsNamespace" -}}
{{ .Values.runners.docker.jobs.namespace | default (printf "%s-%s-jobs" .Release.Namespace (include "specql.fullname" .)) }}
{{- end -}}

{{/* The names of the runners that are wanted, as a list in JSON */}}
{{- define "specql.enabledRunners" -}}
{{- $out := list -}}
{{- range $type := list "http" "shell" "docker" "serverless" -}}
{{- if (index $.Values.runners $type).enabled }}{{ $out = append $out $type }}{{ end -}}
{{- end -}}
{{ toJson $out }}
{{- end -}}

{{/* What holds every pod: nothing less than the restricted Pod Security */}}
{{- define "specql.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}
{{- define "specql.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "specql.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 10
  failureThreshold: 6
  timeoutSeconds: 5
readinessProbe:
  httpGet: {path: /readyz, port: metrics}
  periodSeconds: 3
  failureThreshold: 2
  timeoutSeconds: 3
# What sends calls here learns that the pod is going before it stops to answer
lifecycle:
  preStop: {sleep: {seconds: 5}}
{{- end -}}

{{/* Where pods run: (list . component scheduling) */}}
{{- define "specql.scheduling" -}}
{{- $s := index . 2 -}}
{{- with $s.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $s.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $s.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $s.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $s.topologyKey }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "specql.selector" (list (index $ 0) (index $ 1)) | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Addresses outside: everything but the private ranges, as peers of a NetworkPolicy */}}
{{- define "specql.outside" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except: {{- toYaml .Values.networkPolicy.privateRanges | nindent 6 }}
- ipBlock:
    cidr: ::/0
    except: {{- toYaml .Values.networkPolicy.privateRangesIPv6 | nindent 6 }}
{{- end -}}

{{- define "specql.dnsRule" -}}
- to: {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- end -}}
