//! Reads an image's tar back as an engine does, and starts what is in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;
use tar::Archive;

use super::Facts;
use super::layout::{digest, path};
use crate::toolchain::output;

/// What the image holds, once all digests are right.
pub(crate) struct Tree {
    /// Of the manifest: what registries and `kubectl describe` show.
    pub(crate) digest: String,
    pub(crate) config: Value,
    pub(crate) layer: Vec<u8>,
    /// Names in the layer, in order.
    pub(crate) entries: Vec<String>,
    pub(crate) binary: Vec<u8>,
}

/// Returns the manifest's digest.
pub(crate) fn run(tar: &Path, facts: &Facts, binary: &Path) -> Result<String> {
    let tree = unpack(tar, facts)?;
    ensure!(tree.binary == fs::read(binary)?, "/ferroflow is another binary than {}", binary.display());
    ensure!(tree.config["config"]["Entrypoint"][0] == "/ferroflow", "another entry point");
    for name in ["ferroflow-cni", "run", "tmp", "var/run"] {
        ensure!(tree.entries.iter().any(|entry| entry == name), "the layer holds no /{name}");
    }
    if facts.arch.triple().starts_with(std::env::consts::ARCH) && is_root()? {
        start(&tree, facts)?;
    }
    Ok(tree.digest)
}

/// Follows index, manifest, configuration and layer.
///
/// # Errors
/// What does not fit, by name.
pub(crate) fn unpack(tar: &Path, facts: &Facts) -> Result<Tree> {
    let files = entries(&fs::read(tar)?)?;
    let file = |name: &str| files.get(name).with_context(|| format!("{name} is missing"));
    let json = |name: &str| -> Result<Value> {
        serde_json::from_slice(file(name)?).with_context(|| format!("{name} is not JSON"))
    };
    let blob = |descriptor: &Value| -> Result<&Vec<u8>> {
        let bytes = file(&path(descriptor))?;
        ensure!(descriptor["digest"] == digest(bytes), "{} has another digest", path(descriptor));
        ensure!(descriptor["size"] == bytes.len(), "{} has another size", path(descriptor));
        Ok(bytes)
    };
    ensure!(json("oci-layout")?["imageLayoutVersion"] == "1.0.0", "oci-layout: another version");
    let index = json("index.json")?;
    ensure!(index["schemaVersion"] == 2, "index.json: another version");
    ensure!(index["mediaType"] == "application/vnd.oci.image.index.v1+json", "index.json: another type");
    let entry = &index["manifests"][0];
    let name = format!("{}:{}", facts.name, facts.version);
    ensure!(entry["platform"]["architecture"] == facts.arch.name(), "index.json: another architecture");
    ensure!(entry["platform"]["os"] == "linux", "index.json: another system");
    ensure!(entry["annotations"]["io.containerd.image.name"] == name, "index.json: another name");
    ensure!(
        entry["annotations"]["org.opencontainers.image.ref.name"] == facts.version,
        "index.json: another tag"
    );
    ensure!(entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json", "index.json: another type");
    let manifest: Value = serde_json::from_slice(blob(entry)?)?;
    let (config, layer) = (&manifest["config"], &manifest["layers"][0]);
    let docker = &json("manifest.json")?[0];
    ensure!(docker["RepoTags"][0] == name, "manifest.json: another name");
    ensure!(docker["Config"] == path(config), "manifest.json: another configuration");
    ensure!(docker["Layers"][0] == path(layer), "manifest.json: another layer");
    let config: Value = serde_json::from_slice(blob(config)?)?;
    let mut unpacked = Vec::new();
    GzDecoder::new(blob(layer)?.as_slice()).read_to_end(&mut unpacked).context("the layer is no gzip")?;
    ensure!(config["rootfs"]["diff_ids"][0] == digest(&unpacked), "the unpacked layer has another digest");
    let layer_files = entries(&unpacked).context("the layer is no tar")?;
    let binary = layer_files.get("ferroflow").context("the layer holds no /ferroflow")?.clone();
    let entries = layer_files.into_keys().collect();
    let digest = entry["digest"].as_str().unwrap_or_default().to_owned();
    Ok(Tree { digest, config, layer: unpacked, entries, binary })
}

fn entries(tar: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in Archive::new(Cursor::new(tar)).entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        ensure!(kind.is_file() || kind.is_dir() || kind.is_symlink(), "an entry of kind {kind:?}");
        let header = entry.header();
        ensure!(
            header.mtime()? == 0 && header.uid()? == 0 && header.gid()? == 0,
            "an entry with an owner or time"
        );
        let name = entry.path()?.to_string_lossy().trim_end_matches('/').to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        ensure!(found.insert(name.clone(), bytes).is_none(), "{name} is there twice");
    }
    Ok(found)
}

/// As a runtime does: the layer is the root directory, and the binary is all there is.
fn start(tree: &Tree, facts: &Facts) -> Result<()> {
    let root = std::env::temp_dir().join(format!("ferroflow-image-{}", std::process::id()));
    fs::create_dir_all(&root)?;
    let unpacked = Archive::new(Cursor::new(&tree.layer)).unpack(&root);
    let started = unpacked.map_err(Into::into).and_then(|()| {
        let mut chroot = Command::new("chroot");
        output(
            chroot.arg(&root).args(["/ferroflow", "--version"]).env_clear().env("PATH", "/usr/sbin:/usr/bin"),
        )
    });
    fs::remove_dir_all(&root)?;
    let said = started.context("the binary does not start in its image")?;
    if said.trim() != format!("ferroflow {}", facts.version) {
        bail!("the image is of version {}, its binary says `{}`", facts.version, said.trim());
    }
    Ok(())
}

/// Only root may make a directory the root directory.
fn is_root() -> Result<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim() == "0")
}
