{{/* The settings of all processes: what the chart computes, overridden by .Values.settings. Returns JSON. */}}
{{- define "aurora.settings" -}}
{{- $client := dict -}}
{{- with .Values.kafka.sasl.mechanism -}}
{{- $_ := set $client "sasl.mechanism" . -}}
{{- end -}}
{{- $protocol := ternary "SASL_" "" (ne .Values.kafka.sasl.mechanism "") -}}
{{- $protocol = printf "%s%s" $protocol (ternary "SSL" "PLAINTEXT" .Values.kafka.tls.enabled) -}}
{{- if ne $protocol "PLAINTEXT" -}}
{{- $_ := set $client "security.protocol" $protocol -}}
{{- end -}}
{{- if .Values.kafka.tls.caSecret -}}
{{- $_ := set $client "ssl.ca.location" (printf "/etc/aurora/kafka-ca/%s" .Values.kafka.tls.caKey) -}}
{{- end -}}
{{- if .Values.kafka.tls.clientSecret -}}
{{- $_ := set $client "ssl.certificate.location" (printf "/etc/aurora/kafka-client/%s" .Values.kafka.tls.certificateKey) -}}
{{- $_ := set $client "ssl.key.location" (printf "/etc/aurora/kafka-client/%s" .Values.kafka.tls.privateKeyKey) -}}
{{- end -}}
{{- $store := dict -}}
{{- with .Values.s3.region -}}
{{- $_ := set $store "AWS_REGION" . -}}
{{- end -}}
{{- with .Values.s3.endpoint -}}
{{- $_ := set $store "AWS_ENDPOINT_URL" . -}}
{{- if hasPrefix "http://" . -}}
{{- $_ := set $store "AWS_ALLOW_HTTP" "true" -}}
{{- end -}}
{{- end -}}
{{- /* A pod that ends leaves the endpoints of its Service at once, but proxies hear of it later: serve.drain_delay. */ -}}
{{- $serve := dict "host" "0.0.0.0" "engine" .Values.serve.engine "port" 8000 "admin_port" 8002 "drain_delay" 15 "drain_timeout" 300 -}}
{{- if .Values.serve.adminSecret -}}
{{- $_ := set $serve "admin_tokens_file" "/etc/aurora/admin/tokens" -}}
{{- end -}}
{{- if .Values.serve.apiKeysSecret -}}
{{- $_ := set $serve "api_keys_file" "/etc/aurora/api-keys/keys" -}}
{{- end -}}
{{- $tables := dict "uri" .Values.s3.tables "storage_options" $store -}}
{{- if .Values.maintenance.enabled -}}
{{- $_ := set $tables "maintenance_interval" "365d" -}}
{{- end -}}
{{- $computed := dict
  "kafka" (dict "bootstrap_servers" .Values.kafka.bootstrapServers "partitions" 8 "replication_factor" 3 "client_options" $client)
  "registry" (dict "tracking_uri" .Values.mlflow.trackingUri)
  "tables" $tables
  "target" (dict "path" (printf "/models/%s" .Values.models.target) "served_model_name" .Values.models.target "fingerprint_cache" "/var/lib/aurora/fingerprints.json")
  "serve" $serve
  "sglang" (dict "draft_dir" "/var/lib/aurora/drafts")
  "vllm" (dict "draft_dir" "/var/lib/aurora/drafts")
  "stream" (dict "host" "0.0.0.0" "port" 16066 "data_dir" "/var/lib/aurora/stream" "session_timeout" 60)
  "train" (dict "host" "0.0.0.0" "port" 16067 "checkpoint_dir" "/var/lib/aurora/train" "spill_dir" "/var/spill")
  "promoter" (dict "host" "0.0.0.0" "port" 16068)
  "stack" (dict "data_dir" "/var/lib/aurora")
-}}
{{- mergeOverwrite $computed (deepCopy .Values.settings) | toJson -}}
{{- end -}}

{{/* Helm reads every number as a float; whole ones are written without a fraction. */}}
{{- define "aurora.toml" -}}
{{- regexReplaceAll "(?m) = (-?[0-9]+)\\.0$" (include "aurora.settings" . | fromJson | toToml) " = ${1}" | trim -}}
{{- end -}}

{{/* A duration of the settings in whole seconds, rounded up: a number, or a number with a unit. */}}
{{- define "aurora.seconds" -}}
{{- $text := toString . | trim -}}
{{- $units := dict "" 1.0 "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0 -}}
{{- mulf (regexFind "^[0-9.]+(e[+-]?[0-9]+)?" $text | float64) (get $units (regexFind "(ms|s|m|h|d)$" $text)) | ceil | int64 -}}
{{- end -}}
