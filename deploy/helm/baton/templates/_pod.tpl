{{- /*
Pods of all groups. Each takes a dict of root, group ("head", "prefill", "decode" or "gateway"),
block (the group's values) and, for gateways, model.
*/}}

{{- define "baton.probe" -}}
{{- toYaml (.own | default .ours) -}}
{{- end }}

{{- /* Whether a group has the weights, and not just what describes the model. */}}
{{- define "baton.hasWeights" -}}
{{- if has .group (list "prefill" "decode") }}true{{ end -}}
{{- end }}

{{- define "baton.auth" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.ray.tokenSecret | default (include "baton.fullname" .) }}
      key: auth_token
{{- end }}

{{- /* Seconds that processes have to drain and to close, before the rest of the pod ends. */}}
{{- define "baton.drainSeconds" -}}
{{- $drain := .root.Values.drain -}}
{{- sub .block.terminationGracePeriodSeconds (add $drain.delaySeconds $drain.marginSeconds) -}}
{{- end }}

{{- define "baton.rayEnv" -}}
{{- $health := .root.Values.ray.healthCheck -}}
{{- if .root.Values.ray.tokenSecret }}
{{- include "baton.auth" .root }}
{{ end -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
# Ray would kill instances when the node's memory is scarce, and run them at nice 15.
- name: RAY_memory_monitor_refresh_ms
  value: "0"
- name: RAY_worker_niceness
  value: "0"
- name: RAY_health_check_period_ms
  value: {{ int $health.periodMs | quote }}
- name: RAY_health_check_timeout_ms
  value: {{ int $health.timeoutMs | quote }}
- name: RAY_health_check_failure_threshold
  value: {{ int $health.failureThreshold | quote }}
- name: RAY_health_check_initial_delay_ms
  value: {{ int $health.initialDelayMs | quote }}
# Whoever reaches Ray's client server runs code as us; nobody needs it.
- name: RAY_START_HOOK
  value: baton.cluster.head_process.without_client_server
{{- if ne .group "head" }}
# After SIGTERM; the eight seconds more that it has to close are in the hook below.
- name: BATON_DRAIN_S
  value: {{ sub (include "baton.drainSeconds" . | int) 8 | quote }}
{{- end }}
{{- with .block.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "baton.volumes" -}}
{{- $root := .root -}}
- name: scripts
  configMap:
    name: {{ include "baton.fullname" $root }}-scripts
- name: shared-mem
  emptyDir:
    medium: Memory
    {{- with .block.shmSize }}
    sizeLimit: {{ . }}
    {{- end }}
- name: ray-logs
  emptyDir: {}
{{- if include "baton.hasStore" $root }}
- name: models
  {{- with include "baton.claim" $root }}
  persistentVolumeClaim:
    claimName: {{ . }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $root.Values.store.emptyDirSize }}
  {{- end }}
{{- end }}
{{- if $root.Values.tls.cluster.enabled }}
- name: cluster-tls
  secret:
    secretName: {{ include "baton.clusterSecret" $root }}
    defaultMode: 0440
{{- end }}
{{- if eq .group "gateway" }}
{{- if $root.Values.tls.gateway.enabled }}
- name: gateway-tls
  secret:
    secretName: {{ include "baton.gatewaySecret" $root }}
    defaultMode: 0440
{{- end }}
{{- with $root.Values.gateway.apiKeysSecret }}
- name: keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: {{ $root.Values.gateway.apiKeysKey }}, path: keys.yaml}]
{{- end }}
{{- end }}
{{- if eq .group "head" }}
- name: spec
  configMap:
    name: {{ include "baton.fullname" $root }}-spec
- name: run
  emptyDir: {}
{{- if include "baton.sizedOutside" $root }}
# What automountServiceAccountToken would give to every container of the pod.
- name: api
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end }}
{{- end }}

{{- /* What Ray's container and the controller both mount. */}}
{{- define "baton.mounts" -}}
{{- $root := .root -}}
- {name: scripts, mountPath: /etc/baton/scripts}
- {name: shared-mem, mountPath: /dev/shm}
- {name: ray-logs, mountPath: /tmp/ray}
{{- if include "baton.hasStore" $root }}
- {name: models, mountPath: {{ $root.Values.store.mountPath }}}
{{- end }}
{{- if $root.Values.tls.cluster.enabled }}
- {name: cluster-tls, mountPath: /etc/baton/cluster-tls, readOnly: true}
{{- end }}
{{- if eq .group "gateway" }}
{{- if $root.Values.tls.gateway.enabled }}
- {name: gateway-tls, mountPath: /etc/baton/gateway-tls, readOnly: true}
{{- end }}
{{- if $root.Values.gateway.apiKeysSecret }}
- {name: keys, mountPath: /etc/baton/keys, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.download" -}}
{{- $root := .root -}}
{{- $weights := include "baton.hasWeights" . -}}
{{- range $model := $root.Values.models }}
{{- with $model.download }}
- name: download-{{ $model.id }}
  image: {{ include "baton.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [hf]
  args:
    - download
    - {{ .repo | quote }}
    - --revision
    - {{ .revision | quote }}
    - --local-dir
    - {{ include "baton.modelDir" (dict "root" $root "model" $model) }}
    {{- if not $weights }}
    {{- range list "*.safetensors" "*.bin" "*.pt" "*.pth" "*.gguf" }}
    - --exclude
    - {{ . | quote }}
    {{- end }}
    {{- end }}
  env:
    - {name: HF_HOME, value: {{ $root.Values.store.mountPath }}/.hub}
    {{- with $root.Values.store.hubEndpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- with $root.Values.store.hubTokenSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ . }}, key: {{ $root.Values.store.hubTokenKey }}}
    {{- end }}
  securityContext: {{- toYaml $root.Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: {{ $root.Values.store.mountPath }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.rayContainer" -}}
{{- $root := .root -}}
{{- $rdma := and $root.Values.rdma.enabled (include "baton.hasWeights" .) -}}
name: ray-{{ .group }}
image: {{ include "baton.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
{{- $resources := deepCopy .block.resources }}
{{- $security := deepCopy $root.Values.securityContext }}
{{- if $rdma }}
{{- $own := dict $root.Values.rdma.resourceName $root.Values.rdma.count }}
{{- $resources = mergeOverwrite $resources (dict "limits" $own "requests" $own) }}
{{- $capabilities := $security.capabilities | default dict }}
{{- $_ := set $capabilities "add" (append ($capabilities.add | default list) "IPC_LOCK" | uniq) }}
{{- $_ := set $security "capabilities" $capabilities }}
{{- end }}
resources: {{- toYaml $resources | nindent 2 }}
securityContext: {{- toYaml $security | nindent 2 }}
env: {{- include "baton.rayEnv" . | nindent 2 }}
volumeMounts: {{- include "baton.mounts" . | nindent 2 }}
ports:
  {{- if eq .group "head" }}
  - {name: gcs-server, containerPort: 6379}
  {{- end }}
  - {name: raylet, containerPort: {{ int $root.Values.ray.nodeManagerPort }}}
  {{- if eq .group "gateway" }}
  - {name: http, containerPort: {{ int $root.Values.gateway.httpPort }}}
  - {name: grpc, containerPort: {{ int $root.Values.gateway.grpcPort }}}
  {{- end }}
{{- $port := ternary "gcs-server" "raylet" (eq .group "head") }}
{{- $alive := dict "tcpSocket" (dict "port" $port) }}
{{- $ready := $alive }}
{{- if eq .group "gateway" }}
{{- if and $root.Values.tls.gateway.enabled $root.Values.tls.gateway.clientAuth }}
{{- $ready = dict "tcpSocket" (dict "port" "http") }}
{{- else }}
{{- $scheme := ternary "HTTPS" "HTTP" $root.Values.tls.gateway.enabled }}
{{- $ready = dict "httpGet" (dict "path" "/health" "port" "http" "scheme" $scheme) }}
{{- end }}
{{- end }}
# Ray's node is there. It waits for its head, which may have to come first.
startupProbe: {{- include "baton.probe" (dict "own" .block.startupProbe "ours" (merge (dict "periodSeconds" 5 "failureThreshold" 360) $alive)) | nindent 2 }}
readinessProbe: {{- include "baton.probe" (dict "own" .block.readinessProbe "ours" (merge (dict "periodSeconds" 5 "timeoutSeconds" 3 "failureThreshold" 2) $ready)) | nindent 2 }}
livenessProbe: {{- include "baton.probe" (dict "own" .block.livenessProbe "ours" (merge (dict "periodSeconds" 10 "timeoutSeconds" 5 "failureThreshold" 6) $alive)) | nindent 2 }}
{{- if ne .group "head" }}
{{- $drain := $root.Values.drain }}
lifecycle:
  preStop:
    exec:
      command:
        - sh
        - /etc/baton/scripts/drain.sh
        - {{ int $drain.delaySeconds | quote }}
        - {{ include "baton.drainSeconds" . | quote }}
{{- end }}
{{- end }}

{{- define "baton.controllerContainer" -}}
{{- $root := .root -}}
name: controller
image: {{ include "baton.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
command: [sh, /etc/baton/scripts/controller.sh, /etc/baton/spec/cluster.yaml, {{ int $root.Values.controller.pauseSeconds | quote }}]
args: [baton, up, --file, /etc/baton/spec/cluster.yaml, --address, "$(POD_IP):6379"]
env:
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  # Here `baton status` and the other commands find the cluster.
  - {name: XDG_STATE_HOME, value: /run/baton}
  {{- include "baton.auth" $root | nindent 2 }}
  {{- with $root.Values.controller.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources: {{- toYaml $root.Values.controller.resources | nindent 2 }}
securityContext: {{- toYaml $root.Values.securityContext | nindent 2 }}
volumeMounts:
  {{- include "baton.mounts" . | nindent 2 }}
  - {name: spec, mountPath: /etc/baton/spec}
  - {name: run, mountPath: /run/baton}
{{- end }}

{{- define "baton.sizesContainer" -}}
{{- $root := .root -}}
name: sizes
image: {{ include "baton.image" $root }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
command: [/opt/baton/bin/python, /etc/baton/scripts/sizes.py]
args:
  - --address=$(POD_IP):6379
  - --spec=/etc/baton/spec/cluster.yaml
  - --namespace={{ $root.Release.Namespace }}
  - --prefix={{ include "baton.fullname" $root }}
  - --pause={{ int $root.Values.scaling.pauseSeconds }}
env:
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  - {name: XDG_STATE_HOME, value: /run/baton}
  {{- include "baton.auth" $root | nindent 2 }}
resources: {{- toYaml $root.Values.scaling.resources | nindent 2 }}
securityContext: {{- toYaml $root.Values.securityContext | nindent 2 }}
volumeMounts:
  {{- include "baton.mounts" . | nindent 2 }}
  - {name: spec, mountPath: /etc/baton/spec}
  - {name: run, mountPath: /run/baton}
  - {name: api, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}

{{- define "baton.pod" -}}
{{- $root := .root -}}
{{- $rdma := and $root.Values.rdma.enabled (include "baton.hasWeights" .) -}}
metadata:
  labels:
    {{- include "baton.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .group }}
    {{- with .block.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .block.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "baton.serviceAccount" $root }}
  # Only Ray's autoscaler, beside the head, asks Kubernetes for anything.
  automountServiceAccountToken: {{ and (eq .group "head") $root.Values.ray.autoscaler.enabled }}
  # Ray does not wait for the processes of its processes; the pod's first process then does.
  shareProcessNamespace: true
  terminationGracePeriodSeconds: {{ int .block.terminationGracePeriodSeconds }}
  securityContext: {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- if and $rdma $root.Values.rdma.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
  {{- with index $.block $field }}
  {{ $field }}: {{- if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  {{- end }}
  {{- with include "baton.download" . }}
  initContainers: {{- . | nindent 4 }}
  {{- end }}
  containers:
    - {{- include "baton.rayContainer" . | nindent 6 }}
    {{- if eq .group "head" }}
    - {{- include "baton.controllerContainer" . | nindent 6 }}
    {{- if include "baton.sizedOutside" $root }}
    - {{- include "baton.sizesContainer" . | nindent 6 }}
    {{- end }}
    {{- end }}
  volumes: {{- include "baton.volumes" . | nindent 4 }}
{{- end }}
