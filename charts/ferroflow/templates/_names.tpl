{{- define "ferroflow.labels" -}}
app.kubernetes.io/name: ferroflow
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "ferroflow.selector" -}}
app.kubernetes.io/name: ferroflow
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ferroflow.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- .Values.image.repository }}{{ if not (hasPrefix "@" $tag) }}:{{ end }}{{ $tag }}
{{- end }}

{{- /*
The API servers, separated by commas: those of the values, or those that the cluster lists behind its own Service.
*/ -}}
{{- define "ferroflow.apiServer" -}}
{{- $servers := .Values.apiServer -}}
{{- if not $servers -}}
{{- $slice := lookup "discovery.k8s.io/v1" "EndpointSlice" "default" "kubernetes" -}}
{{- range $endpoint := ($slice.endpoints | default list) -}}
{{- range $address := $endpoint.addresses -}}
{{- $host := ternary (printf "[%s]" $address) $address (contains ":" $address) -}}
{{- $servers = append $servers (printf "https://%s:%d" $host (int (index $slice.ports 0).port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $servers -}}
{{- fail "apiServer is empty, and there is no cluster here to ask: name the API servers' own addresses, such as --set 'apiServer={https://10.0.0.1:6443}'. The address of the Service `kubernetes` does not work, since nobody serves it before the agent runs." -}}
{{- end -}}
{{- join "," $servers -}}
{{- end }}

{{- /*
Fails where Prometheus would not reach what the value with this key is about.
*/ -}}
{{- define "ferroflow.scrapable" -}}
{{- if or (not (int .metrics.port)) (hasPrefix "127." .metrics.address) (eq "::1" .metrics.address) -}}
{{- fail (printf "%s: Prometheus does not reach the metrics: set metrics.port, and metrics.address to an address of the node, 0.0.0.0 or ::" .key) -}}
{{- end -}}
{{- end }}
