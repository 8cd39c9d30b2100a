//! The toolchain that rust-toolchain.toml pins, and the commands that run under it.
//!
//! xtask itself may run under another one (`cargo +stable xtask demo`): whatever it starts is told the pin, and
//! nothing of the cargo that started xtask.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail};

pub(crate) struct Toolchain {
    root: PathBuf,
    pin: Pin,
    manager: Manager,
}

/// Who provides the toolchain. Without rustup the one on the PATH has to be the pinned one.
enum Manager {
    Rustup,
    None,
}

impl Toolchain {
    pub(crate) fn pinned() -> Result<Self> {
        let xtask =
            env::var_os("CARGO_MANIFEST_DIR").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = xtask.parent().context("xtask lies in no workspace; run it as `cargo xtask`")?.to_owned();
        let file = xtask.join("rust-toolchain.toml");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let pin = Pin::parse(&text).with_context(|| format!("{} pins no toolchain", file.display()))?;
        let manager = if installed("rustup") { Manager::Rustup } else { Manager::None };
        Ok(Self { root, pin, manager })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn channel(&self) -> &str {
        &self.pin.channel
    }

    pub(crate) fn components(&self) -> &[String] {
        &self.pin.components
    }

    /// Where build artefacts go, under a folder of their own so that other flags do not throw out a cache.
    pub(crate) fn target(&self, folder: &str) -> PathBuf {
        let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        self.root.join(target).join(folder)
    }

    /// The components that are missing; all of them where the toolchain itself is.
    pub(crate) fn missing(&self) -> Result<Vec<&str>> {
        match self.manager {
            Manager::Rustup => {
                let mut list = Command::new("rustup");
                list.args(["component", "list", "--installed", "--toolchain", self.channel()]);
                let present = output(&mut list).unwrap_or_default();
                Ok(self.pin.missing_from(&present))
            }
            Manager::None => {
                let version = output(Command::new("rustc").arg("--version")).unwrap_or_default();
                let channel = self.channel();
                if version.split(' ').nth(1) != Some(channel) {
                    bail!(
                        "Rust {channel} is needed, and there is no rustup to install it; install rustup, or that Rust"
                    );
                }
                Ok(Vec::new())
            }
        }
    }

    /// Installs the pinned toolchain with its components, also where rustup was told not to do so by itself.
    pub(crate) fn install(&self) -> Result<()> {
        let mut install = Command::new("rustup");
        install.args(["toolchain", "install", self.channel(), "--profile", "minimal", "--no-self-update"]);
        install.args(["--component", &self.components().join(",")]);
        succeed(&mut install).context("installing the toolchain failed; it is downloaded once, by rustup")
    }

    /// Installs the standard library for another machine; done already, rustup says nothing.
    pub(crate) fn add_target(&self, triple: &str) -> Result<()> {
        match self.manager {
            Manager::Rustup => {
                let mut add = Command::new("rustup");
                output(add.args(["target", "add", "--toolchain", self.channel(), triple])).map(drop)
            }
            // Whoever installed that Rust installs its targets; cargo names the one that is missing.
            Manager::None => Ok(()),
        }
    }

    pub(crate) fn cargo(&self) -> Command {
        self.command("cargo")
    }

    pub(crate) fn sysroot(&self) -> Result<PathBuf> {
        let path = output(self.command("rustc").args(["--print", "sysroot"]))?;
        Ok(path.trim().into())
    }

    /// The triple of this machine.
    pub(crate) fn host(&self) -> Result<String> {
        let version = output(self.command("rustc").arg("-vV"))?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        Ok(host.context("`rustc -vV` names no host")?.to_owned())
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = match self.manager {
            Manager::Rustup => Command::new("rustup"),
            Manager::None => Command::new(tool),
        };
        if matches!(self.manager, Manager::Rustup) {
            command.args(["run", self.channel(), tool]);
        }
        command.current_dir(&self.root);
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(is_of_outer_cargo) {
                command.env_remove(name);
            }
        }
        command
    }
}

/// What `cargo run` sets for xtask, and what would override the flags that a build here depends on.
fn is_of_outer_cargo(name: &str) -> bool {
    const NAMES: [&str; 12] = [
        "CARGO",
        "CARGO_BIN_NAME",
        "CARGO_BUILD_TARGET",
        "CARGO_CRATE_NAME",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_PRIMARY_PACKAGE",
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "RUSTUP_TOOLCHAIN_SOURCE",
    ];
    NAMES.contains(&name) || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}

/// The two lines of rust-toolchain.toml that matter here.
struct Pin {
    channel: String,
    components: Vec<String>,
}

impl Pin {
    fn parse(toml: &str) -> Option<Self> {
        let value = |key: &str| {
            let mut lines = toml.lines().filter_map(|line| line.split_once('='));
            lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value)
        };
        let quoted = |text: &str| text.split('"').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
        let channel = quoted(value("channel")?).pop()?;
        Some(Self { channel, components: quoted(value("components")?) })
    }

    /// rustup lists `clippy-x86_64-unknown-linux-gnu`, but `rust-src`.
    fn missing_from(&self, present: &str) -> Vec<&str> {
        let has = |name: &str| {
            let mut lines = present.lines().filter_map(|line| line.strip_prefix(name));
            lines.any(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        self.components.iter().map(String::as_str).filter(|name| !has(name)).collect()
    }
}

pub(crate) fn installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Runs a command, its output shown.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", shown(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", shown(command));
    }
    Ok(())
}

/// What a command prints; its complaints are part of the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {}", shown(command)))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{} ended with {}: {}", shown(command), output.status, complaint.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    format!("`{}`", words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# one \"toolchain\"\n[toolchain]\nchannel = \"1.2.3\"\ncomponents = [\"rust-src\", \"clippy\"]\n";

    #[test]
    fn pin_is_read_from_the_file() {
        let pin = Pin::parse(FILE).unwrap();
        assert_eq!(pin.channel, "1.2.3");
        assert_eq!(pin.components, ["rust-src", "clippy"]);
        assert!(Pin::parse("[toolchain]\n").is_none());
    }

    #[test]
    fn components_are_missing_until_listed() {
        let pin = Pin::parse(FILE).unwrap();
        assert_eq!(pin.missing_from("cargo-x86_64-unknown-linux-gnu\nclippyish\n"), ["rust-src", "clippy"]);
        assert_eq!(pin.missing_from("rust-src\n"), ["clippy"]);
        assert!(pin.missing_from("clippy-x86_64-unknown-linux-gnu\nrust-src\n").is_empty());
    }

    #[test]
    fn only_the_outer_cargo_is_forgotten() {
        assert!(["CARGO", "RUSTUP_TOOLCHAIN", "CARGO_PKG_NAME"].into_iter().all(is_of_outer_cargo));
        assert!(
            !["CARGO_HOME", "RUSTUP_HOME", "CARGO_TARGET_DIR", "PATH"].into_iter().any(is_of_outer_cargo)
        );
    }
}
