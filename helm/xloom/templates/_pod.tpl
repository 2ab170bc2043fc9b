{{/* The parts of the head's and the workers' pods. Arguments: dict "root" $ "role" "head"|"worker" "group" GROUP. */}}

{{- define "xloom.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* The user's containers, each with the chart's security context where it has none. Arguments: "root" "containers". */}}
{{- define "xloom.secured" -}}
{{- $found := list -}}
{{- $security := include "xloom.containerSecurity" .root | fromYaml -}}
{{- range .containers }}{{ $found = append $found (merge (deepCopy .) (dict "securityContext" $security)) }}{{ end -}}
{{- toYaml $found -}}
{{- end -}}

{{- define "xloom.podSecurity" -}}
runAsNonRoot: true
{{- range $field := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- $id := get $.Values.podSecurityContext $field }}
{{- if not (has (toString $id) (list "" "<nil>")) }}{{/* Helm drops a key that is null */}}
{{ $field }}: {{ int64 $id }}
{{- end }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "xloom.podLabels" -}}
{{- $labels := mergeOverwrite (deepCopy .root.Values.commonLabels) (deepCopy (default dict .group.podLabels)) -}}
{{- $_ := set $labels "app.kubernetes.io/component" .role -}}
{{- mergeOverwrite $labels (include "xloom.podSelector" .root | fromYaml) | toYaml -}}
{{- end -}}

{{- define "xloom.podAnnotations" -}}
{{- $own := dict -}}
{{- with .root.Values.restartedAt }}{{ $_ := set $own "xloom/restarted-at" (toString .) }}{{ end -}}
{{- with mergeOverwrite $own (deepCopy (default dict .group.podAnnotations)) }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "xloom.env" -}}
{{- $over := concat .root.Values.extraEnv (default list .group.extraEnv) -}}
{{- include "xloom.overlaid" (dict "key" "name" "base" (include "xloom.ownEnv" . | fromYamlArray) "over" $over) -}}
{{- end -}}

{{- define "xloom.ownEnv" -}}
- {name: HOME, value: /home/xloom}
- {name: HF_HOME, value: /var/cache/xloom/hub}
- {name: VLLM_CACHE_ROOT, value: /var/cache/xloom/vllm}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /var/cache/xloom/inductor}
- {name: TRITON_CACHE_DIR, value: /var/cache/xloom/triton}
{{- if .root.Values.hub.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Ray runs its workers, and the engines in them, at nice 15 (RAY_WORKER_NICENESS, Ray 2.60).
- {name: RAY_worker_niceness, value: "0"}
# A router has no GPU, but vLLM in it must recognise the platform (Ray 2.60).
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
{{- if and (not (default 0 .group.gpus | int)) (eq (include "xloom.variant" .root) "cuda") }}
# The image asks for all GPUs of a node; without this, NVIDIA's runtime shows them to pods that requested none.
- {name: NVIDIA_VISIBLE_DEVICES, value: void}
{{- end }}
{{- if eq .root.Values.rayAuth.mode "disabled" }}
- {name: RAY_AUTH_MODE, value: disabled}
{{- end }}
{{- with .root.Values.auth.existingSecret }}
- name: XLOOM_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.root.Values.auth.apiKey }}}
- name: XLOOM_ADMIN_KEY
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.root.Values.auth.adminKey }}, optional: true}
{{- end }}
{{- with .root.Values.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $.root.Values.hub.tokenKey }}}
{{- end }}
{{- end -}}

{{- define "xloom.hasStore" -}}
{{- $store := .root.Values.persistence.store -}}
{{- if and $store.enabled (or (eq .role "head") (has "ReadWriteMany" $store.accessModes)) }}yes{{ end -}}
{{- end -}}

{{- define "xloom.volumeMounts" -}}
{{- $own := include "xloom.ownVolumeMounts" . | fromYamlArray -}}
{{- include "xloom.overlaid" (dict "key" "mountPath" "base" $own "over" .root.Values.extraVolumeMounts) -}}
{{- end -}}

{{- define "xloom.ownVolumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/xloom}
- {name: shared-mem, mountPath: /dev/shm}
- {name: cache, mountPath: /var/cache/xloom}
- {name: store, mountPath: /var/lib/xloom}
{{- end -}}

{{- define "xloom.volumes" -}}
{{- $own := include "xloom.ownVolumes" . | fromYamlArray -}}
{{- include "xloom.overlaid" (dict "key" "name" "base" $own "over" .root.Values.extraVolumes) -}}
{{- end -}}

{{- define "xloom.ownVolumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
- name: shared-mem
  emptyDir:
    medium: Memory
    {{- with .group.shm }}
    sizeLimit: {{ . }}
    {{- end }}
- name: cache
  {{- $cache := .root.Values.persistence.cache }}
  {{- if eq $cache.type "claim" }}
  persistentVolumeClaim:
    claimName: {{ include "xloom.cacheClaim" .root }}
  {{- else if and (eq $cache.type "ephemeral") (eq .role "worker") (not .group.routers) }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $cache.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ $cache.size }}
  {{- else }}
  emptyDir: {}
  {{- end }}
- name: store
  {{- if include "xloom.hasStore" . }}
  persistentVolumeClaim:
    claimName: {{ include "xloom.storeClaim" .root }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- if and (eq .role "head") .root.Values.autoscaler.enabled }}
# Only the autoscaler speaks to Kubernetes: its container alone is given the account's token.
- name: autoscaler-tmp
  emptyDir: {}
- name: autoscaler-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap:
          name: kube-root-ca.crt
          items:
            - {key: ca.crt, path: ca.crt}
      - downwardAPI:
          items:
            - path: namespace
              fieldRef: {fieldPath: metadata.namespace}
{{- end }}
{{- end -}}

{{/*
KubeRay adds probes of its own where a container has none (initLivenessAndReadinessProbe, KubeRay 1.7): one stall of a
router over 2 s would take its pod off the endpoint. `/api/healthz` of Ray's agent (Ray 2.60) is about Ray on the node, and
the GCS on the head; only pods with a router are ready, and get traffic.
*/}}
{{- define "xloom.probes" -}}
{{- $probes := .root.Values.probes -}}
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  initialDelaySeconds: 30
  periodSeconds: {{ int $probes.periodSeconds }}
  timeoutSeconds: {{ int $probes.timeoutSeconds }}
  failureThreshold: {{ int $probes.livenessFailureThreshold }}
readinessProbe:
  {{- if eq .role "head" }}
  httpGet: {path: /api/healthz, port: 52365}
  {{- else }}
  httpGet: {path: /-/healthz, port: serve}
  {{- end }}
  initialDelaySeconds: {{ eq .role "head" | ternary 10 5 }}
  periodSeconds: {{ int $probes.periodSeconds }}
  timeoutSeconds: {{ int $probes.timeoutSeconds }}
  failureThreshold: {{ eq .role "head" | ternary 10 (include "xloom.failureThreshold" .root | int) }}
{{- end -}}

{{/* Failures of a router's probe that span more than stuck_timeout_s. */}}
{{- define "xloom.failureThreshold" -}}
{{- $given := .Values.probes.failureThreshold | toString -}}
{{- if has $given (list "" "<nil>") -}}
{{- $stuck := dig "replicas" "stuck_timeout_s" 10 .Values.settings | float64 -}}
{{- add 1 (ceil (divf $stuck (float64 .Values.probes.periodSeconds)) | int) -}}
{{- else -}}
{{- int .Values.probes.failureThreshold -}}
{{- end -}}
{{- end -}}

{{/* Requests and limits of the Ray container, the user's over the chart's. */}}
{{- define "xloom.resources" -}}
{{- $own := include "xloom.ownResources" . | fromYaml -}}
{{- mergeOverwrite $own (deepCopy (default dict .group.resources)) | toYaml -}}
{{- end -}}

{{- define "xloom.ownResources" -}}
{{- $memory := default "8Gi" .group.memory -}}
{{- $gpus := default 0 .group.gpus | int -}}
requests:
  cpu: {{ default 1 .group.cpus | toString | quote }}
  memory: {{ $memory }}
  ephemeral-storage: {{ default "10Gi" .group.ephemeralStorage }}
  {{- if $gpus }}
  {{ default "nvidia.com/gpu" .group.gpuResource }}: {{ $gpus | quote }}
  {{- end }}
limits:
  memory: {{ $memory }}
  {{- if $gpus }}
  {{ default "nvidia.com/gpu" .group.gpuResource }}: {{ $gpus | quote }}
  {{- end }}
{{- end -}}

{{/* What is the same in the spec of both. */}}
{{- define "xloom.podSpec" -}}
serviceAccountName: {{ eq .role "head" | ternary (include "xloom.headServiceAccount" .root) (include "xloom.workerServiceAccount" .root) }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "xloom.grace" .root }}
securityContext:
  {{- include "xloom.podSecurity" .root | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .group.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .group.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .group.initContainers }}
initContainers:
  {{- include "xloom.secured" (dict "root" $.root "containers" .) | nindent 2 }}
{{- end }}
volumes:
  {{- include "xloom.volumes" . | nindent 2 }}
{{- end -}}

{{/*
Ray's start options. Its object store carries adapters only, so half of /dev/shm is enough: left to itself Ray asks for
more than /dev/shm has and then keeps it on disk (ray._private.services.determine_plasma_store_config, Ray 2.60).
Arguments: dict "group" GROUP "fixed" OPTIONS.
*/}}
{{- define "xloom.rayStartParams" -}}
{{- $params := dict -}}
{{- with .group.shm -}}
{{- $unit := hasSuffix "Gi" . | ternary 1073741824 1048576 -}}
{{- $_ := set $params "object-store-memory" (div (mul (regexFind "^[0-9]+" . | int64) $unit) 2 | toString) -}}
{{- end -}}
{{- if .group.routers -}}
{{- $_ := set $params "resources" "\"{\\\"xloom_router\\\": 1}\"" -}}{{/* quoted as KubeRay and Ray's autoscaler read it */}}
{{- end -}}
{{- mergeOverwrite $params (deepCopy (default dict .group.rayStartParams)) .fixed | toYaml -}}
{{- end -}}

{{/* Before a worker goes: wait until the router in it, if there is one, has answered all requests. */}}
{{- define "xloom.drainScript" -}}
{{ .Files.Get "files/drain.sh" | replace "__PORT__" (include "xloom.port" .) | replace "__DRAIN__" (include "xloom.drain" .) }}
{{- end -}}
