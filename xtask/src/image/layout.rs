//! The tar of an OCI image layout, with the file that makes it a `docker save` too.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::Facts;
use super::layer::{Layer, append_bytes};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// # Errors
/// Only what the tar format cannot say.
pub(crate) fn tar(layer: &Layer, facts: &Facts) -> Result<Vec<u8>> {
    let mut files = BTreeMap::new();
    let config = blob(&mut files, serde_json::to_vec(&config(layer, facts))?, CONFIG);
    let layer = blob(&mut files, layer.gzip.clone(), LAYER);
    let docker = json!([{
        "Config": path(&config),
        "RepoTags": [format!("{}:{}", facts.name, facts.version)],
        "Layers": [path(&layer)],
    }]);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": [layer],
        "annotations": labels(facts),
    });
    let mut entry = blob(&mut files, serde_json::to_vec(&manifest)?, MANIFEST);
    entry["platform"] = json!({ "architecture": facts.arch.name(), "os": "linux" });
    // What containerd and the others name the image by when they load it.
    entry["annotations"] = json!({
        "io.containerd.image.name": format!("{}:{}", facts.name, facts.version),
        "org.opencontainers.image.ref.name": facts.version,
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] });
    files.insert("index.json".to_owned(), serde_json::to_vec(&index)?);
    files.insert("manifest.json".to_owned(), serde_json::to_vec(&docker)?);
    files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    write(&files)
}

fn write(files: &BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for folder in ["blobs/", "blobs/sha256/"] {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o755);
        append_bytes(&mut tar, header, folder, &[])?;
    }
    for (path, bytes) in files {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        append_bytes(&mut tar, header, path, bytes)?;
    }
    Ok(tar.into_inner()?)
}

/// Stores it under its digest and returns its descriptor.
fn blob(files: &mut BTreeMap<String, Vec<u8>>, bytes: Vec<u8>, kind: &str) -> Value {
    let descriptor = json!({ "mediaType": kind, "digest": digest(&bytes), "size": bytes.len() });
    files.insert(path(&descriptor), bytes);
    descriptor
}

/// Where a descriptor's blob lies.
pub(crate) fn path(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// What a runtime does with it (image-spec, config.md).
fn config(layer: &Layer, facts: &Facts) -> Value {
    json!({
        "created": facts.created,
        "architecture": facts.arch.name(),
        "os": "linux",
        "config": { "Entrypoint": ["/ferroflow"], "WorkingDir": "/", "Labels": labels(facts) },
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer.tar)] },
        "history": [{ "created": facts.created, "created_by": "cargo xtask image" }],
    })
}

/// The keys of image-spec, annotations.md.
fn labels(facts: &Facts) -> Value {
    json!({
        "org.opencontainers.image.created": facts.created,
        "org.opencontainers.image.description": "The Kubernetes network in Rust and eBPF",
        "org.opencontainers.image.licenses": "Apache-2.0 OR MIT",
        "org.opencontainers.image.revision": facts.revision,
        "org.opencontainers.image.title": "ferroflow",
        "org.opencontainers.image.version": facts.version,
    })
}
