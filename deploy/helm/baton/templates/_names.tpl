{{- define "baton.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- /* Of pods: nothing that changes with a version of the chart alone. */}}
{{- define "baton.podLabels" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "baton.labels" -}}
{{ include "baton.podLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "baton.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{- define "baton.serviceAccount" -}}
{{- $made := .Values.serviceAccount.create | ternary (include "baton.fullname" .) "default" -}}
{{- .Values.serviceAccount.name | default $made -}}
{{- end }}

{{- define "baton.claim" -}}
{{- $made := .Values.store.claim.create | ternary (printf "%s-models" (include "baton.fullname" .)) "" -}}
{{- .Values.store.existingClaim | default $made -}}
{{- end }}

{{- define "baton.gatewaySecret" -}}
{{- .Values.tls.gateway.secretName | default (printf "%s-gateway-tls" (include "baton.fullname" .)) -}}
{{- end }}

{{- define "baton.clusterSecret" -}}
{{- .Values.tls.cluster.secretName | default (printf "%s-cluster-tls" (include "baton.fullname" .)) -}}
{{- end }}

{{- /* The host of one model: of a dict of root, model and host. */}}
{{- define "baton.host" -}}
{{- if gt (len .root.Values.models) 1 }}{{ .model.id }}.{{ end }}{{ .host -}}
{{- end }}

{{- /* Where a model lies in each pod. */}}
{{- define "baton.modelDir" -}}
{{- if .model.download }}{{ .root.Values.store.mountPath }}/{{ .model.id }}{{ else }}{{ .model.path }}{{ end -}}
{{- end }}

{{- /* "true" if pods have a store of models. */}}
{{- define "baton.hasStore" -}}
{{- $downloads := false -}}
{{- range .Values.models }}{{ if .download }}{{ $downloads = true }}{{ end }}{{ end -}}
{{- if or $downloads (include "baton.claim" .) }}true{{ end -}}
{{- end }}

{{- /* "true" if prefill has pods of its own. */}}
{{- define "baton.prefillPods" -}}
{{- if and .Values.prefill.enabled (not .Values.prefill.onDecodePods) }}true{{ end -}}
{{- end }}

{{- /* host:port of the Redis that keeps what Ray's head knows; empty: there is none. */}}
{{- define "baton.redis" -}}
{{- .Values.redis.bundled.enabled | ternary (printf "%s-redis:6379" (include "baton.fullname" .)) .Values.redis.address -}}
{{- end }}

{{- /* "true" if somebody outside Baton says how large pools are. */}}
{{- define "baton.sizedOutside" -}}
{{- if ne .Values.scaling.by "baton" }}true{{ end -}}
{{- end }}

{{- /* The role of decode's pools. */}}
{{- define "baton.decodeRole" -}}
{{- .Values.prefill.enabled | ternary "decode" "mixed" -}}
{{- end }}

{{- /* The name of the BatonPool of one model's pool: of a dict of root, model and block. */}}
{{- define "baton.poolObject" -}}
{{ include "baton.fullname" .root }}-{{ .model.id }}-{{ .block }}
{{- end }}

{{- /* What the schema cannot say. */}}
{{- define "baton.check" -}}
{{- $ids := dict -}}
{{- range .Values.models -}}
{{- if hasKey $ids .id }}{{ fail (printf "models: two have the id %q" .id) }}{{ end -}}
{{- $_ := set $ids .id true -}}
{{- end -}}
{{- if eq (int .Values.gateway.httpPort) (int .Values.gateway.grpcPort) }}{{ fail "gateway.grpcPort: must not be gateway.httpPort" }}{{ end -}}
{{- range $group := list "prefill" "decode" "gateway" -}}
{{- $least := add $.Values.drain.delaySeconds $.Values.drain.marginSeconds 8 -}}
{{- if le (int (index $.Values $group "terminationGracePeriodSeconds")) (int $least) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds: must be over %d: drain.delaySeconds, drain.marginSeconds and 8 to close" $group $least) -}}
{{- end -}}{{- end -}}
{{- with .Values.metrics.serviceMonitor -}}
{{- if and .enabled $.Values.tls.gateway.clientAuth (not .clientCertSecret) }}{{ fail "metrics.serviceMonitor.clientCertSecret: needed with tls.gateway.clientAuth" }}{{ end -}}
{{- end -}}
{{- range $name, $made := dict "gateway" .Values.tls.gateway "cluster" .Values.tls.cluster -}}
{{- if and $made.enabled (not $made.secretName) (not $.Values.tls.certManager.enabled) }}{{ fail (printf "tls.%s.secretName: needed without tls.certManager" $name) }}{{ end -}}
{{- end -}}
{{- if and .Values.tls.certManager.enabled .Values.tls.gateway.enabled (not .Values.tls.certManager.gatewayIssuer.name) }}{{ fail "tls.certManager.gatewayIssuer.name: needed" }}{{ end -}}
{{- if and .Values.tls.certManager.enabled .Values.tls.cluster.enabled (not .Values.tls.certManager.clusterIssuer.name) }}{{ fail "tls.certManager.clusterIssuer.name: needed" }}{{ end -}}
{{- if and .Values.gateway.httpRoute.enabled (not .Values.gateway.httpRoute.parentRefs) }}{{ fail "gateway.httpRoute.parentRefs: needed" }}{{ end -}}
{{- $http := .Values.gateway.httpRoute -}}{{- $grpc := .Values.gateway.grpcRoute -}}
{{- if and $grpc.enabled (not $grpc.parentRefs) }}{{ fail "gateway.grpcRoute.parentRefs: needed" }}{{ end -}}
{{- if and $grpc.enabled $http.enabled (eq $grpc.host $http.host) }}{{ fail "gateway.grpcRoute.host: must not be gateway.httpRoute.host: a listener takes one of them" }}{{ end -}}
{{- with .Values.redis -}}
{{- if and .bundled.enabled .address }}{{ fail "redis.address: not with redis.bundled.enabled" }}{{ end -}}
{{- if and .bundled.enabled (not .passwordSecret) }}{{ fail "redis.passwordSecret: needed with redis.bundled.enabled" }}{{ end -}}
{{- end -}}
{{- if include "baton.sizedOutside" . -}}
{{- range $block := list "prefill" "decode" -}}
{{- $scaling := index $.Values.scaling $block -}}
{{- if lt (int $scaling.maxReplicas) (int $scaling.minReplicas) }}{{ fail (printf "scaling.%s.maxReplicas: at least minReplicas, which is %d" $block (int $scaling.minReplicas)) }}{{ end -}}
{{- if hasKey (index $.Values $block).pool "autoscale" }}{{ fail (printf "%s.pool.autoscale: not with scaling.by %s, which says how large pools are" $block $.Values.scaling.by) }}{{ end -}}
{{- range $.Values.models -}}
{{- if hasKey (index . $block | default dict) "autoscale" }}{{ fail (printf "models: %s.autoscale of %q: not with scaling.by %s, which says how large pools are" $block .id $.Values.scaling.by) }}{{ end -}}
{{- end -}}{{- end -}}{{- end -}}
{{- if and (include "baton.claim" .) .Values.store.existingClaim .Values.store.claim.create }}{{ fail "store.claim.create: not with store.existingClaim" }}{{ end -}}
{{- end }}
