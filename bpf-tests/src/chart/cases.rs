//! Values, and what must come of them.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::helm::Rendered;

/// Values that render.
pub(super) struct Good {
    /// JSON; `apiServer` is added where it is not there.
    pub(super) values: &'static str,
    /// Parts of what is rendered.
    pub(super) has: &'static [&'static str],
    /// What must not be in its objects.
    pub(super) lacks: &'static [&'static str],
}

/// Values that are refused.
pub(super) struct Bad {
    values: &'static str,
    /// Part of the message.
    says: &'static str,
}

impl Good {
    pub(super) fn values(&self) -> Result<Value> {
        let mut values: Value = serde_json::from_str(self.values).context(self.values)?;
        if values.get("apiServer").is_none() {
            values["apiServer"] = json!(["https://10.0.0.1:6443"]);
        }
        Ok(values)
    }
}

impl Bad {
    pub(super) fn values(&self) -> Result<Value> {
        serde_json::from_str(self.values).context(self.values)
    }

    pub(super) fn fault(&self, rendered: &Rendered) -> Option<String> {
        let error = rendered.error();
        if error.is_empty() {
            return Some(format!("values `{}` are not refused", self.values));
        }
        (!error.contains(self.says))
            .then(|| format!("values `{}`: `{}` is not in: {error}", self.values, self.says))
    }
}

/// The first is what the chart is linted with.
#[rustfmt::skip]
pub(super) const GOOD: &[Good] = &[
    Good { values: "{}", has: &["--api-server=https://10.0.0.1:6443", "image: localhost/ferroflow:0.1.0", "- --cni\n", "--pod-device=veth",
        "--socket-lb=tcp", "--xdp=off", "--metrics-port=10249", "--metrics-address=127.0.0.1", "mountPropagation: Bidirectional", "operator: Exists", "maxUnavailable: 1\n", "/ferroflow cleanup --all", "--bpffs=/host/sys/fs/bpf/ferroflow"],
        lacks: &["--log-drops", "--masquerade", "--service-cidr", "--node-port-addresses", "[patch]",
            "imagePullSecrets", "affinity:", "annotations:", "PodMonitor", "ServiceMonitor", "name: metrics"] },
    Good { values: EVERYTHING, has: &["--service-cidr=10.96.0.0/12,fd00:10:96::/112", "name: registry-key",
        "image: registry.example:5000/net/ferroflow:v9", "imagePullPolicy: Always", "--node-port-addresses=10.0.0.0/8,fd00::/8",
        "--socket-lb=all", "--xdp=best-effort", "--attach=clsact", "--external-ips=serve", "--load-balancer-mode=dsr", "--masquerade-all",
        "--live-flows=cut", "--masquerade=off", "--non-masquerade-cidrs=10.0.0.0/8,fd00::/8",
        "--max-endpoints=4194304", "--log-drops", "value: debug,", "path: /usr/lib/cni", "path: /etc/cni/other", "path: /bpf",
        "--cni-conf-name=00-ferroflow.conflist", "--routing=native", "--pod-device=netkit", "path: /sys/fs/cgroup/unified", "--startup-taint=example.com/network", "resources: [nodes/status]",
        "resources: [nodes]", "--set-network-available", "maxUnavailable: 25%", "memory: 1Gi", "example.com/pool: net",
        "key: only", "nodeAffinity:", "example.com/note: \"1\"", "k8s-app: kube-proxy", "--metrics-port=9249", "--metrics-address=::",
        "kind: PodMonitor", "kind: ServiceMonitor", "{name: metrics, port: 9249, targetPort: metrics, protocol: TCP}",
        "{name: metrics, containerPort: 9249, protocol: TCP}"], lacks: &["operator: Exists"] },
    Good { values: r#"{"apiServer": ["https://[fd00::1]:6443", "[fd00::2]:6443"], "serviceCIDR": ["fd00:10:96::/112"],
        "nodePortAddresses": ["fd00::/8"]}"#, has: &["--api-server=https://[fd00::1]:6443,[fd00::2]:6443",
        "--node-port-addresses=fd00::/8"], lacks: &["10.0.0.1"] },
    Good { values: r#"{"nodeSelector": {"kubernetes.io/arch": "arm64"}, "nodePortAddresses": ["all"]}"#,
        has: &["kubernetes.io/arch: arm64", "kubernetes.io/os: linux", "--node-port-addresses=all"], lacks: &["masquerade"] },
    Good { values: r#"{"cni": {"enabled": false}}"#, has: &["--socket-lb=tcp"],
        lacks: &["--cni", "/opt/cni", "/etc/cni", "/var/lib/ferroflow", "--state-dir", "/run/netns"] },
    Good { values: r#"{"host": {"mountBpffs": false}}"#, has: &["allowPrivilegeEscalation: false", "drop: [ALL]"],
        lacks: &["privileged: true", "Bidirectional"] },
    Good { values: r#"{"socketLb": "off", "xdp": "native", "attach": "tcx", "maxEndpoints": 1024}"#,
        has: &["--socket-lb=off", "--xdp=native", "--attach=tcx", "--max-endpoints=1024"], lacks: &[] },
    Good { values: r#"{"image": {"tag":
        "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}}"#,
        has: &["image: localhost/ferroflow@sha256:0123"], lacks: &["ferroflow:@"] },
];

const EVERYTHING: &str = r#"{
    "image": {"repository": "registry.example:5000/net/ferroflow", "tag": "v9", "pullPolicy": "Always",
        "pullSecrets": [{"name": "registry-key"}]},
    "apiServer": ["https://10.0.0.1:6443", "https://api.example:6443", "10.0.0.3"],
    "cni": {"enabled": true, "binDir": "/usr/lib/cni", "confDir": "/etc/cni/other", "confName": "00-ferroflow.conflist",
        "routing": "native", "podDevice": "netkit"},
    "socketLb": "all", "xdp": "best-effort", "attach": "clsact",
    "nodePortAddresses": ["10.0.0.0/8", "fd00::/8"], "serviceCIDR": ["10.96.0.0/12", "fd00:10:96::/112"],
    "externalIPs": "serve", "loadBalancerMode": "dsr", "masquerade": "off", "nonMasqueradeCIDRs": ["10.0.0.0/8", "fd00::/8"], "masqueradeAll": true, "maxEndpoints": 4194304, "liveFlows": "cut", "logDrops": true, "logLevel": "debug",
    "metrics": {"port": 9249, "address": "::", "podMonitor": true, "serviceMonitor": true},
    "startupTaint": "example.com/network", "setNetworkAvailable": true,
    "host": {"bpffs": "/bpf", "mountBpffs": true, "cgroup": "/sys/fs/cgroup/unified"},
    "maxUnavailable": "25%",
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    "nodeSelector": {"example.com/pool": "net"},
    "tolerations": [{"key": "only", "operator": "Equal", "value": "this", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64", "arm64"]}]}]}}},
    "podAnnotations": {"example.com/note": "1"}, "podLabels": {"k8s-app": "kube-proxy"}
}"#;

#[rustfmt::skip]
pub(super) const BAD: &[Bad] = &[
    Bad { values: "{}", says: "apiServer is empty, and there is no cluster here to ask: name the API servers' own addresses" },
    Bad { values: r#"{"apiServer": "https://10.0.0.1:6443"}"#, says: "at '/apiServer': got string, want array" },
    Bad { values: r#"{"apiServer": ["https://10.0.0.1:6443/path"]}"#, says: "at '/apiServer/0': 'https://10.0.0.1:6443/path'" },
    Bad { values: r#"{"apiServer": ["fd00::1"]}"#, says: "at '/apiServer/0': 'fd00::1'" },
    Bad { values: r#"{"socketLB": "tcp"}"#, says: "additional properties 'socketLB' not allowed" },
    Bad { values: r#"{"cni": {"enable": true}}"#, says: "at '/cni': additional properties 'enable' not allowed" },
    Bad { values: r#"{"cni": {"routing": "bgp"}}"#, says: "at '/cni/routing': value must be one of 'vxlan', 'native', 'none'" },
    Bad { values: r#"{"cni": {"podDevice": "ipvlan"}}"#, says: "at '/cni/podDevice': value must be one of 'veth', 'netkit', 'auto'" },
    Bad { values: r#"{"cni": {"enabled": "yes"}}"#, says: "at '/cni/enabled': got string, want boolean" },
    Bad { values: r#"{"cni": {"confName": "ferroflow.conf"}}"#, says: "at '/cni/confName'" },
    Bad { values: r#"{"cni": {"binDir": "opt/cni/bin"}}"#, says: "at '/cni/binDir'" },
    Bad { values: r#"{"socketLb": "udp"}"#, says: "at '/socketLb': value must be one of 'tcp', 'all', 'off'" },
    Bad { values: r#"{"xdp": false}"#, says: "at '/xdp': value must be one of 'off', 'native', 'best-effort'" },
    Bad { values: r#"{"attach": "xdp"}"#, says: "at '/attach': value must be one of 'auto', 'tcx', 'clsact'" },
    Bad { values: r#"{"externalIPs": true}"#, says: "at '/externalIPs': value must be one of 'ignore', 'serve'" },
    Bad { values: r#"{"maxEndpoints": 100}"#, says: "at '/maxEndpoints': minimum: got 100, want 1,024" },
    Bad { values: r#"{"nodePortAddresses": ["all", "10.0.0.0/8"]}"#, says: "at '/nodePortAddresses'" },
    Bad { values: r#"{"nodePortAddresses": ["10.0.0.1"]}"#, says: "'10.0.0.1' does not match" },
    Bad { values: r#"{"liveFlows": "drop"}"#, says: "at '/liveFlows': value must be one of 'finish', 'cut'" },
    Bad { values: r#"{"masquerade": true}"#, says: "at '/masquerade': value must be one of" },
    Bad { values: r#"{"nonMasqueradeCIDRs": ["10.96.0.0"]}"#, says: "at '/nonMasqueradeCIDRs/0'" },
    Bad { values: r#"{"serviceCIDR": ["10.96.0.0"]}"#, says: "at '/serviceCIDR/0'" },
    Bad { values: r#"{"maxUnavailable": 0}"#, says: "at '/maxUnavailable'" },
    Bad { values: r#"{"maxUnavailable": "101%"}"#, says: "at '/maxUnavailable'" },
    Bad { values: r#"{"image": {"repository": ""}}"#, says: "at '/image/repository'" },
    Bad { values: r#"{"image": {"pullPolicy": "Sometimes"}}"#, says: "at '/image/pullPolicy': value must be one of" },
    Bad { values: r#"{"logLevel": "verbose"}"#, says: "at '/logLevel': value must be one of" },
    Bad { values: r#"{"metrics": {"port": 70000}}"#, says: "at '/metrics/port'" },
    Bad { values: r#"{"apiServer": ["10.0.0.1"], "metrics": {"podMonitor": true}}"#, says: "metrics.podMonitor: Prometheus does not reach" },
    Bad { values: r#"{"apiServer": ["10.0.0.1"], "metrics": {"serviceMonitor": true}}"#, says: "metrics.serviceMonitor: Prometheus does not reach" },
    Bad { values: r#"{"podLabels": {"app.kubernetes.io/name": "other"}}"#, says: "invalid propertyName 'app.kubernetes.io/name'" },
    Bad { values: r#"{"nodeSelector": {"a": true}}"#, says: "at '/nodeSelector/a': got boolean, want string" },
];
