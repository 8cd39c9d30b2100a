//! Answers `/metrics`, and `/healthz` and `/proxyMode` where kube-proxy has them too.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc::Sender;
use tokio::sync::oneshot;

use super::View;
use super::metrics::Page;
use super::pods::PodAddresses;
use crate::health::{Answer, http};

/// Where kube-proxy shows its metrics.
pub const PORT: u16 = 10249;

/// None of kube-proxy's own (`iptables`, `ipvs`, `nftables`): what is true of those is not true here.
const PROXY_MODE: &str = "ebpf";

/// Somebody asks what is so; an answer that nobody awaits any longer is dropped.
#[derive(Debug)]
pub enum Asked {
    Everything(oneshot::Sender<View>),
    /// Which pods have this name, of one namespace (`shop/web`) or of any.
    Pods(String, oneshot::Sender<Vec<PodAddresses>>),
}

/// Before the name of a pod.
pub const PODS: &str = "/pods/";

/// Answers on `addr` for as long as it is polled; a port that is taken is tried again. Every scrape asks the agent
/// once.
pub async fn start(addr: SocketAddr, page: Page, ask: Sender<Asked>) {
    let mut said = false;
    let failed = |error: &io::Error| {
        if !std::mem::replace(&mut said, true) {
            tracing::warn!("cannot show metrics on {addr}: {error}; trying again");
        }
    };
    let listener = http::bind(|| open(addr), failed).await;
    let respond = move |peer, path: String| answer(peer, path, page.clone(), ask.clone());
    http::listen(listener, || false, respond).await;
}

fn open(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(http::BACKLOG)
}

async fn answer(peer: IpAddr, path: String, page: Page, ask: Sender<Asked>) -> Answer {
    let plain = |status, body: &str| Answer { status, headers: Vec::new(), body: body.into() };
    match path.as_str() {
        "/metrics" => {}
        "/healthz" => return plain(200, "ok"),
        "/proxyMode" => return plain(200, PROXY_MODE),
        // For the command line on this node, whoever else may see the metrics.
        path if path.starts_with(PODS) && peer.to_canonical().is_loopback() => {
            let found = pods(path.trim_start_matches(PODS).to_owned(), &ask).await;
            return found.map_or_else(|| plain(503, ""), |body| plain(200, &body));
        }
        _ => return plain(404, ""),
    }
    let Some(body) = text(&page, &ask).await else {
        return plain(503, "the agent ends, or cannot read its maps: its log says more\n");
    };
    let headers = vec![("content-type", CONTENT_TYPE.to_owned())];
    Answer { status: 200, headers, body }
}

/// As JSON; `None` where nobody answers.
async fn pods(name: String, ask: &Sender<Asked>) -> Option<String> {
    let (asked, found) = oneshot::channel();
    ask.send(Asked::Pods(name, asked)).await.ok()?;
    serde_json::to_string(&found.await.ok()?).ok()
}

/// `None` where nobody answers.
async fn text(page: &Page, ask: &Sender<Asked>) -> Option<String> {
    let (asked, view) = oneshot::channel();
    ask.send(Asked::Everything(asked)).await.ok()?;
    page.text(view.await.ok()?).ok()
}

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::sync::mpsc;

    use super::*;
    use crate::observe::Metrics;

    async fn ask(addr: SocketAddr, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(addr).await.ok()?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        Some(text)
    }

    #[tokio::test]
    async fn metrics_are_answered_once_the_port_is_free() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = taken.local_addr().unwrap();
        let (asking, mut asked) = mpsc::channel::<Asked>(1);
        let metrics = Metrics::new(Instant::now());
        let server = tokio::spawn(start(addr, metrics.page(), asking));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!server.is_finished(), "a port that is taken is no reason to end");
        drop(taken);
        let answering = tokio::spawn(async move {
            while let Some(asked) = asked.recv().await {
                match asked {
                    Asked::Everything(asked) => asked.send(View { writes: 42, ..View::default() }).unwrap(),
                    Asked::Pods(pod, asked) => {
                        asked.send(vec![PodAddresses { pod, addresses: vec![] }]).unwrap()
                    }
                }
            }
        });
        let mut text = None;
        for _ in 0..3_000 {
            text = ask(addr, "/metrics").await;
            if text.is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let text = text.unwrap();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains(CONTENT_TYPE), "{text}");
        assert!(text.contains("\nferroflow_reconcile_writes_total 42\n"), "{text}");
        assert!(ask(addr, "/healthz").await.unwrap().starts_with("HTTP/1.1 200"));
        assert!(ask(addr, "/proxyMode").await.unwrap().ends_with("\r\n\r\nebpf"));
        let pods = ask(addr, "/pods/shop/web").await.unwrap();
        assert!(pods.ends_with(r#"[{"pod":"shop/web","addresses":[]}]"#), "{pods}");
        assert!(ask(addr, "/").await.unwrap().starts_with("HTTP/1.1 404"));
        answering.abort();
        let _ended = answering.await;
        assert!(ask(addr, "/metrics").await.unwrap().starts_with("HTTP/1.1 503"));
        server.abort();
    }
}
