//! How long the kernel's own connection tracking remembers TCP, where kube-proxy is not there to say it.
//!
//! Pods' flows that go by the stack are tracked by the kernel too wherever a rule of the host asks for it (kubelet's
//! does). kube-proxy makes it remember an hour that one side has closed, and forget an idle connection after a day
//! (`KubeProxyConntrackConfiguration`, kubernetes pkg/proxy/apis/config); the kernel's own minute and five days are not
//! what clusters are used to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

/// Of the network namespace; there once the kernel's module is.
const SETTINGS: &str = "/proc/sys/net/netfilter";

/// How often the settings are looked at: the module may come late, and others may write them.
const INTERVAL: Duration = Duration::from_secs(60);

/// Seconds; 0 leaves what the kernel has.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// How long the kernel's connection tracking, where rules of the host use it, remembers a TCP connection of which
    /// one side has closed; 0 leaves the kernel's setting
    #[arg(
        long = "conntrack-tcp-timeout-close-wait",
        env = "FERROFLOW_CONNTRACK_TCP_TIMEOUT_CLOSE_WAIT",
        value_name = "SECONDS",
        default_value_t = 3_600
    )]
    pub close_wait: u32,

    /// Likewise an idle TCP connection; 0 leaves the kernel's setting
    #[arg(
        long = "conntrack-tcp-timeout-established",
        env = "FERROFLOW_CONNTRACK_TCP_TIMEOUT_ESTABLISHED",
        value_name = "SECONDS",
        default_value_t = 86_400
    )]
    pub established: u32,
}

/// Sets what differs, again and again.
pub async fn keep(timeouts: Timeouts) {
    let mut said = None;
    loop {
        let failed = set(Path::new(SETTINGS), timeouts).err().map(|error| error.to_string());
        if let Some(error) = &failed
            && said != failed
        {
            tracing::warn!("the timeouts of the kernel's connection tracking stay as they are: {error}");
        }
        said = failed;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// # Errors
/// What cannot be read or written. A kernel without connection tracking has nothing to set.
fn set(settings: &Path, timeouts: Timeouts) -> Result<(), SetError> {
    for (name, seconds) in [
        ("nf_conntrack_tcp_timeout_close_wait", timeouts.close_wait),
        ("nf_conntrack_tcp_timeout_established", timeouts.established),
    ] {
        let path = settings.join(name);
        let wanted = seconds.to_string();
        let failed = |source| SetError { path: path.clone(), source };
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed(error)),
            Ok(found) if seconds == 0 || found.trim() == wanted => {}
            Ok(_other) => fs::write(&path, wanted).map_err(failed)?,
        }
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
struct SetError {
    path: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Timeouts = Timeouts { close_wait: 3_600, established: 0 };

    #[test]
    fn what_differs_is_set_once_the_module_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let settings = dir.path().join("netfilter");
        set(&settings, ASKED).unwrap();
        assert!(!settings.exists(), "there is nothing to set yet");

        fs::create_dir(&settings).unwrap();
        let read = |name: &str| fs::read_to_string(settings.join(name)).unwrap();
        fs::write(settings.join("nf_conntrack_tcp_timeout_close_wait"), "60\n").unwrap();
        fs::write(settings.join("nf_conntrack_tcp_timeout_established"), "432000\n").unwrap();
        set(&settings, ASKED).unwrap();
        assert_eq!(read("nf_conntrack_tcp_timeout_close_wait"), "3600");
        assert_eq!(read("nf_conntrack_tcp_timeout_established"), "432000\n", "0 leaves it");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("nf_conntrack_tcp_timeout_close_wait")).unwrap();
        let error = set(dir.path(), ASKED).unwrap_err().to_string();
        assert!(error.contains("nf_conntrack_tcp_timeout_close_wait: "), "{error}");
    }
}
