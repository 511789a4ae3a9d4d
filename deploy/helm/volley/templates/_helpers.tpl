{{/* Names begin with the release's, so that two clusters fit into a namespace. */}}
{{- define "volley.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels by which pods are found: (root, role). */}}
{{- define "volley.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: volley
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Where a pod may run: the values of its role. */}}
{{- define "volley.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "volley.volumes" -}}
{{- $root := index . 0 -}}
- {name: config, configMap: {name: {{ include "volley.name" $root }}}}
- {name: certificates, secret: {secretName: {{ index . 1 }}, defaultMode: 0440}}
- {name: models, persistentVolumeClaim: {claimName: {{ $root.Values.model.claim }}, readOnly: true}}
{{- end -}}

{{/* What all containers have in common. */}}
{{- define "volley.mounts" -}}
- {name: config, mountPath: /etc/volley}
- {name: certificates, mountPath: /certificates, readOnly: true}
- {name: models, mountPath: /models, readOnly: true}
{{- end -}}

{{- define "volley.env" -}}
{{- range $name, $value := .Values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{/* The template of a worker's pod: (root, role, the label with its index). */}}
{{- define "volley.worker" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $root.Values $role -}}
metadata:
  labels: {{- include "volley.labels" (list $root $role) | nindent 4 }}
  annotations:
    # Workers compare their settings when they join: all get new ones together.
    checksum/config: {{ include (print $root.Template.BasePath "/configmap.yaml") $root | sha256sum }}
spec:
  terminationGracePeriodSeconds: 60
  # The image's user; certificates are readable for its group.
  securityContext: {runAsNonRoot: true, runAsUser: 65532, fsGroup: 65532}
  {{- include "volley.placement" $values | nindent 2 }}
  # Over nodes where there are enough: with two holders of each expert, a node may then be lost.
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{- include "volley.labels" (list $root $role) | nindent 10 }}
  containers:
    - name: volley
      image: "{{ $root.Values.image.repository }}:{{ $root.Values.image.tag }}"
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args: [worker, {{ $role }}, --config, /etc/volley/volley.toml, --status, "0.0.0.0:9100"]
      env:
        - name: VOLLEY_WORKER_INDEX
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['{{ index . 2 }}']"}}
        {{- include "volley.env" $root | nindent 8 }}
      ports:
        - {name: status, containerPort: 9100}
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      readinessProbe:
        httpGet: {path: /readyz, port: status}
        periodSeconds: 5
      livenessProbe:
        httpGet: {path: /livez, port: status}
        periodSeconds: 10
        initialDelaySeconds: 10
      resources: {{- toYaml $values.resources | nindent 8 }}
      volumeMounts: {{- include "volley.mounts" $root | nindent 8 }}
  volumes: {{- include "volley.volumes" (list $root $root.Values.certificates.workerSecret) | nindent 4 }}
{{- end -}}
