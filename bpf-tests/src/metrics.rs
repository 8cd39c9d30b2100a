//! What the agent of a node says over HTTP: to Prometheus, and to whoever asks whether it is well.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::cluster::Node;

/// A page of metrics: each line's name and labels, and its value.
pub fn scrape(node: &Node) -> Result<BTreeMap<String, f64>> {
    let text = get(node, (Ipv4Addr::LOCALHOST, ferroflow::observe::PORT).into(), "/metrics")?;
    ensure!(text.starts_with("HTTP/1.1 200") && text.ends_with("# EOF\n"), "{text}");
    let (_, page) = text.split_once("\r\n\r\n").context("no body")?;
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("`{line}` is no metric"))?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}

/// Whether load balancers may send to the node and the kubelet leaves its agent alone, as the chart's probes ask it.
pub fn is_healthy(node: &Node) -> Result<()> {
    for path in ["/livez", "/healthz"] {
        let answer = get(node, (node.v4, ferroflow::health::server::PROXY_PORT).into(), path)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
    Ok(())
}

/// What the node's host is answered.
fn get(node: &Node, at: SocketAddr, path: &'static str) -> Result<String> {
    let answer = node.netns.run(move |_| -> std::io::Result<String> {
        let mut stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    answer.with_context(|| format!("{path} of {}", node.name))
}
