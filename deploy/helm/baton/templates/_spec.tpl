{{- /* One pool of the spec: of a dict of root, block ("prefill" or "decode"), role and model. */}}
{{- define "baton.pool" -}}
{{- $block := index .root.Values .block -}}
{{- $pool := mergeOverwrite (dict "role" .role) (deepCopy $block.pool) (deepCopy (index .model .block | default dict)) -}}
{{- $resources := $pool.resources | default dict -}}
{{- $pods := and (eq .block "prefill") (not .root.Values.prefill.onDecodePods) | ternary "prefill" "decode" -}}
{{- $custom := merge (dict (printf "baton-%s" $pods) 1) ($resources.custom | default dict) -}}
{{- $_ := set $resources "custom" $custom -}}
{{- $_ := set $pool "resources" $resources -}}
{{- if include "baton.sizedOutside" .root -}}
{{- /* Bounds, and no pressure that is ever high or low for long enough: `up` keeps the size then. */ -}}
{{- $sizes := index .root.Values.scaling .block -}}
{{- $_ := set $pool "autoscale" (dict "min" (int $sizes.minReplicas) "max" (int $sizes.maxReplicas) "grow_over" 1000000000 "shrink_after_s" 1000000000) -}}
{{- end -}}
{{- if $pool.autoscale }}{{ $pool = omit $pool "instances" }}{{ end -}}
{{- toYaml $pool -}}
{{- end }}

{{- /* The gateways of one model: of a dict of root and model. */}}
{{- define "baton.gateways" -}}
{{- $values := .root.Values -}}
{{- $own := mergeOverwrite (deepCopy $values.gateway.config) (deepCopy (.model.gateways | default dict)) -}}
{{- $fixed := dict "count" (int $values.gateway.replicas) "host" "0.0.0.0" "node_resource" (printf "baton-gateway-%s" .model.id) "http_port" (int $values.gateway.httpPort) "grpc_port" (int $values.gateway.grpcPort) -}}
{{- if $values.gateway.apiKeysSecret }}{{ $_ := set $fixed "api_keys" "/etc/baton/keys/keys.yaml" }}{{ end -}}
{{- if $values.tls.gateway.enabled -}}
{{- $tls := dict "cert" "/etc/baton/gateway-tls/tls.crt" "key" "/etc/baton/gateway-tls/tls.key" -}}
{{- if $values.tls.gateway.clientAuth }}{{ $_ := set $tls "client_ca" "/etc/baton/gateway-tls/ca.crt" }}{{ end -}}
{{- $_ := set $fixed "tls" $tls -}}
{{- end -}}
{{- toYaml (mergeOverwrite $own $fixed) -}}
{{- end }}

{{- /* The whole spec, as `baton up` reads it. */}}
{{- define "baton.spec" -}}
share_gpus: {{ .Values.controller.shareGpus }}
start_timeout_s: {{ int .Values.controller.startTimeoutSeconds }}
drain_timeout_s: {{ int .Values.controller.drainTimeoutSeconds }}
{{- if .Values.tls.cluster.enabled }}
tls:
  cert: /etc/baton/cluster-tls/tls.crt
  key: /etc/baton/cluster-tls/tls.key
  ca: /etc/baton/cluster-tls/ca.crt
{{- end }}
models:
{{- range $model := .Values.models }}
  - name: {{ $model.name | quote }}
    dir: {{ include "baton.modelDir" (dict "root" $ "model" $model) | quote }}
    {{- range $key := list "aliases" "limits" "tool_parser" }}
    {{- with index $model $key }}
    {{ $key }}: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
    {{- with $model.engine }}
    engine: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- $handover := deepCopy ($model.handover | default dict) }}
    {{- if $.Values.rdma.enabled }}
    {{- $handover = mergeOverwrite (dict "transport" "ucx" "ucx_options" (deepCopy $.Values.rdma.ucxOptions)) $handover }}
    {{- end }}
    {{- with $handover }}
    handover: {{- toYaml . | nindent 6 }}
    {{- end }}
    pools:
      {{- if $.Values.prefill.enabled }}
      {{ $model.id }}-prefill: {{- include "baton.pool" (dict "root" $ "block" "prefill" "role" "prefill" "model" $model) | nindent 8 }}
      {{- end }}
      {{ $model.id }}-decode: {{- include "baton.pool" (dict "root" $ "block" "decode" "role" (include "baton.decodeRole" $) "model" $model) | nindent 8 }}
    gateways: {{- include "baton.gateways" (dict "root" $ "model" $model) | nindent 6 }}
{{- end }}
{{- end }}
