{{/*
The JSON patch that gives a Ray cluster which runs its groups' limits as these values have them. KubeRay 1.7 gives new limits
to new clusters alone (shouldUpdateCluster of its RayService controller compares without them). It does nothing to a cluster
of other groups.
*/}}
{{- define "xloom.limitsPatch" -}}
{{- $patch := list -}}
{{- range $index, $group := .Values.workerGroups -}}
{{- $of := dict "root" $ "group" $group "index" $index -}}
{{- $limits := dict "minReplicas" (include "xloom.minPods" $of | int) "maxReplicas" (include "xloom.maxPods" $of | int) -}}
{{- $path := printf "/spec/workerGroupSpecs/%d" $index -}}
{{- $patch = append $patch (dict "op" "test" "path" (printf "%s/groupName" $path) "value" $group.name) -}}
{{- range $field, $limit := $limits -}}
{{- $patch = append $patch (dict "op" "add" "path" (printf "%s/%s" $path $field) "value" $limit) -}}
{{- end -}}
{{- end -}}
{{- toJson $patch -}}
{{- end -}}
