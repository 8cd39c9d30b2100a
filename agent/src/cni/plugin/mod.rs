//! `ferroflow cni`: reads the environment and standard input, asks the agent, and prints what the specification has
//! for it. It holds no state, and touches nothing but the socket and, for DEL without an agent, the spool.

mod delegate;
mod environment;
mod loopback;
mod runtime;
mod socket;

use std::ffi::OsString;
use std::io::{Read, Write as _};
use std::path::Path;
use std::process::ExitCode;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::protocol::{
    Addresses, Attached, Attachment, LONGEST_LINE, Removal, Reply, Request, SOCKET, STATE_DIR,
};
use super::spool;
use super::types::{CniError, Code, Config, Interface, Ip, Route, Success, Version};
use crate::net::pod::gateway;
use delegate::{Delegate, Given};
use environment::{Command, Environment};

/// The name that runtimes start it under, where the verb cannot be named.
pub const NAME: &str = "ferroflow-cni";
pub use loopback::NAME as LOOPBACK;

/// Answers one command. Standard output gets JSON or nothing, errors too; standard error gets text.
pub fn main() -> ExitCode {
    print(NAME, run(&environment_of, &mut std::io::stdin().lock(), socket::ask))
}

/// The same as the plugin [`LOOPBACK`].
pub fn loopback() -> ExitCode {
    print(LOOPBACK, loopback::run(&environment_of, &mut std::io::stdin().lock(), loopback::KERNEL))
}

fn environment_of(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

fn print(name: &str, (version, outcome): (Version, Outcome)) -> ExitCode {
    let (output, code) = match outcome {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("{name}: {error}");
            (Some(error_json(version, &error)), ExitCode::FAILURE)
        }
    };
    if let Some(output) = output
        && let Err(error) = writeln!(std::io::stdout(), "{output}")
    {
        eprintln!("{name}: cannot write the result: {error}");
        return ExitCode::FAILURE;
    }
    code
}

fn error_json(version: Version, error: &CniError) -> Value {
    let CniError { code, msg, details } = error;
    let mut output = json!({ "cniVersion": version.as_str(), "code": code, "msg": msg });
    if !details.is_empty() {
        output["details"] = details.as_str().into();
    }
    output
}

/// How the agent is asked; an error says why it could not be.
type Ask = fn(&Path, &Request) -> Result<Reply, socket::Unreachable>;

type Outcome = Result<Option<Value>, CniError>;

/// What to print, and the version to print an error in.
fn run(env: &dyn Fn(&str) -> Option<OsString>, input: &mut dyn Read, ask: Ask) -> (Version, Outcome) {
    match asked(env, input) {
        Ok(asked) => {
            let version = asked.version.unwrap_or(Version::NEWEST);
            (version, Exchange { asked, ask, env }.run())
        }
        Err(outcome) => (Version::NEWEST, outcome),
    }
}

/// A command with its configuration.
struct Asked {
    environment: Environment,
    config: Config,
    /// `None` where the configuration is of a version that is not spoken.
    version: Option<Version>,
    /// The configuration as it came.
    text: Vec<u8>,
}

/// An error is what to print without further ado: also the answer to VERSION, which has no configuration.
fn asked(env: &dyn Fn(&str) -> Option<OsString>, input: &mut dyn Read) -> Result<Asked, Outcome> {
    let environment = Environment::read(env).map_err(Err)?;
    let text = read(input).map_err(Err)?;
    if environment.command == Command::Version {
        return Err(versions(&text).map(Some));
    }
    let config: Config = decode(&text, "the network configuration").map_err(Err)?;
    let version = config.cni_version.as_deref().and_then(Version::parse);
    Ok(Asked { environment, config, version, text })
}

impl Asked {
    /// The version of the configuration, if the command has been there since `first`.
    fn version(&self, first: Version) -> Result<Version, CniError> {
        self.version.filter(|version| *version >= first).ok_or_else(|| {
            let given = self.config.cni_version.as_deref().unwrap_or("0.1.0 (none is given)");
            let known: Vec<_> =
                Version::ALL.iter().filter(|it| **it >= first).map(|it| it.as_str()).collect();
            let command = self.environment.command.name();
            CniError::new(Code::INCOMPATIBLE_VERSION, format!("cniVersion {given} cannot {command}"))
                .details(format!("set cniVersion to one of {}", known.join(", ")))
        })
    }

    fn previous(&self) -> Result<Option<Success>, CniError> {
        let Some(value) = &self.config.prev_result else { return Ok(None) };
        serde_path_to_error::deserialize(value).map(Some).map_err(|error| undecodable("prevResult", &error))
    }
}

fn read(input: &mut dyn Read) -> Result<Vec<u8>, CniError> {
    let mut text = Vec::new();
    input
        .take(LONGEST_LINE + 1)
        .read_to_end(&mut text)
        .map_err(|error| CniError::new(Code::IO, format!("cannot read standard input: {error}")))?;
    if text.len() as u64 > LONGEST_LINE {
        let msg = format!("standard input has more than {LONGEST_LINE} bytes: no network configuration has");
        return Err(CniError::new(Code::DECODING, msg));
    }
    Ok(text)
}

fn decode<T: DeserializeOwned>(text: &[u8], what: &str) -> Result<T, CniError> {
    // A list of the fields' values would do for serde.
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err(CniError::new(Code::DECODING, format!("cannot decode {what}: it is no JSON object")));
    }
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| undecodable(what, &error));
    let value = value?;
    json.end().map_err(|error| undecodable(what, &error))?;
    Ok(value)
}

fn undecodable(what: &str, error: &dyn std::error::Error) -> CniError {
    CniError::new(Code::DECODING, format!("cannot decode {what}")).details(error.to_string())
}

/// VERSION; runtimes ask it before they know any version, so its input may be empty.
fn versions(text: &[u8]) -> Result<Value, CniError> {
    let asked = if text.trim_ascii().is_empty() {
        None
    } else {
        decode::<Config>(text, "the input of VERSION")?.cni_version
    };
    let supported = Version::ALL.map(Version::as_str);
    let version = asked.as_deref().unwrap_or(Version::NEWEST.as_str());
    Ok(json!({ "cniVersion": version, "supportedVersions": supported }))
}

/// One command, and the agent that does it.
struct Exchange<'a> {
    asked: Asked,
    ask: Ask,
    env: &'a dyn Fn(&str) -> Option<OsString>,
}

impl Exchange<'_> {
    fn run(&self) -> Outcome {
        match self.asked.environment.command {
            Command::Version => Ok(None),
            Command::Add => self.add().map(Some),
            Command::Del => self.del().map(|()| None),
            Command::Check => self.check().map(|()| None),
            Command::Status => self.status().map(|()| None),
            Command::Gc => self.gc().map(|()| None),
        }
    }

    fn add(&self) -> Result<Value, CniError> {
        let version = self.asked.version(Version::V0_3_1)?;
        let attachment = self.attachment()?;
        let mut before = self.asked.previous()?.unwrap_or_default();
        let sandbox = attachment.netns.display().to_string();
        let attached = match self.delegate()? {
            None => self.attach(attachment)?,
            Some(delegate) => {
                let Given { addresses, dns } = delegate.add()?;
                before.more.extend(dns.map(|dns| ("dns".to_owned(), dns)));
                let attachment = Attachment { given: Some(addresses), ..attachment };
                self.attach(attachment).or_else(|error| delegate.give_back(error))?
            }
        };
        let success = self.success(before, &attached, sandbox);
        success.to_json(version).map_err(|error| undecodable("the result", &error))
    }

    fn attach(&self, attachment: Attachment) -> Result<Attached, CniError> {
        match self.request(&Request::Add(attachment))? {
            Reply::Attached(attached) => Ok(attached),
            Reply::Failed(error) => Err(error),
            reply @ Reply::Done => Err(nonsense(&reply)),
        }
    }

    /// Who gives addresses; `None` where the agent does.
    fn delegate(&self) -> Result<Option<Delegate<'_>>, CniError> {
        let kind = self.asked.config.ipam.as_ref().and_then(|ipam| ipam.kind.as_deref()).unwrap_or_default();
        if ["", "ferroflow", NAME].contains(&kind) {
            return Ok(None);
        }
        Delegate::find(kind, self.env, &self.asked.text).map(Some)
    }

    /// Lets the plugin that gives addresses do its part of a command.
    fn delegated(&self) -> Result<(), CniError> {
        match self.delegate()? {
            None => Ok(()),
            Some(delegate) => delegate.run(self.asked.environment.command).map(drop),
        }
    }

    /// Rule 55: what plugins before this one made, and then its own.
    fn success(&self, mut success: Success, attached: &Attached, sandbox: String) -> Success {
        let interface = |name: &str, mac: &str, sandbox| {
            let more = [("mtu".to_owned(), attached.mtu.into())].into_iter().collect();
            Interface { name: name.into(), mac: mac.into(), sandbox, more }
        };
        let ifname = &*self.asked.environment.ifname;
        let at = success.interfaces.len() + 1;
        success.interfaces.push(interface(&attached.host_interface, &attached.host_mac, String::new()));
        success.interfaces.push(interface(ifname, &attached.mac, sandbox));
        for &addr in &attached.addresses {
            let (bits, any) = if addr.is_ipv4() { (32, "0.0.0.0/0") } else { (128, "::/0") };
            let gateway = Some(gateway(addr));
            let address = format!("{addr}/{bits}");
            success.ips.push(Ip { address, gateway, interface: Some(at), more: Default::default() });
            success.routes.push(Route { dst: any.into(), gw: gateway, more: Default::default() });
        }
        success
    }

    /// Rule 56: whatever is missing, what was to go is gone, or will be as soon as there is an agent. The addresses go back
    /// to who gave them when nothing uses them any longer; if that one fails, the runtime is to come again.
    fn del(&self) -> Result<(), CniError> {
        self.detach();
        self.delegated()
    }

    fn detach(&self) {
        let removal = Removal { owner: self.asked.environment.owner() };
        let reason = match (self.ask)(self.socket(), &Request::Del(removal.clone())) {
            Ok(Reply::Done) => return,
            Ok(Reply::Failed(error)) => error.to_string(),
            Ok(reply @ Reply::Attached(_)) => nonsense(&reply).to_string(),
            Err(error) => error.to_string(),
        };
        let state_dir = self.asked.config.state_dir.as_deref().unwrap_or(Path::new(STATE_DIR));
        match spool::put(state_dir, &removal) {
            Ok(()) => eprintln!("{NAME}: left for the agent in {}: {reason}", state_dir.display()),
            // The agent finds leases whose interface is gone by itself, only later.
            Err(error) => eprintln!("{NAME}: {reason}; {}: {error}", state_dir.display()),
        }
    }

    fn check(&self) -> Result<(), CniError> {
        self.asked.version(Version::V0_4_0)?;
        let attachment = self.attachment()?;
        self.delegated()?;
        let missing = |what: String| CniError::new(Code::INVALID_CONFIG, what);
        let previous = self
            .asked
            .previous()?
            .ok_or_else(|| missing("prevResult is missing: CHECK compares with it".into()))?;
        let ifname = &*self.asked.environment.ifname;
        let addresses = previous.addresses(ifname).ok_or_else(|| {
            missing(format!("prevResult.interfaces has no {ifname} in a sandbox: ADD reported one"))
        })?;
        self.done(&Request::Check { attachment, addresses })
    }

    fn status(&self) -> Result<(), CniError> {
        self.asked.version(Version::V1_1_0)?;
        let addresses = if self.delegate()?.is_some() { Addresses::Given } else { Addresses::Own };
        match (self.ask)(self.socket(), &Request::Status { addresses }) {
            Ok(Reply::Done) => self.delegated(),
            Ok(Reply::Failed(error)) => Err(error),
            Ok(reply @ Reply::Attached(_)) => Err(nonsense(&reply)),
            Err(error) => Err(CniError { code: Code::NOT_AVAILABLE, ..CniError::from(error) }),
        }
    }

    /// Rule 59. A list that is missing is no empty list.
    fn gc(&self) -> Result<(), CniError> {
        self.asked.version(Version::V1_1_0)?;
        let network = self.name()?;
        let valid = self.asked.config.valid_attachments.clone().ok_or_else(|| {
            CniError::new(Code::INVALID_CONFIG, "cni.dev/valid-attachments is missing: nothing is collected")
        })?;
        let collected = self.done(&Request::Gc { network, valid });
        // One goes on where the other failed.
        collected.and(self.delegated())
    }

    fn name(&self) -> Result<Box<str>, CniError> {
        let invalid = |msg: String| CniError::new(Code::INVALID_CONFIG, msg);
        let name = self.asked.config.name.as_deref().unwrap_or_default();
        if name.is_empty() {
            return Err(invalid("name is missing: the network needs one".into()));
        }
        if !environment::is_name(name) {
            let rule = "letters, digits, `_`, `.` and `-`, a letter or digit first";
            return Err(invalid(format!("name {name:?} is not one: {rule}")));
        }
        Ok(name.into())
    }

    fn attachment(&self) -> Result<Attachment, CniError> {
        let network = self.name()?;
        if let Some(mtu) = self.asked.config.mtu.filter(|mtu| !(MTU_LEAST..=MTU_MOST).contains(mtu)) {
            let msg = format!("mtu {mtu} is not between {MTU_LEAST} and {MTU_MOST}");
            return Err(CniError::new(Code::INVALID_CONFIG, msg));
        }
        let asked = self.asked.config.runtime_config.clone().unwrap_or_default();
        let Environment { netns, .. } = &self.asked.environment;
        Ok(Attachment {
            owner: self.asked.environment.owner(),
            netns: netns.as_ref().into(),
            network,
            mtu: self.asked.config.mtu,
            given: None,
            tenant: self.asked.environment.tenant.clone(),
            host_ports: runtime::host_ports(&asked)?,
            limits: runtime::limits(&asked)?,
        })
    }

    fn socket(&self) -> &Path {
        self.asked.config.socket.as_deref().unwrap_or(Path::new(SOCKET))
    }

    fn request(&self, request: &Request) -> Result<Reply, CniError> {
        (self.ask)(self.socket(), request).map_err(Into::into)
    }

    fn done(&self, request: &Request) -> Result<(), CniError> {
        match self.request(request)? {
            Reply::Done => Ok(()),
            Reply::Failed(error) => Err(error),
            reply @ Reply::Attached(_) => Err(nonsense(&reply)),
        }
    }
}

/// What an IPv4 host must take (RFC 791), and the most a veth has.
const MTU_LEAST: u32 = 576;
const MTU_MOST: u32 = 65_535;

fn nonsense(reply: &Reply) -> CniError {
    CniError::new(Code::DECODING, format!("the agent answered something else: {reply:?}"))
        .details("plugin and agent are of different versions: install both of one")
}

#[cfg(test)]
mod tests;
