{{- define "aurora.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that select the pods of the release. */}}
{{- define "aurora.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "aurora.labels" -}}
{{ include "aurora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Name, namespace and labels of an object. Takes the root and the object's component, empty for objects of all. */}}
{{- define "aurora.metadata" -}}
{{- $component := .component | default "" -}}
name: {{ include "aurora.fullname" .root }}{{ if $component }}-{{ $component }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "aurora.labels" .root | nindent 2 }}
  {{- if $component }}
  app.kubernetes.io/component: {{ $component }}
  {{- end }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "aurora.componentSelector" -}}
{{ include "aurora.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Image of a component. Takes the root and the image's name in .Values.images. */}}
{{- define "aurora.image" -}}
{{- $images := .root.Values.images -}}
{{- $name := get $images .image -}}
{{- if not (regexMatch "[:@]" $name) -}}
{{- $name = printf "%s:%s" $name (default .root.Chart.AppVersion $images.tag) -}}
{{- end -}}
{{- empty $images.registry | ternary $name (printf "%s/%s" $images.registry $name) -}}
{{- end -}}

{{/* Name of the Secret that a component uses for a service: its own, or that of all. */}}
{{- define "aurora.secret" -}}
{{- get .service.secrets .component | default .service.secret -}}
{{- end -}}

{{- define "aurora.secretVariable" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
{{- end -}}

{{/* Credentials as variables. Takes the root, the component, and the services that it uses. */}}
{{- define "aurora.credentials" -}}
{{- $values := .root.Values -}}
{{- if has "kafka" .services -}}
{{- $kafka := $values.kafka -}}
{{- $secret := include "aurora.secret" (dict "service" $kafka.sasl "component" .component) -}}
{{- if and $kafka.sasl.mechanism (not $secret) -}}
{{- fail (printf "kafka.sasl.secret: kafka.sasl.mechanism is %s, and no Secret has the password of %s" $kafka.sasl.mechanism .component) -}}
{{- end -}}
{{- if and $secret (not $kafka.sasl.mechanism) -}}
{{- fail "kafka.sasl.mechanism: kafka.sasl.secret needs one, such as SCRAM-SHA-512" -}}
{{- end -}}
{{- if and (or $kafka.tls.caSecret $kafka.tls.clientSecret) (not $kafka.tls.enabled) -}}
{{- fail "kafka.tls.enabled: kafka.tls.caSecret and kafka.tls.clientSecret need it" -}}
{{- end -}}
{{- with include "aurora.secret" (dict "service" $values.kafka.sasl "component" .component) }}
{{- if $values.kafka.sasl.usernameKey }}
{{ include "aurora.secretVariable" (dict "name" "AURORA_KAFKA__CLIENT_OPTIONS__SASL.USERNAME" "secret" . "key" $values.kafka.sasl.usernameKey) }}
{{- else }}
- {name: AURORA_KAFKA__CLIENT_OPTIONS__SASL.USERNAME, value: {{ . | quote }}}
{{- end }}
{{ include "aurora.secretVariable" (dict "name" "AURORA_KAFKA__CLIENT_OPTIONS__SASL.PASSWORD" "secret" . "key" $values.kafka.sasl.passwordKey) }}
{{- end }}
{{- end }}
{{- if has "mlflow" .services -}}
{{- with include "aurora.secret" (dict "service" $values.mlflow "component" .component) }}
{{ include "aurora.secretVariable" (dict "name" "AURORA_REGISTRY__USERNAME" "secret" . "key" $values.mlflow.usernameKey) }}
{{ include "aurora.secretVariable" (dict "name" "AURORA_REGISTRY__PASSWORD" "secret" . "key" $values.mlflow.passwordKey) }}
{{- end }}
{{- end }}
{{- if has "s3" .services -}}
{{- with include "aurora.secret" (dict "service" $values.s3 "component" .component) }}
{{ include "aurora.secretVariable" (dict "name" "AWS_ACCESS_KEY_ID" "secret" . "key" $values.s3.accessKeyIdKey) }}
{{ include "aurora.secretVariable" (dict "name" "AWS_SECRET_ACCESS_KEY" "secret" . "key" $values.s3.secretAccessKeyKey) }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
The pod of a component, from `metadata` on. Takes
  root, component: it has a block of this name in the values
  image: name in .Values.images
  args: arguments of the command aurora, without --config
  services: kafka, mlflow, s3
  settings: name of the ConfigMap with aurora.toml
  serviceAccount: empty for the namespace's own
  grace: seconds between SIGTERM and SIGKILL
  resources: empty for those of the values
  limits: further limits
  ports, probes, env, volumes, volumeMounts, restartPolicy: of the pod, beside what every pod has
  keepsData: whether the volumes have one named data
  spread: whether pods spread over nodes and zones
*/}}
{{- define "aurora.pod" -}}
{{- $root := .root -}}
{{- $values := index .root.Values .component -}}
metadata:
  labels:
    {{- include "aurora.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/settings: {{ include "aurora.toml" $root | sha256sum }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- with .serviceAccount }}
  serviceAccountName: {{ . }}
  {{- end }}
  automountServiceAccountToken: false
  # A Service named aurora-serve would set variables such as AURORA_SERVE_PORT.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .grace }}
  {{- with .restartPolicy }}
  restartPolicy: {{ . }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $root.Values.images.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .spread }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "aurora.componentSelector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "aurora.image" (dict "root" $root "image" .image) }}
      imagePullPolicy: {{ $root.Values.images.pullPolicy }}
      args:
        {{- toYaml .args | nindent 8 }}
      env:
        {{- range $name, $value := $root.Values.env }}
        - {name: {{ $name }}, value: {{ $value | quote }}}
        {{- end }}
        - {name: HOME, value: /var/lib/aurora}
        {{- include "aurora.credentials" . | trim | nindent 8 }}
        {{- with .env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .ports }}
      ports:
        {{- range $name, $port := . }}
        - {name: {{ $name }}, containerPort: {{ $port }}}
        {{- end }}
      {{- end }}
      {{- with .probes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      resources:
        {{- $resources := .resources | default $values.resources }}
        {{- toYaml (merge (dict "limits" (.limits | default dict)) $resources) | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: settings, mountPath: /etc/aurora/settings, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: data, mountPath: /var/lib/aurora}
        {{- if and $root.Values.kafka.tls.caSecret (has "kafka" .services) }}
        - {name: kafka-ca, mountPath: /etc/aurora/kafka-ca, readOnly: true}
        {{- end }}
        {{- if and $root.Values.kafka.tls.clientSecret (has "kafka" .services) }}
        - {name: kafka-client, mountPath: /etc/aurora/kafka-client, readOnly: true}
        {{- end }}
        {{- with .volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {name: settings, configMap: {name: {{ .settings }}}}
    - {name: tmp, emptyDir: {}}
    {{- if not .keepsData }}
    - {name: data, emptyDir: {}}
    {{- end }}
    {{- if and $root.Values.kafka.tls.caSecret (has "kafka" .services) }}
    - {name: kafka-ca, secret: {secretName: {{ $root.Values.kafka.tls.caSecret }}}}
    {{- end }}
    {{- if and $root.Values.kafka.tls.clientSecret (has "kafka" .services) }}
    - {name: kafka-client, secret: {secretName: {{ $root.Values.kafka.tls.clientSecret }}}}
    {{- end }}
    {{- with .volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "aurora.args" -}}
{{- /* --config belongs to the last word of the command, before its other options. */ -}}
{{- toJson (concat . (list "--config" "/etc/aurora/settings/aurora.toml")) -}}
{{- end -}}

{{/* A probe by HTTP on a port named http. */}}
{{- define "aurora.probe" -}}
{{- toJson (dict "httpGet" (dict "path" .path "port" "http") "periodSeconds" .period "timeoutSeconds" 5 "failureThreshold" .failures) -}}
{{- end -}}

{{- define "aurora.probes" -}}
{{- $startup := include "aurora.probe" (dict "path" .live "period" 5 "failures" (div (add .startup 4) 5)) | fromJson -}}
{{- $live := include "aurora.probe" (dict "path" .live "period" 20 "failures" 3) | fromJson -}}
{{- $probes := dict "startupProbe" $startup "livenessProbe" $live -}}
{{- with .ready -}}
{{- $_ := set $probes "readinessProbe" (include "aurora.probe" (dict "path" . "period" 5 "failures" 2) | fromJson) -}}
{{- end -}}
{{- toJson $probes -}}
{{- end -}}

{{- define "aurora.modelsVolume" -}}
{{- $source := .Values.models.volume | default (dict "persistentVolumeClaim" (dict "claimName" .Values.models.claim "readOnly" true)) -}}
{{- toJson (merge (dict "name" "models") $source) -}}
{{- end -}}
