//! The plugin `loopback`, for runtimes that have a plugin set up a pod's loopback interface and find none.
//!
//! containerd runs it before the pod's network, for every pod (go-cni `WithLoNetwork`), unless its configuration has
//! `use_internal_loopback` (2.0); CRI-O does the same by itself. It is part of a package of the distribution that a node
//! without another network plugin may not have, so `ferroflow prepare` puts this one where there is none.

use std::ffi::OsString;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use serde_json::Value;

use super::environment::Command;
use super::{Asked, Outcome, asked};
use crate::cni::types::{CniError, Code, Interface, Ip, Success, Version};
use crate::net::loopback;
use crate::net::pod::PodError;

/// The name that runtimes start it under.
pub const NAME: &str = "loopback";

/// What is done in a pod's namespace.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) raise: fn(&Path) -> Result<(), PodError>,
    pub(super) check: fn(&Path) -> Result<(), PodError>,
}

pub(super) const KERNEL: Kernel = Kernel { raise: loopback::raise, check: loopback::check };

/// What to print, and the version to print an error in.
pub(super) fn run(
    env: &dyn Fn(&str) -> Option<OsString>,
    input: &mut dyn Read,
    kernel: Kernel,
) -> (Version, Outcome) {
    match asked(env, input) {
        Ok(asked) => (asked.version.unwrap_or(Version::NEWEST), answer(&asked, kernel)),
        Err(outcome) => (Version::NEWEST, outcome),
    }
}

fn answer(asked: &Asked, kernel: Kernel) -> Outcome {
    let netns = Path::new(&*asked.environment.netns);
    match asked.environment.command {
        Command::Add => {
            let version = asked.version(Version::V0_3_1)?;
            (kernel.raise)(netns).map_err(|error| failed(&error))?;
            result(asked, version).map(Some)
        }
        Command::Check => {
            asked.version(Version::V0_4_0)?;
            (kernel.check)(netns).map_err(|error| failed(&error))?;
            Ok(None)
        }
        // It goes with the namespace.
        Command::Del | Command::Gc | Command::Status | Command::Version => Ok(None),
    }
}

fn failed(error: &PodError) -> CniError {
    let code = match error {
        PodError::NoNetns { .. } => Code::UNKNOWN_CONTAINER,
        PodError::HostNetns { .. } => Code::INVALID_ENVIRONMENT,
        PodError::Different(_) => Code::DIFFERENT,
        PodError::Exists { .. } | PodError::Kernel { .. } => Code::WIRING,
    };
    CniError::new(code, error.to_string())
}

/// Rule 55: what plugins before this one reported, or else the interface and its addresses.
fn result(asked: &Asked, version: Version) -> Result<Value, CniError> {
    let success = match asked.previous()? {
        Some(before) => before,
        None => {
            let of = |addr: IpAddr, bits: u8| Ip {
                address: format!("{addr}/{bits}"),
                gateway: None,
                interface: Some(0),
                more: Default::default(),
            };
            let sandbox = asked.environment.netns.to_string();
            let mac = "00:00:00:00:00:00".to_owned();
            Success {
                interfaces: vec![Interface { name: "lo".into(), mac, sandbox, more: Default::default() }],
                ips: vec![of(Ipv4Addr::LOCALHOST.into(), 8), of(Ipv6Addr::LOCALHOST.into(), 128)],
                ..Success::default()
            }
        }
    };
    success.to_json(version).map_err(|error| super::undecodable("the result", &error))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const WELL: Kernel = Kernel { raise: |_| Ok(()), check: |_| Ok(()) };
    const CONFIG: &str = r#"{"cniVersion":"1.0.0","name":"cni-loopback","type":"loopback"}"#;

    fn ask(command: &str, input: &str, kernel: Kernel) -> Outcome {
        let env = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => command,
                "CNI_CONTAINERID" => "c1",
                "CNI_NETNS" => "/run/netns/c1",
                "CNI_IFNAME" => "lo",
                _ => return None,
            };
            Some(OsString::from(value))
        };
        run(&env, &mut input.as_bytes(), kernel).1
    }

    #[test]
    fn rule_55_add_reports_the_interface_in_every_version() {
        for version in Version::ALL {
            let input = CONFIG.replace("1.0.0", version.as_str());
            let answer = ask("ADD", &input, WELL).unwrap().unwrap();
            assert_eq!(answer["cniVersion"], version.as_str());
            assert_eq!(answer["interfaces"][0]["name"], "lo");
            assert_eq!(answer["interfaces"][0]["sandbox"], "/run/netns/c1");
            assert_eq!(answer["ips"][0]["address"], "127.0.0.1/8");
            assert_eq!(answer["ips"][1]["address"], "::1/128");
        }
        let mut before: Value = serde_json::from_str(CONFIG).unwrap();
        before["prevResult"] =
            json!({"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/x"}]});
        let answer = ask("ADD", &before.to_string(), WELL).unwrap().unwrap();
        assert_eq!(answer["interfaces"], json!([{"name": "eth0", "sandbox": "/x"}]));
    }

    #[test]
    fn rule_60_what_fails_has_its_code() {
        let no_netns = |path: &Path| {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            Err(PodError::NoNetns { path: path.to_owned(), source })
        };
        let down = |_: &Path| Err(PodError::Different("lo is down".into()));
        let kernel = Kernel { raise: no_netns, check: down };
        assert_eq!(ask("ADD", CONFIG, kernel).unwrap_err().code, Code::UNKNOWN_CONTAINER);
        assert_eq!(ask("CHECK", CONFIG, kernel).unwrap_err().code, Code::DIFFERENT);
        assert_eq!(ask("ADD", "{", kernel).unwrap_err().code, Code::DECODING);
        let old = CONFIG.replace("1.0.0", "0.2.0");
        assert_eq!(ask("ADD", &old, kernel).unwrap_err().code, Code::INCOMPATIBLE_VERSION);
        // Rule 56.
        assert_eq!(ask("DEL", CONFIG, kernel), Ok(None));
        let versions = ask("VERSION", "", kernel).unwrap().unwrap();
        assert_eq!(versions["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }
}
