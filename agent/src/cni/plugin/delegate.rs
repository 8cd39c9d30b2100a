//! Addresses that another plugin gives (`ipam.type`): it is run as section 4 of the specification has it, with the same
//! configuration and environment, found in the directories of `CNI_PATH`.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::Value;

use super::environment::Command;
use super::undecodable;
use crate::cni::types::{CniError, Code, Success};

/// What a plugin is told by.
const VARIABLES: [&str; 4] = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"];
const PATH: &str = "CNI_PATH";

pub(super) struct Delegate<'a> {
    program: PathBuf,
    env: &'a dyn Fn(&str) -> Option<OsString>,
    /// As it stood on standard input.
    config: &'a [u8],
}

/// What it gave.
#[derive(Debug, PartialEq)]
pub(super) struct Given {
    /// At most one of each family.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) dns: Option<Value>,
}

impl<'a> Delegate<'a> {
    /// # Errors
    /// [`Code::INVALID_CONFIG`] where the type is no name of a program, [`Code::INVALID_ENVIRONMENT`] where no directory of
    /// `CNI_PATH` has it.
    pub(super) fn find(
        kind: &str,
        env: &'a dyn Fn(&str) -> Option<OsString>,
        config: &'a [u8],
    ) -> Result<Self, CniError> {
        if Path::new(kind).file_name().is_none_or(|name| name != kind) {
            let msg = format!("ipam.type {kind:?} is no name of a program");
            return Err(CniError::new(Code::INVALID_CONFIG, msg));
        }
        let dirs = env(PATH).unwrap_or_default();
        let found = std::env::split_paths(&dirs).map(|dir| dir.join(kind)).find(|path| path.is_file());
        let Some(program) = found else {
            let msg = format!("{PATH} has no program {kind:?} (ipam.type): {}", dirs.display());
            return Err(CniError::new(Code::INVALID_ENVIRONMENT, msg).details(
                "install it there, or leave ipam.type out: addresses come from spec.podCIDRs then",
            ));
        };
        Ok(Self { program, env, config })
    }

    /// # Errors
    /// Its own, and where its result cannot be used; what it gave is given back then.
    pub(super) fn add(&self) -> Result<Given, CniError> {
        let text = self.run(Command::Add)?;
        self.given(&text).or_else(|error| self.give_back(error))
    }

    /// The error, after what was given is given back.
    ///
    /// # Errors
    /// Always: with what could not be undone.
    pub(super) fn give_back<T>(&self, error: CniError) -> Result<T, CniError> {
        Err(match self.run(Command::Del) {
            Ok(_nothing) => error,
            Err(left) => {
                let details = format!("{} (and giving the address back: {left})", error.details);
                error.details(details)
            }
        })
    }

    /// What it wrote.
    ///
    /// # Errors
    /// Its own, word by word, where it wrote one.
    pub(super) fn run(&self, command: Command) -> Result<Vec<u8>, CniError> {
        let failed = |error: io::Error| {
            CniError::new(Code::IPAM, format!("cannot run {}: {error}", self.program.display()))
        };
        let Output { status, stdout, stderr } = self.output(command).map_err(failed)?;
        if status.success() {
            return Ok(stdout);
        }
        Err(serde_json::from_slice(&stdout).unwrap_or_else(|_error| {
            let said = String::from_utf8_lossy(&stderr);
            let msg = format!("{} failed ({status}) without an error of CNI", self.program.display());
            CniError::new(Code::IPAM, msg).details(said.trim())
        }))
    }

    fn output(&self, command: Command) -> io::Result<Output> {
        let told = VARIABLES.into_iter().chain([PATH]);
        let mut child = std::process::Command::new(&self.program)
            .envs(told.filter_map(|name| Some((name, (self.env)(name)?))))
            .env("CNI_COMMAND", command.name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        std::thread::scope(|scope| {
            // It may write before it has read everything, or read nothing.
            scope.spawn(|| input.map(|mut input| input.write_all(self.config)));
            child.wait_with_output()
        })
    }

    fn given(&self, text: &[u8]) -> Result<Given, CniError> {
        let what = format!("the result of {}", self.program.display());
        let result: Success = serde_json::from_slice(text).map_err(|error| undecodable(&what, &error))?;
        let useless = |why: String| CniError::new(Code::IPAM, format!("{what}: {why}"));
        let mut addresses: Vec<IpAddr> = Vec::new();
        for ip in &result.ips {
            let (addr, _bits) = ip.address.split_once('/').unwrap_or((&ip.address, ""));
            let addr: IpAddr = addr
                .parse()
                .map_err(|_error| useless(format!("ips has {:?}, which is no address", ip.address)))?;
            if addresses.iter().any(|other| other.is_ipv4() == addr.is_ipv4()) {
                return Err(useless(format!("{addr} is a second address of its family")));
            }
            addresses.push(addr);
        }
        if addresses.is_empty() {
            return Err(useless("ips has no address".into()));
        }
        addresses.sort();
        Ok(Given { addresses, dns: result.more.get("dns").cloned() })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use tempfile::TempDir;

    use super::*;

    /// A plugin that does what the script says.
    struct Installed(TempDir);

    impl Installed {
        fn new(script: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("test-ipam");
            fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display())).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            Self(dir)
        }

        fn add(&self) -> Result<Given, CniError> {
            let path = format!("/nonexistent:{}", self.0.path().display());
            let env = move |name: &str| match name {
                PATH => Some(OsString::from(&path)),
                "CNI_CONTAINERID" => Some("c1".into()),
                _ => None,
            };
            Delegate::find("test-ipam", &env, b"{\"name\":\"net\"}").unwrap().add()
        }

        fn log(&self) -> String {
            fs::read_to_string(self.0.path().join("log")).unwrap_or_default()
        }
    }

    const LOG: &str = "echo $CNI_COMMAND $CNI_CONTAINERID $(cat) >> log";

    #[test]
    fn a_plugin_gets_what_we_got_and_its_addresses_are_taken() {
        let result = r#"{"cniVersion":"1.0.0","ips":[{"address":"fd00::9/64"},
            {"address":"10.9.0.9/16","gateway":"10.9.0.1"}],"dns":{"nameservers":["10.9.0.1"]}}"#;
        let installed = Installed::new(&format!("{LOG}\ncat <<END\n{result}\nEND"));
        let given = installed.add().unwrap();
        assert_eq!(given.addresses, ["10.9.0.9", "fd00::9"].map(|text| text.parse::<IpAddr>().unwrap()));
        assert_eq!(given.dns.unwrap()["nameservers"][0], "10.9.0.1");
        assert_eq!(installed.log(), "ADD c1 {\"name\":\"net\"}\n");
    }

    #[test]
    fn rule_60_its_errors_are_passed_on_and_others_are_told() {
        let error =
            Installed::new(r#"echo '{"code":117,"msg":"no address","details":"pool a"}'; exit 1"#).add();
        let expected = CniError::new(Code(117), "no address").details("pool a");
        assert_eq!(error, Err(expected));
        let error = Installed::new("echo out of order >&2; exit 3").add().unwrap_err();
        assert!(error.code == Code::IPAM && error.details == "out of order", "{error}");
        for (result, word) in [
            ("{}", "no address"),
            (r#"{"ips":[{"address":"10.0.0.1/24"},{"address":"10.0.0.2/24"}]}"#, "second"),
            (r#"{"ips":[{"address":"ten/24"}]}"#, "ten/24"),
            ("nothing", "cannot decode"),
        ] {
            let installed = Installed::new(&format!("{LOG}\necho '{result}'"));
            let error = installed.add().unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            let commands: Vec<_> = installed.log().lines().map(|line| line[..3].to_owned()).collect();
            assert_eq!(commands, ["ADD", "DEL"], "what cannot be used is given back");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_its_field() {
        let env = |name: &str| (name == PATH).then(|| OsString::from("/nonexistent"));
        let code = |kind: &str| Delegate::find(kind, &env, b"").err().map(|error| (error.code, error.msg));
        for kind in ["../evil", "/bin/sh", "..", ""] {
            assert_eq!(code(kind).map(|(code, _)| code), Some(Code::INVALID_CONFIG), "{kind}");
        }
        let (code, msg) = code("host-local").unwrap();
        assert!(
            code == Code::INVALID_ENVIRONMENT && msg.contains("ipam.type") && msg.contains("/nonexistent"),
            "{msg}"
        );
    }
}
