//! How the API servers are reached, and which of several is asked.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hyper::Uri;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tokio::sync::watch;

/// What the operator says about the API.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Credentials, and the server where no other is named; those of the pod's service account without one.
    pub kubeconfig: Option<PathBuf>,
    /// Tried in turn instead of the one that a kubeconfig names, or before the Service that a service account has.
    pub servers: Vec<Uri>,
}

#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("--kubeconfig {}: {error}", .path.display())]
    Kubeconfig { path: PathBuf, error: Box<KubeconfigError> },
    #[error(
        "no credentials for the Kubernetes API: {error}; give --kubeconfig FILE, or --manifests DIR to serve \
         without a cluster (in a pod both come with its service account)"
    )]
    NotInCluster { error: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot talk to {server}: {error}")]
    Client { server: Uri, error: Box<kube::Error> },
}

/// The API servers. All kinds ask the same one, until it fails them.
pub(super) struct Servers {
    access: Access,
    state: Mutex<State>,
    /// Counts how often all connections were left.
    moves: watch::Sender<u64>,
}

struct State {
    servers: Vec<Server>,
    current: usize,
}

#[derive(Clone)]
pub(super) struct Server {
    pub(super) client: Client,
    pub(super) address: Uri,
}

/// An address as an operator writes it: `https://10.0.0.1:6443`, `10.0.0.1:6443`.
///
/// # Errors
/// What is wrong with it, and the way out.
pub fn server(text: &str) -> Result<Uri, String> {
    let text = text.trim();
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let uri = whole.parse::<Uri>().ok().filter(|uri| {
        uri.host().is_some() && matches!(uri.scheme_str(), Some("https" | "http")) && uri.query().is_none()
    });
    uri.ok_or_else(|| {
        format!("`{text}` is not the address of an API server: write it like https://10.0.0.1:6443")
    })
}

impl Servers {
    /// # Errors
    /// Credentials that are missing or make no sense.
    pub(super) async fn open(access: Access) -> Result<Self, AccessError> {
        let servers = access.open().await?;
        let state = Mutex::new(State { servers, current: 0 });
        Ok(Self { access, state, moves: watch::Sender::new(0) })
    }

    pub(super) fn current(&self) -> Server {
        let state = self.state();
        state.servers[state.current].clone()
    }

    /// Turns to the next one, unless somebody has done so already.
    pub(super) fn leave(&self, failed: &Server) {
        let mut state = self.state();
        if state.servers.len() > 1 && state.servers[state.current].address == failed.address {
            state.current = (state.current + 1) % state.servers.len();
            let next = &state.servers[state.current].address;
            tracing::info!(from = %failed.address, to = %next, "asking another API server");
        }
    }

    /// Reads the credentials again: a token, a certificate or a whole kubeconfig may have been replaced.
    ///
    /// # Errors
    /// As [`Servers::open`]; the former ones stay in use.
    pub(super) async fn renew(&self) -> Result<(), AccessError> {
        let servers = self.access.open().await?;
        let mut state = self.state();
        state.current = state.current.min(servers.len() - 1);
        state.servers = servers;
        Ok(())
    }

    /// Leaves all connections: they may be by an address that this host has no longer, and the kernel says so to nobody
    /// who waits.
    pub(super) async fn reconnect(&self) {
        // What cannot be read is read again when a server refuses what is known.
        if let Err(error) = self.renew().await {
            tracing::debug!(%error, "the credentials stay as they are");
        }
        self.moves.send_modify(|moves| *moves += 1);
    }

    /// Changes whenever connections of before are to be left.
    pub(super) fn moves(&self) -> watch::Receiver<u64> {
        self.moves.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Servers {
    /// One that is there already.
    pub(super) fn of(client: Client) -> Self {
        let server = Server { client, address: Uri::from_static("http://fake/") };
        let state = Mutex::new(State { servers: vec![server], current: 0 });
        Self { access: Access::default(), state, moves: watch::Sender::new(0) }
    }
}

impl Access {
    /// At least one.
    async fn open(&self) -> Result<Vec<Server>, AccessError> {
        let (config, last) = self.config().await?;
        let others = self.servers.iter().filter(|server| Some(*server) != last.as_ref()).cloned();
        let addresses: Vec<_> = others.chain(last.clone()).collect();
        let server = |address: Uri| {
            let mut config = config.clone();
            config.cluster_url = address.clone();
            let client = Client::try_from(config)
                .map_err(|error| AccessError::Client { server: address.clone(), error: error.into() })?;
            Ok(Server { client, address })
        };
        addresses.into_iter().map(server).collect()
    }

    /// The credentials, and the server that is asked when no other answers. In a pod that is the Service `kubernetes`: it
    /// leads to the API servers that there are now, once an agent has served it; those of the operator may be of yesterday.
    async fn config(&self) -> Result<(Config, Option<Uri>), AccessError> {
        let (mut config, last) = match &self.kubeconfig {
            Some(path) => {
                let failed = |error: KubeconfigError| AccessError::Kubeconfig {
                    path: path.clone(),
                    error: Box::new(error),
                };
                let read = Kubeconfig::read_from(path).map_err(failed)?;
                let read = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
                (read.map_err(failed)?, self.servers.is_empty())
            }
            // By its address, which needs no DNS. A name that is not asked for does not need one.
            None => match Config::incluster_env() {
                Err(_) if !self.servers.is_empty() => {
                    (Config::incluster_dns().map_err(not_in_cluster)?, false)
                }
                config => (config.map_err(not_in_cluster)?, true),
            },
        };
        // Every fault is seen and answered in one place.
        config.default_retry = false;
        let last = last.then(|| config.cluster_url.clone());
        Ok((config, last))
    }
}

fn not_in_cluster(error: impl std::error::Error + Send + Sync + 'static) -> AccessError {
    AccessError::NotInCluster { error: error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_api_servers() {
        for (text, expected) in [
            ("https://10.0.0.1:6443", "https://10.0.0.1:6443/"),
            (" 10.0.0.1:6443", "https://10.0.0.1:6443/"),
            ("[fd00::1]:6443", "https://[fd00::1]:6443/"),
            ("api.example.com", "https://api.example.com/"),
            ("http://127.0.0.1:8001/prefix", "http://127.0.0.1:8001/prefix"),
        ] {
            assert_eq!(server(text).unwrap().to_string(), expected);
        }
        for text in ["", "ftp://10.0.0.1", "https://", "10.0.0.1 6443", "https://10.0.0.1/?a=b"] {
            assert!(server(text).unwrap_err().contains("write it like"), "{text}");
        }
    }

    #[tokio::test]
    async fn without_credentials_it_says_what_to_give() {
        let path = PathBuf::from("/nonexistent/kubeconfig");
        let error = Servers::open(Access { kubeconfig: Some(path), servers: Vec::new() }).await.err();
        let error = error.unwrap().to_string();
        assert!(error.starts_with("--kubeconfig /nonexistent/kubeconfig: "), "{error}");
    }
}
