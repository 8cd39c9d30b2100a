//! The parameters of a command, which come as environment variables (specification, section 2).

use std::ffi::OsString;

use crate::cni::types::{CniError, Code};
use crate::ipam::{Owner, Tenant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &[CONTAINER_ID, NETNS, IFNAME],
            Self::Del => &[CONTAINER_ID, IFNAME],
            Self::Gc | Self::Status | Self::Version => &[],
        }
    }
}

const COMMAND: &str = "CNI_COMMAND";
const CONTAINER_ID: &str = "CNI_CONTAINERID";
const NETNS: &str = "CNI_NETNS";
const IFNAME: &str = "CNI_IFNAME";
/// `KEY=VALUE` by semicolons (CONVENTIONS of the specification).
const ARGS: &str = "CNI_ARGS";

/// What the runtime passes; empty where the command does not need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Environment {
    pub(super) command: Command,
    pub(super) container_id: Box<str>,
    pub(super) netns: Box<str>,
    pub(super) ifname: Box<str>,
    /// The pod, where the runtime is one of Kubernetes.
    pub(super) tenant: Option<Tenant>,
}

impl Environment {
    /// # Errors
    /// [`Code::INVALID_ENVIRONMENT`] with the names of the variables.
    pub(super) fn read(env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let value = |name: &str| match env(name).map(OsString::into_string) {
            None => Ok(Box::default()),
            Some(Ok(text)) => Ok(text.into_boxed_str()),
            Some(Err(_bytes)) => Err(invalid(format!("{name} is not UTF-8"))),
        };
        let command: Box<str> = value(COMMAND)?;
        let known = Command::ALL.into_iter().find(|known| known.name() == &*command);
        let Some(known) = known else {
            let names = Command::ALL.map(Command::name).join(", ");
            let given = if command.is_empty() { "missing".to_owned() } else { format!("{command:?}") };
            return Err(invalid(format!("{COMMAND} is {given}"))
                .details(format!("a container runtime sets it to one of {names}")));
        };
        let environment = Self {
            command: known,
            container_id: value(CONTAINER_ID)?,
            netns: value(NETNS)?,
            ifname: value(IFNAME)?,
            tenant: tenant(&value(ARGS)?),
        };
        let missing: Vec<_> =
            known.required().iter().filter(|name| environment.variable(name).is_empty()).copied().collect();
        if !missing.is_empty() {
            return Err(invalid(format!("{} needs {}", known.name(), missing.join(", "))));
        }
        if known.required().contains(&IFNAME) {
            environment.check()?;
        }
        Ok(environment)
    }

    pub(super) fn owner(&self) -> Owner {
        Owner { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    fn variable(&self, name: &str) -> &str {
        match name {
            CONTAINER_ID => &self.container_id,
            NETNS => &self.netns,
            _ => &self.ifname,
        }
    }

    fn check(&self) -> Result<(), CniError> {
        if !is_name(&self.container_id) {
            return Err(invalid(format!("{CONTAINER_ID} {:?} is no container id", self.container_id))
                .details("letters, digits, `_`, `.` and `-`, a letter or digit first"));
        }
        if !is_ifname(&self.ifname) {
            return Err(invalid(format!("{IFNAME} {:?} is no name of an interface", self.ifname))
                .details("1 to 15 bytes without `/`, `:`, white space or control characters"));
        }
        Ok(())
    }
}

/// What containerd and CRI-O say of the pod.
fn tenant(args: &str) -> Option<Tenant> {
    let value = |key: &str| args.split(';').filter_map(|arg| arg.split_once('=')).find(|(it, _)| *it == key);
    let text = |key| value(key).map(|(_, value)| value).unwrap_or_default();
    let (namespace, name) = (text("K8S_POD_NAMESPACE"), text("K8S_POD_NAME"));
    let named = !namespace.is_empty() && !name.is_empty();
    named.then(|| Tenant { namespace: namespace.into(), name: name.into(), uid: text("K8S_POD_UID").into() })
}

fn invalid(msg: String) -> CniError {
    CniError::new(Code::INVALID_ENVIRONMENT, msg)
}

/// As the specification has container ids and names of networks.
pub(super) fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    chars.next().is_some_and(|first| first.is_ascii_alphanumeric()) && chars.all(inner)
}

/// As the kernel's `dev_valid_name` has it.
fn is_ifname(text: &str) -> bool {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=15).contains(&text.len()) && text != "." && text != ".." && !text.contains(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, CniError> {
        Environment::read(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn rule_60_what_is_missing_or_wrong_is_named_with_code_4() {
        let full = [(CONTAINER_ID, "abc"), (NETNS, "/run/netns/a"), (IFNAME, "eth0")];
        let with = |command, changed: &str, value| {
            let kept = full.iter().copied().filter(|(name, _)| *name != changed);
            read(&kept.chain([(COMMAND, command), (changed, value)]).collect::<Vec<_>>())
        };
        for (command, changed, value) in [
            ("ADD", CONTAINER_ID, ""),
            ("ADD", NETNS, ""),
            ("ADD", IFNAME, ""),
            ("CHECK", NETNS, ""),
            ("DEL", CONTAINER_ID, ""),
            ("DEL", IFNAME, ""),
            ("DEL", CONTAINER_ID, "../../etc"),
            ("ADD", CONTAINER_ID, "-a"),
            ("ADD", IFNAME, "a/b"),
            ("ADD", IFNAME, ".."),
            ("ADD", IFNAME, "sixteen-bytes-xx"),
            ("ADD", IFNAME, "a b"),
        ] {
            let error = with(command, changed, value).unwrap_err();
            assert_eq!(error.code, Code::INVALID_ENVIRONMENT);
            assert!(error.msg.contains(changed), "{command} {changed}={value}: {error}");
        }
        for command in ["", "add", "REMOVE", "ADD "] {
            let error = read(&[(COMMAND, command)]).unwrap_err();
            assert_eq!(error.code, Code::INVALID_ENVIRONMENT);
            assert!(error.msg.contains(COMMAND), "{error}");
        }
    }

    #[test]
    fn rule_56_del_needs_no_namespace() {
        let read = read(&[(COMMAND, "DEL"), (CONTAINER_ID, "abc"), (IFNAME, "eth0"), (NETNS, "")]).unwrap();
        assert_eq!(read.command, Command::Del);
        assert_eq!(read.owner(), Owner { container_id: "abc".into(), ifname: "eth0".into() });
    }

    #[test]
    fn rule_54_the_pod_is_the_one_that_the_runtime_names() {
        let add = [(COMMAND, "ADD"), (CONTAINER_ID, "abc"), (NETNS, "/run/netns/a"), (IFNAME, "eth0")];
        let tenant = |args| read(&[&add[..], &[(ARGS, args)]].concat()).unwrap().tenant;
        let full = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1";
        let web = Tenant { namespace: "shop".into(), name: "web".into(), uid: "u1".into() };
        assert_eq!(tenant(full), Some(web.clone()));
        let (anyone, _) = full.rsplit_once(';').unwrap();
        assert_eq!(tenant(anyone), Some(Tenant { uid: "".into(), ..web }));
        for nobody in
            ["", "K8S_POD_NAME=web", "K8S_POD_NAMESPACE=shop", "K8S_POD_NAMESPACE=;K8S_POD_NAME=web"]
        {
            assert_eq!(tenant(nobody), None, "{nobody}");
        }
        assert_eq!(read(&add).unwrap().tenant, None);
    }

    #[test]
    fn commands_without_a_container_need_nothing_else() {
        for command in ["GC", "STATUS", "VERSION"] {
            assert_eq!(read(&[(COMMAND, command)]).unwrap().command.name(), command);
        }
    }
}
