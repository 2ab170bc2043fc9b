{{/* Values that can't work, each with its cure. Included by the RayService, so that nothing renders. */}}
{{- define "xloom.validate" -}}
{{- include "xloom.validate.names" . -}}
{{- include "xloom.validate.secrets" . -}}
{{- include "xloom.validate.endpoint" . -}}
{{- include "xloom.validate.sources" . -}}
{{- include "xloom.validate.times" . -}}
{{- include "xloom.validate.capacity" . -}}
{{- include "xloom.validate.storage" . -}}
{{- end -}}

{{- define "xloom.validate.names" -}}
{{- $name := include "xloom.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "The name %q is not one Kubernetes takes for a service: it must start with a lower-case letter and hold only a-z, 0-9 and -. Set fullnameOverride, or choose another release name." $name) -}}
{{- end -}}
{{- $labelled := dict "commonLabels" .Values.commonLabels "head.podLabels" .Values.head.podLabels -}}
{{- range .Values.workerGroups }}{{ $_ := set $labelled (printf "workerGroups, %s: podLabels" .name) (default dict .podLabels) }}{{ end -}}
{{- range $path, $labels := $labelled -}}
{{- range $key, $_ := $labels -}}
{{- if or (has $key (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component")) (hasPrefix "ray.io/" $key) -}}
{{- fail (printf "%s: services, policies and monitors select pods by the label %s. Choose another label." $path $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $seen := list -}}
{{- range .Values.workerGroups -}}
{{- if has .name $seen -}}
{{- fail (printf "Two worker groups are called %q. Give each entry of workerGroups a name of its own." .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- end -}}

{{- define "xloom.validate.secrets" -}}
{{- range $key, $entry := dict "api_key" "auth.apiKey" "admin_key" "auth.adminKey" -}}
{{- if dig "router" $key "" $.Values.settings -}}
{{- fail (printf "settings.router.%s would be written in clear into the RayService. Leave it out, put it in a Secret, and name that in auth.existingSecret (entry: %s)." $key $entry) -}}
{{- end -}}
{{- end -}}
{{- if dig "router" "front_end_args" "api_key" "" .Values.settings -}}
{{- fail "settings.router.front_end_args.api_key would be written in clear into the RayService. Leave it out and use auth.existingSecret." -}}
{{- end -}}
{{- if and (not .Values.auth.existingSecret) (not .Values.auth.allowAnonymous) -}}
{{- fail "The endpoint would be open to anyone who reaches it. Make a Secret (kubectl create secret generic xloom-keys --from-literal=api-key=... --from-literal=admin-key=...) and name it in auth.existingSecret, or set auth.allowAnonymous=true." -}}
{{- end -}}
{{- $ours := dict "XLOOM_API_KEY" "auth.existingSecret" "XLOOM_ADMIN_KEY" "auth.existingSecret" "HF_TOKEN" "hub.existingSecret" "RAY_AUTH_MODE" "rayAuth.mode" "RAY_AUTH_TOKEN" "rayAuth.existingSecret" "RAY_REDIS_ADDRESS" "gcsFaultTolerance.redisAddress" "REDIS_PASSWORD" "gcsFaultTolerance.existingSecret" "REDIS_USERNAME" "gcsFaultTolerance.usernameKey" -}}
{{- $lists := list .Values.extraEnv -}}
{{- range .Values.workerGroups }}{{ $lists = append $lists (default list .extraEnv) }}{{ end -}}
{{- range $list := $lists -}}
{{- range $list -}}
{{- if hasKey $ours .name -}}
{{- fail (printf "%s must not be set in extraEnv. Use %s." .name (get $ours .name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "xloom.validate.endpoint" -}}
{{- $host := dig "router" "host" "0.0.0.0" .Values.settings -}}
{{- if has $host (list "127.0.0.1" "localhost" "::1") -}}
{{- fail (printf "settings.router.host is %s, where no other pod can reach it. Leave it out: the chart sets 0.0.0.0." $host) -}}
{{- end -}}
{{- if lt (include "xloom.port" . | int) 1024 -}}
{{- fail (printf "settings.router.port is %s, which a pod without root can't listen at. Use 8000, or another above 1023." (include "xloom.port" .)) -}}
{{- end -}}
{{- if has (include "xloom.port" . | int) (list 6379 8080 8265 10001 44217 44227 52365) -}}
{{- fail (printf "settings.router.port %s is one of Ray's own ports. Use 8000, or another that is not 6379, 8080, 8265, 10001, 44217, 44227 or 52365." (include "xloom.port" .)) -}}
{{- end -}}
{{- range $field := list "type" "ports" "selector" -}}
{{- if hasKey $.Values.service.spec $field -}}
{{- fail (printf "service.spec.%s is not taken: KubeRay and the chart set it. Leave it out (service.type and settings.router.port are the chart's values)." $field) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.ingress.enabled .Values.httpRoute.enabled -}}
{{- fail "ingress.enabled and httpRoute.enabled exclude each other. Turn one of them off." -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.enabled needs a host. Set ingress.hosts, as [{host: xloom.example.com}]." -}}
{{- end -}}
{{- $paths := dict "publicPaths" .Values.publicPaths -}}
{{- range .Values.ingress.hosts }}{{ $_ := set $paths (printf "ingress.hosts, %s: paths" .host) (default list .paths) }}{{ end -}}
{{- range $path, $values := $paths -}}
{{- range $values -}}
{{- if has (trimSuffix "/" .) (list "" "/metrics") -}}
{{- fail (printf "%s: %s would let /metrics, which is answered without a key, out to everyone. List what clients need, as /v1 and /ready." $path .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs a gateway. Set httpRoute.parentRefs, as [{name: public, namespace: gateways}]." -}}
{{- end -}}
{{- if and .Values.metrics.prometheusRule.enabled (not .Values.metrics.podMonitor.enabled) -}}
{{- fail "metrics.prometheusRule needs the figures of the PodMonitor. Set metrics.podMonitor.enabled." -}}
{{- end -}}
{{- end -}}

{{- define "xloom.validate.sources" -}}
{{- $entries := list -}}
{{- with dig "model" "source" "" .Values.settings }}{{ $entries = append $entries (dict "path" "settings.model.source" "source" .) }}{{ end -}}
{{- range $kind := list "adapters" "xlora" -}}
{{- range dig $kind list $.Values.settings }}{{ $entries = append $entries (dict "path" (printf "settings.%s, %s" $kind .name) "source" .source) }}{{ end -}}
{{- end -}}
{{- range $entries -}}
{{- if regexMatch "^[.~]" .source -}}
{{- fail (printf "%s: the source %q is relative to your machine. Use a hub id, an s3:// or gs:// URL, or the absolute path of a volume (extraVolumes)." .path .source) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "xloom.validate.times" -}}
{{- if eq .Values.upgradeStrategy "NewClusterWithIncrementalUpgrade" -}}
{{- if not .Values.incrementalUpgrade.gatewayClassName -}}
{{- fail "upgradeStrategy=NewClusterWithIncrementalUpgrade needs a Gateway class. Set incrementalUpgrade.gatewayClassName." -}}
{{- end -}}
{{- if not .Values.autoscaler.enabled -}}
{{- fail "upgradeStrategy=NewClusterWithIncrementalUpgrade needs Ray's autoscaler. Set autoscaler.enabled=true, or upgradeStrategy=NewCluster." -}}
{{- end -}}
{{- end -}}
{{- $drain := include "xloom.drain" . | int -}}
{{- $grace := include "xloom.grace" . | int -}}
{{- $delay := include "xloom.deletionDelay" . | int -}}
{{- if le $grace (add $drain 15 | int) -}}
{{- fail (printf "terminationGracePeriodSeconds (%d) must be above settings.replicas.drain_timeout_s + 15 (%d), or pods are killed while they drain. Raise it, or leave it out." $grace (add $drain 15)) -}}
{{- end -}}
{{- if le $delay $grace -}}
{{- fail (printf "rayClusterDeletionDelaySeconds (%d) must be above terminationGracePeriodSeconds (%d), or an upgrade cuts off answers. Raise it, or leave it out." $delay $grace) -}}
{{- end -}}
{{- range .Values.workerGroups -}}
{{- if and (ne (toString (default "" .idleTimeoutSeconds)) "") (ne $.Values.autoscaler.version "v2") -}}
{{- fail (printf "workerGroups, %s: idleTimeoutSeconds needs autoscaler.version=v2. Set that, or use autoscaler.idleTimeoutSeconds." .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* How many engine replicas the groups can hold, against what the settings ask for. */}}
{{- define "xloom.validate.capacity" -}}
{{- $replicas := dig "replicas" dict .Values.settings -}}
{{- $wanted := max 1 (dig "max" 1 $replicas | int) -}}
{{- $cpus := dig "cpus" 1 $replicas | float64 -}}
{{- $gpus := dig "gpus" 0 $replicas | float64 -}}
{{- $tensor := dig "engine" "tensor_parallel_size" 1 .Values.settings | int -}}
{{- $routers := include "xloom.routers" . | int -}}
{{- if not .Values.workerGroups -}}
{{- fail "There is no worker group, and no replica runs on the head. Add an entry to workerGroups." -}}
{{- end -}}
{{- if and (gt $tensor 1) (gt $gpus 0.0) (ne $gpus (float64 $tensor)) -}}
{{- fail (printf "settings.engine.tensor_parallel_size is %d but settings.replicas.gpus is %v. Set settings.replicas.gpus to %d." $tensor $gpus $tensor) -}}
{{- end -}}
{{- $capacity := 0 -}}
{{- $places := 0 -}}
{{- $forRouters := include "xloom.routerGroups" . -}}
{{- if eq (include "xloom.firstEngineGroup" .) "" -}}
{{- fail "Every worker group has routers=true, so there is none for engines. Add an entry to workerGroups without it." -}}
{{- end -}}
{{- $allCpus := 0.0 -}}
{{- $mostGpus := 0.0 -}}
{{- $mostCpus := 0.0 -}}
{{- range $index, $group := .Values.workerGroups -}}
{{- with $group -}}
{{- $of := dict "root" $ "group" $group "index" $index -}}
{{- $least := include "xloom.minPods" $of | int -}}
{{- $most := include "xloom.maxPods" $of | int -}}
{{- if gt $least $most -}}
{{- fail (printf "workerGroups, %s: minReplicas (%d) is above maxReplicas (%d). Raise maxReplicas or lower minReplicas." .name $least $most) -}}
{{- end -}}
{{- $pods := $.Values.autoscaler.enabled | ternary $most $least -}}
{{- $ownCpus := default 1 .cpus | float64 -}}
{{- $ownGpus := default 0 .gpus | float64 -}}
{{- $mostGpus = maxf $mostGpus $ownGpus -}}
{{- if .routers -}}
{{- if $ownGpus }}{{ fail (printf "workerGroups, %s: routers need no GPU, and routers=true keeps engines away. Set gpus=0." .name) }}{{ end -}}
{{- if and (eq $gpus 0.0) (ge $ownCpus $cpus) }}{{ fail (printf "workerGroups, %s: engines of %v CPUs would be placed beside the routers. Lower its cpus, or leave routers out: then routers run in any group." .name $cpus) }}{{ end -}}
{{- else -}}
{{- $mostCpus = maxf $mostCpus $ownCpus -}}
{{- end -}}
{{- if or .routers (not $forRouters) }}{{ $places = add $places $pods | int }}{{ end -}}
{{- $capacity = add $capacity (mul (include "xloom.perPod" $of | int) $pods) | int -}}
{{- $allCpus = addf $allCpus (mulf $ownCpus $pods) -}}
{{- end -}}
{{- end -}}
{{- if and (gt $tensor 1) (gt (float64 $tensor) $mostGpus) (gt $gpus 0.0) -}}
{{- fail (printf "settings.engine.tensor_parallel_size is %d but no worker group has that many GPUs in a pod (most: %v). Raise workerGroups[].gpus, or lower tensor_parallel_size and settings.replicas.gpus." $tensor $mostGpus) -}}
{{- end -}}
{{- if and (gt $tensor 1) (eq $gpus 0.0) (gt $mostGpus 0.0) -}}
{{- fail (printf "settings.engine.tensor_parallel_size is %d but settings.replicas.gpus is 0: the engine would see no GPU. Set settings.replicas.gpus to %d." $tensor $tensor) -}}
{{- end -}}
{{- if gt $gpus $mostGpus -}}
{{- fail (printf "settings.replicas.gpus is %v but no worker group has that many GPUs in a pod (most: %v). Raise workerGroups[].gpus, or lower settings.replicas.gpus." $gpus $mostGpus) -}}
{{- end -}}
{{- if gt $cpus $mostCpus -}}
{{- fail (printf "settings.replicas.cpus is %v but no worker group has that many CPUs in a pod (most: %v). Raise workerGroups[].cpus, or lower settings.replicas.cpus." $cpus $mostCpus) -}}
{{- end -}}
{{- if gt $routers (max 1 $places) -}}
{{- fail (printf "settings.router.replicas is %d, one for a pod, and there are %d pods at most for routers. Raise workerGroups[].maxReplicas, or lower settings.router.replicas." $routers $places) -}}
{{- end -}}
{{- if gt $wanted $capacity -}}
{{- fail (printf "settings.replicas.max is %d but the worker groups can hold %d replicas of %v CPUs and %v GPUs. Raise workerGroups[].%s, or lower settings.replicas.max." $wanted $capacity $cpus $gpus (.Values.autoscaler.enabled | ternary "maxReplicas" "minReplicas (autoscaler.enabled is false)")) -}}
{{- end -}}
{{- $needed := addf (mulf $cpus $wanted) (mulf 0.1 $routers) -}}
{{- if gt $needed $allCpus -}}
{{- fail (printf "%d replicas of %v CPUs and %d routers of 0.1 need %v CPUs, and the worker groups have %v. Raise workerGroups[].cpus or maxReplicas: routers run there too." $wanted $cpus $routers $needed $allCpus) -}}
{{- end -}}
{{- end -}}

{{- define "xloom.validate.storage" -}}
{{- $cache := .Values.persistence.cache -}}
{{- $store := .Values.persistence.store -}}
{{- if and (eq $cache.type "claim") (not $cache.existingClaim) (not (has "ReadWriteMany" $cache.accessModes)) -}}
{{- fail "persistence.cache is one volume for the head and all workers, so its accessModes must have ReadWriteMany. Set that with a storage class that can, or persistence.cache.type=ephemeral or none." -}}
{{- end -}}
{{- $path := dig "store" "path" "/var/lib/xloom/store" .Values.settings -}}
{{- if and $store.enabled (not (hasPrefix "/var/lib/xloom/" $path)) -}}
{{- fail (printf "settings.store.path is %s, which is not on the store's volume. Leave it out, use a folder below /var/lib/xloom, or set persistence.store.enabled=false." $path) -}}
{{- end -}}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) -}}
{{- fail "gcsFaultTolerance.enabled needs a Redis outside the cluster's pods. Set gcsFaultTolerance.redisAddress, as redis:6379." -}}
{{- end -}}
{{- $least := include "xloom.minAvailable" . | int -}}
{{- if and .Values.podDisruptionBudget.enabled (or (lt $least 1) (ge $least (include "xloom.routers" . | int))) -}}
{{- fail (printf "podDisruptionBudget keeps at least one router, and lets another go: %s can't do both with minAvailable %d. Raise settings.router.replicas, or lower minAvailable." (include "xloom.routers" .) $least) -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (or (not .Values.serviceAccount.headName) (not .Values.serviceAccount.workerName)) -}}
{{- fail "serviceAccount.create is false. Name the accounts that exist in serviceAccount.headName and serviceAccount.workerName." -}}
{{- end -}}
{{- end -}}
