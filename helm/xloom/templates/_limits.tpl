{{/*
The JSON patch that gives a Ray cluster which runs its groups' limits as these values have them; empty: it has them. KubeRay
1.7 gives new limits to new clusters alone (shouldUpdateCluster of its RayService controller compares without them).
Arguments: dict "root" $ "there" CLUSTER.
*/}}
{{- define "xloom.limitsPatch" -}}
{{- $patch := list -}}
{{- $there := dig "spec" "workerGroupSpecs" list .there -}}
{{- range $index, $group := .root.Values.workerGroups -}}
{{- if lt $index (len $there) -}}
{{- $found := index $there $index -}}
{{- $of := dict "root" $.root "group" $group "index" $index -}}
{{- $wanted := dict "minReplicas" (include "xloom.minPods" $of | int) "maxReplicas" (include "xloom.maxPods" $of | int) -}}
{{- range $field := list "minReplicas" "maxReplicas" -}}
{{- if and (eq $found.groupName $group.name) (ne (get $found $field | int) (get $wanted $field)) -}}
{{- $path := printf "/spec/workerGroupSpecs/%d/%s" $index $field -}}
{{- $patch = append $patch (dict "op" "add" "path" $path "value" (get $wanted $field)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with $patch }}{{ toJson . }}{{ end -}}
{{- end -}}
