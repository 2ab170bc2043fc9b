{{/* The settings, with what only the chart knows: as JSON. */}}
{{- define "xloom.settings" -}}
{{- $ours := dict
  "router" (include "xloom.ownRouter" . | fromJson)
  "store" (dict "path" "/var/lib/xloom/store" "cache" "/var/cache/xloom/adapters") -}}
{{- if .Values.settings.isq }}{{ $_ := set $ours "isq" (dict "cache" "/var/cache/xloom/quantised") }}{{ end -}}
{{- if and .Values.auth.allowAnonymous (not .Values.auth.existingSecret) }}{{ $_ := set $ours.router "allow_anonymous" true }}{{ end -}}
{{- mergeOverwrite $ours (deepCopy .Values.settings) | toJson -}}
{{- end -}}

{{/* One router of several for a Ray node, and in the groups that are for routers, where there are any. */}}
{{- define "xloom.ownRouter" -}}
{{- $router := dict "host" "0.0.0.0" -}}
{{- if gt (include "xloom.routers" . | int) 1 }}{{ $_ := set $router "max_per_node" 1 }}{{ end -}}
{{- if include "xloom.routerGroups" . }}{{ $_ := set $router "resources" (dict "xloom_router" 0.01) }}{{ end -}}
{{- toJson $router -}}
{{- end -}}

{{- define "xloom.routers" -}}
{{- dig "router" "replicas" 1 .Values.settings | int -}}
{{- end -}}

{{/* The names of the groups that are for routers. */}}
{{- define "xloom.routerGroups" -}}
{{- range .Values.workerGroups }}{{ if .routers }}{{ .name }} {{ end }}{{ end -}}
{{- end -}}

{{/* Which group is the first that is for engines. */}}
{{- define "xloom.firstEngineGroup" -}}
{{- $found := dict -}}
{{- range $index, $group := .Values.workerGroups -}}
{{- if and (not $group.routers) (not (hasKey $found "index")) }}{{ $_ := set $found "index" $index }}{{ end -}}
{{- end -}}
{{- get $found "index" -}}
{{- end -}}

{{- define "xloom.port" -}}
{{- dig "router" "port" 8000 .Values.settings | int -}}
{{- end -}}

{{/* Seconds, rounded up. */}}
{{- define "xloom.drain" -}}
{{- dig "replicas" "drain_timeout_s" 60 .Values.settings | float64 | ceil | int -}}
{{- end -}}

{{- define "xloom.grace" -}}
{{- default (add (include "xloom.drain" .) 30) .Values.terminationGracePeriodSeconds | int -}}
{{- end -}}

{{- define "xloom.deletionDelay" -}}
{{- default (add (include "xloom.grace" .) 30) .Values.rayClusterDeletionDelaySeconds | int -}}
{{- end -}}

{{- define "xloom.model" -}}
{{- dig "model" "served_name" "base" .Values.settings -}}
{{- end -}}

{{/* What `serve deploy` takes, in the shape `xloom build` writes. */}}
{{- define "xloom.serveConfig" -}}
proxy_location: Disabled
{{- $logs := dig "observability" "logs" dict .Values.settings }}
logging_config:
  encoding: {{ eq (dig "format" "text" $logs) "json" | ternary "JSON" "TEXT" }}
  log_level: {{ dig "level" "INFO" $logs }}
  enable_access_log: false
applications:
  - name: xloom
    route_prefix: null
    import_path: xloom.app:application
    args:
      {{- include "xloom.settings" . | fromJson | toYaml | nindent 6 }}
{{- end -}}

{{/* How many engine replicas a pod of a group holds. Arguments here and below: dict "root" $ "group" GROUP "index" I. */}}
{{- define "xloom.perPod" -}}
{{- if .group.routers -}}
0
{{- else -}}
{{- $replicas := dig "replicas" dict .root.Values.settings -}}
{{- $each := floor (divf (default 1 .group.cpus) (dig "cpus" 1 $replicas)) | int -}}
{{- $gpus := dig "gpus" 0 $replicas | float64 -}}
{{- if gt $gpus 0.0 }}{{ $each = min $each (floor (divf (default 0 .group.gpus) $gpus) | int) }}{{ end -}}
{{- $each -}}
{{- end -}}
{{- end -}}

{{- define "xloom.maxPods" -}}
{{- if and (kindIs "invalid" .group.maxReplicas) .group.routers -}}
{{- max (include "xloom.routers" .root | int) (default 0 .group.minReplicas | int) -}}
{{- else if kindIs "invalid" .group.maxReplicas -}}
{{- $wanted := max 1 (dig "replicas" "max" 1 .root.Values.settings | int) -}}
{{- ceil (divf $wanted (max 1 (include "xloom.perPod" . | int))) | int -}}
{{- else -}}
{{- int .group.maxReplicas -}}
{{- end -}}
{{- end -}}

{{- define "xloom.minPods" -}}
{{- if not (kindIs "invalid" .group.minReplicas) -}}
{{- int .group.minReplicas -}}
{{- else if not .root.Values.autoscaler.enabled -}}
{{- include "xloom.maxPods" . -}}
{{- else if .group.routers -}}
{{- min (include "xloom.routers" .root | int) (include "xloom.maxPods" . | int) -}}
{{- else if eq (toString .index) (include "xloom.firstEngineGroup" .root) -}}
{{- $wanted := dig "replicas" "min" 1 .root.Values.settings | int -}}
{{- $pods := ceil (divf $wanted (max 1 (include "xloom.perPod" . | int))) | int -}}
{{- min $pods (include "xloom.maxPods" . | int) -}}
{{- else -}}
0
{{- end -}}
{{- end -}}
