//! The one layer: what the root directory of the container holds.

use std::io::Write as _;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

/// The layer as it is stored and as it is named: an image's configuration lists digests of the tar, its manifest of
/// what is compressed.
pub(crate) struct Layer {
    pub(crate) tar: Vec<u8>,
    pub(crate) gzip: Vec<u8>,
}

enum Node<'a> {
    Folder { mode: u32 },
    File { mode: u32, bytes: &'a [u8] },
    Link { to: &'static str },
}

/// The C library asks it where hosts' names are looked up; without it DNS goes before /etc/hosts.
const NSSWITCH: &[u8] = b"hosts: files dns\n";

/// Root's, of the year 1970, in the order of names.
///
/// # Errors
/// Only what the tar format cannot say.
pub(crate) fn layer(binary: &[u8]) -> Result<Layer> {
    let nodes = [
        ("etc/", Node::Folder { mode: 0o755 }),
        ("etc/nsswitch.conf", Node::File { mode: 0o644, bytes: NSSWITCH }),
        ("ferroflow", Node::File { mode: 0o755, bytes: binary }),
        // Under this name the binary is the CNI plugin.
        ("ferroflow-cni", Node::Link { to: "ferroflow" }),
        ("run/", Node::Folder { mode: 0o755 }),
        ("tmp/", Node::Folder { mode: 0o1777 }),
        ("var/", Node::Folder { mode: 0o755 }),
        ("var/lib/", Node::Folder { mode: 0o755 }),
        // Runtimes name namespaces and credentials below /var/run, hosts mount them below /run.
        ("var/run", Node::Link { to: "../run" }),
    ];
    let mut tar = Builder::new(Vec::new());
    for (path, node) in nodes {
        append(&mut tar, path, &node).with_context(|| format!("cannot put {path} into the layer"))?;
    }
    let tar = tar.into_inner()?;
    // No name and no time in the gzip header.
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
    gzip.write_all(&tar)?;
    Ok(Layer { gzip: gzip.finish()?, tar })
}

fn append(tar: &mut Builder<Vec<u8>>, path: &str, node: &Node<'_>) -> Result<()> {
    let mut header = Header::new_ustar();
    let bytes: &[u8] = match node {
        Node::Folder { mode } => {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(*mode);
            &[]
        }
        Node::File { mode, bytes } => {
            header.set_entry_type(EntryType::Regular);
            header.set_mode(*mode);
            bytes
        }
        Node::Link { to } => {
            header.set_entry_type(EntryType::Symlink);
            header.set_mode(0o777);
            header.set_link_name(to)?;
            &[]
        }
    };
    append_bytes(tar, header, path, bytes)
}

/// An entry of root's, from 1970.
pub(crate) fn append_bytes(
    tar: &mut Builder<Vec<u8>>,
    mut header: Header,
    path: &str,
    bytes: &[u8],
) -> Result<()> {
    header.set_path(path)?;
    header.set_size(bytes.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    Ok(tar.append(&header, bytes)?)
}
