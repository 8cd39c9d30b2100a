//! Kernel modules and what they depend on, in the order to load them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A module, uncompressed.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// What the tests use. What is not built in and not there is what this kernel lacks.
pub(super) const WANTED: [&str; 9] = [
    "veth",
    "bridge",
    "vxlan",
    "sch_ingress",
    "cls_bpf",
    // How SCTP finds its checksum and signs its cookies, by name, when it is used.
    "crc32c_generic",
    "hmac",
    "sha1_generic",
    "sctp",
];

/// The wanted modules that are not built in, each after those it depends on, and the names of those that this kernel
/// does not have. `modules` is its `lib/modules/RELEASE`.
pub(super) fn in_order(modules: &Path, wanted: &[&str]) -> Result<(Vec<Module>, Vec<String>)> {
    let mut files = BTreeMap::new();
    find(&modules.join("kernel"), &mut files)?;
    let builtin = modules.join("modules.builtin");
    let builtin =
        fs::read_to_string(&builtin).with_context(|| format!("cannot read {}", builtin.display()))?;
    let builtin: Vec<_> = builtin.lines().filter_map(|path| name(Path::new(path))).collect();
    let mut order = Order { files, builtin, loaded: Vec::new() };
    let mut lacking = Vec::new();
    for name in wanted {
        if !order.has(name) {
            lacking.push((*name).to_owned());
            continue;
        }
        order.load(name)?;
    }
    Ok((order.loaded, lacking))
}

struct Order {
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
    loaded: Vec<Module>,
}

impl Order {
    fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.builtin.iter().any(|of| of == name)
    }

    fn load(&mut self, name: &str) -> Result<()> {
        if self.builtin.iter().any(|of| of == name) || self.loaded.iter().any(|of| of.name == name) {
            return Ok(());
        }
        let path = self.files.get(name).with_context(|| format!("module {name} is not there"))?;
        let bytes = read(path)?;
        for dependency in depends(&bytes) {
            self.load(&dependency).with_context(|| format!("{name} depends on {dependency}"))?;
        }
        self.loaded.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

/// Every module below a directory, by its name.
fn find(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `crc32c_generic` of `.../crc32c-generic.ko.xz`.
fn name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).with_context(cannot),
        Some("xz") => {
            let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output();
            let output = output.context("xz is not installed; install xz-utils").with_context(cannot)?;
            if !output.status.success() {
                bail!("{}: {}", cannot(), String::from_utf8_lossy(&output.stderr).trim());
            }
            Ok(output.stdout)
        }
        _ => bail!("{}: compressed in a way that is not known here", cannot()),
    }
}

/// The names in its `.modinfo`, which holds strings that end with NUL.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let base = std::env::temp_dir().join(format!("xtask-modules-{}", std::process::id()));
        let dir = base.join("kernel/net");
        fs::create_dir_all(&dir).unwrap();
        for (file, info) in [
            ("sctp.ko", "\0license=GPL\0depends=libcrc32c,udp-tunnel\0retpoline=Y\0"),
            ("libcrc32c.ko", "\0depends=\0"),
            ("udp-tunnel.ko", "\0depends=libcrc32c,ipv6\0"),
        ] {
            fs::write(dir.join(file), info).unwrap();
        }
        fs::write(base.join("modules.builtin"), "kernel/net/ipv6/ipv6.ko\n").unwrap();
        let (modules, lacking) = in_order(&base, &["ipv6", "sctp", "netkit", "udp_tunnel"]).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["libcrc32c", "udp_tunnel", "sctp"]);
        assert_eq!(lacking, ["netkit"]);
        fs::remove_dir_all(base).unwrap();
    }
}
