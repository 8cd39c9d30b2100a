//! The file by which container runtimes find the plugin.

use std::path::PathBuf;
use std::{fs, io};

use serde_json::{Value, json};

use super::Options;
use crate::cni::plugin;
use crate::cni::types::Version;
use crate::durable;

/// Runtimes take the first file of the directory in the order of names.
#[derive(Clone, Debug)]
pub struct Conflist {
    pub dir: PathBuf,
    pub name: String,
    /// The section `ipam`, where another plugin gives addresses.
    pub ipam: Option<Value>,
}

/// What runtimes know that do not know `cniVersions`: containerd 1.6, CRI-O 1.23.
const OLDEST: Version = Version::V1_0_0;

/// The name of the network.
const NETWORK: &str = "ferroflow";

impl Conflist {
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Makes the file say where the agent is; one that says so is left alone.
    ///
    /// # Errors
    /// What the file system refuses.
    pub(super) fn write(&self, options: &Options) -> io::Result<()> {
        let text = text(options);
        let path = self.path();
        if fs::read_to_string(&path).is_ok_and(|found| found == text) {
            return Ok(());
        }
        fs::create_dir_all(&self.dir)?;
        durable::write(&path, text.as_bytes())?;
        tracing::info!(path = %path.display(), "wrote the network configuration");
        Ok(())
    }
}

/// What our own plugin does of what runtimes ask for. What a runtime has for a capability goes to the plugins that declare
/// it.
fn text(options: &Options) -> String {
    let versions: Vec<_> =
        Version::ALL.iter().filter(|version| **version >= OLDEST).map(|version| version.as_str()).collect();
    let mut plugin = json!({
        "type": plugin::NAME,
        "socket": options.socket,
        "stateDir": options.state_dir,
        "capabilities": { "bandwidth": true, "portMappings": true },
    });
    if let Some(ipam) = &options.conflist.ipam {
        plugin["ipam"] = ipam.clone();
    }
    let list = json!({
        "cniVersion": OLDEST.as_str(),
        "cniVersions": versions,
        "name": NETWORK,
        "plugins": [plugin],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_61_the_file_is_whole_and_written_only_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let conflist =
            Conflist { dir: dir.path().join("net.d"), name: "05-ferroflow.conflist".into(), ipam: None };
        let options = Options {
            socket: "/run/a.sock".into(),
            state_dir: "/var/lib/a".into(),
            conflist: conflist.clone(),
            device: crate::net::pod::Kind::Veth,
        };
        conflist.write(&options).unwrap();
        let written = fs::metadata(conflist.path()).unwrap().modified().unwrap();
        let read =
            || -> Value { serde_json::from_str(&fs::read_to_string(conflist.path()).unwrap()).unwrap() };
        let found = read();
        assert_eq!(found["name"], "ferroflow");
        assert_eq!(found["cniVersion"], "1.0.0");
        assert_eq!(found["cniVersions"], json!(["1.0.0", "1.1.0"]));
        assert_eq!(found["plugins"][0]["type"], "ferroflow-cni");
        assert_eq!(found["plugins"][0]["socket"], "/run/a.sock");
        conflist.write(&options).unwrap();
        assert_eq!(fs::metadata(conflist.path()).unwrap().modified().unwrap(), written);
        let moved = Options { socket: "/run/b.sock".into(), ..options };
        conflist.write(&moved).unwrap();
        assert!(fs::read_to_string(conflist.path()).unwrap().contains("/run/b.sock"));
        assert_eq!(fs::read_dir(&conflist.dir).unwrap().count(), 1);
        assert_eq!(found["plugins"].as_array().map(Vec::len), Some(1));
        assert_eq!(found["plugins"][0]["capabilities"], json!({ "bandwidth": true, "portMappings": true }));
        assert_eq!(found["plugins"][0].get("ipam"), None);
        let ipam = json!({ "type": "host-local" });
        let given = Conflist { ipam: Some(ipam.clone()), ..conflist.clone() };
        given.write(&Options { conflist: given.clone(), ..moved }).unwrap();
        assert_eq!(read()["plugins"][0]["ipam"], ipam);
    }
}
