//! What the CNI specification (1.1.0, and the versions since 0.3.1) says goes in and out.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ipam::Owner;

/// The versions of the specification that are spoken, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub const NEWEST: Self = Self::V1_1_0;

    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }
}

/// Codes of the specification's section 3, "Error"; from 100 on they are a plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Code(pub u32);

impl Code {
    pub const INCOMPATIBLE_VERSION: Self = Self(1);
    pub const UNKNOWN_CONTAINER: Self = Self(3);
    pub const INVALID_ENVIRONMENT: Self = Self(4);
    pub const IO: Self = Self(5);
    pub const DECODING: Self = Self(6);
    pub const INVALID_CONFIG: Self = Self(7);
    pub const TRY_AGAIN_LATER: Self = Self(11);
    pub const NOT_AVAILABLE: Self = Self(50);
    /// The kernel refused something of the pod's interface.
    pub const WIRING: Self = Self(100);
    /// No address is left.
    pub const EXHAUSTED: Self = Self(101);
    /// CHECK found something other than ADD left.
    pub const DIFFERENT: Self = Self(102);
    /// A port of the host leads elsewhere.
    pub const PORT_TAKEN: Self = Self(103);
    /// The plugin that gives addresses cannot be run, or said something else than the specification has.
    pub const IPAM: Self = Self(104);
}

/// Why a command failed; `msg` says what, `details` how to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct CniError {
    pub code: Code,
    pub msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    #[must_use]
    pub fn details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }
}

/// The network configuration on standard input; what is not for this plugin is ignored.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// A configuration without one is of 0.1.0.
    #[serde(default)]
    pub cni_version: Option<String>,
    #[serde(default)]
    pub name: Option<String>,
    /// Where the agent listens.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Of the agent: where it finds what could not be told to it.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
    #[serde(default)]
    pub mtu: Option<u32>,
    #[serde(default)]
    pub ipam: Option<Ipam>,
    #[serde(default)]
    pub runtime_config: Option<RuntimeConfig>,
    #[serde(default)]
    pub prev_result: Option<Value>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<Owner>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Ipam {
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
}

/// What the runtime adds for the capabilities that a configuration declares (CONVENTIONS.md of the specification).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeConfig {
    #[serde(default)]
    pub port_mappings: Option<Vec<PortMapping>>,
    #[serde(default)]
    pub bandwidth: Option<Bandwidth>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// 0 is none.
    #[serde(default)]
    pub host_port: i64,
    pub container_port: i64,
    #[serde(default)]
    pub protocol: Option<String>,
    #[serde(default, rename = "hostIP")]
    pub host_ip: Option<String>,
}

/// Bits a second, and bits; 0 is no limit.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    #[serde(default)]
    pub ingress_rate: u64,
    #[serde(default)]
    pub ingress_burst: u64,
    #[serde(default)]
    pub egress_rate: u64,
    #[serde(default)]
    pub egress_burst: u64,
}

/// The result of ADD, in any version. What plugins before this one put into it stays as they wrote it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Success {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// `dns`, and what later versions may add.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Empty for one of the host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ip {
    /// With its prefix length.
    pub address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into the interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Route {
    pub dst: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Success {
    /// As the version has it: 0.x says an address's family, and only 1.1.0 an interface's MTU.
    ///
    /// # Errors
    /// None that this type can have: its keys are text.
    pub fn to_json(&self, version: Version) -> Result<Value, serde_json::Error> {
        let mut success = self.clone();
        for ip in &mut success.ips {
            if version < Version::V1_0_0 {
                let family = if ip.address.contains(':') { "6" } else { "4" };
                ip.more.insert("version".into(), family.into());
            } else {
                ip.more.remove("version");
            }
        }
        if version < Version::V1_1_0 {
            for interface in &mut success.interfaces {
                interface.more.remove("mtu");
            }
        }
        success.more.insert("cniVersion".into(), version.as_str().into());
        success.more.entry("dns").or_insert_with(|| Value::Object(Map::new()));
        serde_json::to_value(success)
    }

    /// The addresses of one interface of a sandbox; `None` where the result has no such interface.
    pub fn addresses(&self, ifname: &str) -> Option<Vec<IpAddr>> {
        let at = self.interfaces.iter().position(|it| it.name == ifname && !it.sandbox.is_empty())?;
        let ours = self.ips.iter().filter(|ip| ip.interface == Some(at));
        Some(ours.filter_map(|ip| ip.address.split('/').next()?.parse().ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn versions_are_read_and_written() {
        for version in Version::ALL {
            assert_eq!(Version::parse(version.as_str()), Some(version));
        }
        for other in ["", "0.2.0", "0.3.0", "1.1", "1.2.0", "2.0.0", "1.1.0 "] {
            assert_eq!(Version::parse(other), None, "{other}");
        }
    }

    #[test]
    fn rule_60_an_error_is_written_as_the_specification_has_it() {
        let error = CniError::new(Code::TRY_AGAIN_LATER, "not yet");
        assert_eq!(serde_json::to_value(&error).unwrap(), json!({ "code": 11, "msg": "not yet" }));
        let error = error.details("the agent starts");
        assert_eq!(error.to_string(), "not yet: the agent starts");
        let read: CniError = serde_json::from_value(serde_json::to_value(&error).unwrap()).unwrap();
        assert_eq!(read, error);
    }

    fn success() -> Success {
        serde_json::from_value(json!({
            "interfaces": [
                { "name": "ff0", "mac": "02:00:00:00:00:01" },
                { "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/a", "mtu": 1450 },
            ],
            "ips": [
                { "address": "10.244.1.2/32", "gateway": "169.254.1.1", "interface": 1 },
                { "address": "fd00::2/128", "gateway": "fe80::1", "interface": 1 },
            ],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }],
        }))
        .unwrap()
    }

    #[test]
    fn rule_55_a_result_is_in_the_version_of_the_configuration() {
        for version in Version::ALL {
            let written = success().to_json(version).unwrap();
            assert_eq!(written["cniVersion"], version.as_str());
            let family = |index: usize| written["ips"][index].get("version").cloned();
            if version < Version::V1_0_0 {
                assert_eq!((family(0), family(1)), (Some(json!("4")), Some(json!("6"))));
            } else {
                assert_eq!((family(0), family(1)), (None, None));
            }
            assert_eq!(written["interfaces"][1].get("mtu").is_some(), version == Version::V1_1_0);
            assert_eq!(written["interfaces"][0].get("sandbox"), None);
            assert_eq!(written["dns"], json!({}));
        }
    }

    #[test]
    fn rule_55_what_others_wrote_stays() {
        let mut value = success().to_json(Version::V1_1_0).unwrap();
        value["dns"] = json!({ "nameservers": ["10.96.0.10"] });
        value["interfaces"][0]["socketPath"] = json!("/run/x");
        value["routes"][0]["mtu"] = json!(1400);
        value["new"] = json!([1]);
        let read: Success = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(read.to_json(Version::V1_1_0).unwrap(), value);
    }

    #[test]
    fn the_addresses_of_an_interface_are_found() {
        let expected: Vec<IpAddr> = vec!["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(success().addresses("eth0"), Some(expected));
        assert_eq!(success().addresses("ff0"), None, "it is the host's");
        assert_eq!(success().addresses("net1"), None);
    }
}
