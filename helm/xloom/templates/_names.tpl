{{/* Name of the RayService and the stem of all other names. KubeRay takes at most 47 characters. */}}
{{- define "xloom.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 47 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The service that KubeRay makes for the endpoint (GenerateServeServiceName, KubeRay 1.7). */}}
{{- define "xloom.service" -}}
{{ include "xloom.fullname" . }}-serve-svc
{{- end -}}

{{- define "xloom.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What selects pods. Not by name: KubeRay's own services select pods that are called `kuberay`, as it labels them. */}}
{{- define "xloom.podSelector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "xloom.labels" -}}
{{- include "xloom.labelsWith" (dict "root" . "more" dict) -}}
{{- end -}}

{{/* All labels of an object, the user's over the chart's. Arguments: dict "root" $ "more" LABELS. */}}
{{- define "xloom.labelsWith" -}}
{{- $labels := include "xloom.selectorLabels" .root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/version" (.root.Chart.AppVersion | replace "+" "_" | trunc 63) -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") -}}
{{- mergeOverwrite $labels (deepCopy .root.Values.commonLabels) (deepCopy .more) | toYaml -}}
{{- end -}}

{{/*
A list of mappings as YAML, in which those of `over` take the place of those of `base` that have the same `key`: the API
server refuses two. Arguments: dict "key" KEY "base" LIST "over" LIST.
*/}}
{{- define "xloom.overlaid" -}}
{{- $key := .key -}}
{{- $last := dict -}}
{{- $order := list -}}
{{- range concat .base .over -}}
{{- $id := get . $key -}}
{{- if not (hasKey $last $id) }}{{ $order = append $order $id }}{{ end -}}
{{- $_ := set $last $id . -}}
{{- end -}}
{{- $found := list -}}
{{- range $order }}{{ $found = append $found (get $last .) }}{{ end -}}
{{- toYaml $found -}}
{{- end -}}

{{- define "xloom.headServiceAccount" -}}
{{- default (printf "%s-head" (include "xloom.fullname" .)) .Values.serviceAccount.headName -}}
{{- end -}}

{{- define "xloom.workerServiceAccount" -}}
{{- default (printf "%s-worker" (include "xloom.fullname" .)) .Values.serviceAccount.workerName -}}
{{- end -}}

{{/* Which image: for GPUs where a group has some. */}}
{{- define "xloom.variant" -}}
{{- $variant := "cpu" -}}
{{- range .Values.workerGroups }}{{ if gt (int (default 0 .gpus)) 0 }}{{ $variant = "cuda" }}{{ end }}{{ end -}}
{{- $variant -}}
{{- end -}}

{{- define "xloom.image" -}}
{{- $tag := printf "%s-%s" .Chart.AppVersion (include "xloom.variant" .) -}}
{{- printf "%s:%s" .Values.image.repository (default $tag .Values.image.tag) -}}
{{- end -}}

{{- define "xloom.cacheClaim" -}}
{{- default (printf "%s-cache" (include "xloom.fullname" .)) .Values.persistence.cache.existingClaim -}}
{{- end -}}

{{- define "xloom.storeClaim" -}}
{{- default (printf "%s-store" (include "xloom.fullname" .)) .Values.persistence.store.existingClaim -}}
{{- end -}}
